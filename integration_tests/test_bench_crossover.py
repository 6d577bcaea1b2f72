"""`bench crossover`: both ways of attending behind cached context on a CPU, and the arithmetic. Times need a GPU."""

from dataclasses import replace

import pytest
import torch
from bench_rows import FACTS

from mla_backend.attention import MLAAttention
from mla_backend.bench import crossover
from mla_backend.bench.cases import geometry_for
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.prefill_cases import StepCase
from mla_backend.config import MLABackendConfig
from mla_backend.steps import LATENT_COST
from mla_kernels import reference

TINY = StepCase(count=1, tokens=5, context=150, heads=2)
ON_CPU = {"dtype": torch.float32, "device": "cpu"}
TORCH = MLABackendConfig(
    kernels=tuple(
        {"decode": "torch_decode", "prefill": "torch_prefill", "cache_gather": "torch_gather"}.items(),
    )
)


@pytest.fixture
def small(monkeypatch):
    """Chunks of 64 rows, and two sets of inputs."""
    monkeypatch.setattr(crossover, "CONTEXT_ROWS", 64)
    monkeypatch.setattr(crossover, "input_sets", lambda nbytes: 2)


def ticking(calls, **effort) -> float:
    """A clock that runs every call, and says that the second way takes longer."""
    assert len(calls) == 2
    assert set(effort) == {"at_least", "replays"}
    for call in calls:
        call()
    ticking.now += 1.0
    return ticking.now


def measure(case=TINY) -> dict:
    ticking.now = 0.0
    return crossover.measure(case, TORCH, clock=ticking, **ON_CPU)


def test_both_ways_are_attention(small):
    """Of every set: what the reference says of the whole sequence."""
    geometry, sets = TINY.geometry, [crossover.make_inputs(TINY, **ON_CPU, seed=seed) for seed in (0, 1)]
    attention = crossover.attention_for(geometry, TORCH, **ON_CPU)
    ways = crossover.latent_way(attention, sets), crossover.expanded_way(attention, sets)
    for data, latent, expanded in zip(sets, *ways, strict=True):
        rows = data.cache_AGK[data.block_table_BM[0].long()].flatten(0, 1)[:155].double()
        assert torch.equal(rows[150:, :512].float(), data.latent_TL)
        kv = (rows[:, :512] @ data.up_XL.double().T).view(155, 2, 256)
        keys = kv[..., :128], rows[:, None, 512:].expand(-1, 2, -1), kv[..., 128:]
        starts = torch.tensor([0, 5]), torch.tensor([0, 155])
        options = {"max_query_len": 5, "scale": geometry.softmax_scale, "causal": True}
        wanted, _ = reference.prefill(data.q_TNQ.double(), *keys, *starts, **options)
        assert crossover.apart(latent(), wanted) < 1e-5
        assert crossover.apart(expanded(), wanted) < 1e-5


def test_a_row(small):
    wanted = {"heads": 2, "context": 150, "tokens": 5, "latent_us": 1.0, "expanded_us": 2.0}
    assert measure() == wanted | {"kernel": "torch_decode, torch_prefill"}


@pytest.mark.parametrize("wrong", [1.05, float("nan")])
def test_ways_that_differ_are_not_timed(small, monkeypatch, wrong):
    right = MLAAttention.extend

    def extend(self, *args, out_TNV, **options):
        right(self, *args, out_TNV=out_TNV, **options)
        out_TNV[3, 1] *= wrong
        return out_TNV

    monkeypatch.setattr(MLAAttention, "extend", extend)
    with pytest.raises(BenchmarkError, match=r"case step n1 s5 c150 h2 192/128: the two ways differ by (5.0e-02|nan)"):
        measure()
    assert ticking.now == 0


@pytest.mark.parametrize(
    ("kernel", "reason"), [("flashinfer_mla", "latent 512|needs"), ("nope", "unknown decode kernel")]
)
def test_a_kernel_that_is_not_there(kernel, reason):
    config = replace(TORCH, kernels=(*TORCH.kernels[1:], ("decode", kernel)))
    with pytest.raises(BenchmarkError, match=reason):
        crossover.attention_for(TINY.geometry, config, **ON_CPU)


def rows_of(*times: tuple[int, float, float], heads: int = 16, context: int = 16384) -> list[dict]:
    return [
        FACTS | {"heads": heads, "context": context, "tokens": n, "latent_us": one, "expanded_us": other, "kernel": "k"}
        for n, one, other in times
    ]


def test_crossover_is_between_two_measurements():
    assert crossover.measured_crossover(rows_of((64, 50, 80), (128, 90, 80), (256, 160, 90))) == 64 + 64 * 30 / 40
    assert crossover.measured_crossover(rows_of((64, 50, 80), (128, 80, 80))) == 128
    assert crossover.measured_crossover(rows_of((64, 50, 80), (128, 70, 80))) is None
    assert crossover.measured_crossover(rows_of((64, 90, 80), (128, 100, 80))) is None


@pytest.mark.parametrize("context", [4096, 65536])
def test_the_rule_and_its_constant(context):
    """The constant that is there gives the rule's number back, to a token."""
    geometry = geometry_for(16)
    tokens = crossover.rule_crossover(geometry, context)
    assert (
        crossover.cost_for(geometry, context, tokens) <= LATENT_COST < crossover.cost_for(geometry, context, tokens - 1)
    )


def test_findings():
    short = rows_of((64, 50, 80), (128, 90, 80), context=4096)
    rows = [*short, *rows_of((64, 50, 80)), *rows_of((64, 90, 80), heads=128)]
    first, second, third = crossover.findings(rows)
    assert first.startswith("h16 c4096: crossover at 112 tokens, for which LATENT_COST would be 1.3")
    assert second == "h16 c16384: crossover above 64 tokens; the rule's is 195 tokens"
    assert third == "h128 c16384: crossover at 64 tokens or below; the rule's is 195 tokens"


def test_cases():
    assert len(crossover.CASES) == 2 * 3 * 10
    assert str(crossover.CASES[0]) == "step n1 s16 c4096 h16 192/128"


def test_command(monkeypatch, tmp_path):
    runner = pytest.importorskip("typer.testing").CliRunner()
    from mla_backend.cli import application

    times = {96: 50.0, 128: 90.0, 160: 120.0}

    def fake(case, config):
        shape = {"heads": case.heads, "context": case.context, "tokens": case.tokens, "kernel": "k"}
        return shape | {"latent_us": times[case.tokens], "expanded_us": 100.0}

    monkeypatch.setattr(crossover, "need_gpu", lambda: None)
    monkeypatch.setattr(crossover, "machine", lambda: FACTS)
    monkeypatch.setattr(crossover, "measure", fake)
    words = ["bench", "crossover", "--cases", "s(96|128|160) c16384 h16", "--csv", str(tmp_path / "rows.csv")]
    done = runner.invoke(application(), words)
    assert done.exit_code == 0, done.output
    assert "crossover at 139 tokens, for which LATENT_COST would be" in done.output
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "date,gpu,torch,triton,heads,context,tokens,latent_us,expanded_us",
        "2026-11-22,a GPU,2,3,16,16384,96,50.0,100.0",
        "2026-11-22,a GPU,2,3,16,16384,128,90.0,100.0",
        "2026-11-22,a GPU,2,3,16,16384,160,120.0,100.0",
    ]
