"""The step cases of `bench prefill`: their arithmetic, what they refuse, and real engines on a CPU, whose times mean
nothing there."""

from types import SimpleNamespace

import pytest
import torch
from bench_rows import FACTS, TINY_MODEL, prefill_row

from mla_backend.bench import compare, engine, prefill, prefill_cases, prefill_steps, vllm_prefill_engine
from mla_backend.bench.cases import BYTES_PER_US, FLOP_PER_US, chosen_cases
from mla_backend.bench.engine import Engine
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.prefill_cases import CASES, StepCase, case_of
from mla_kernels import reference

SHORT, LONG, NEW = (StepCase(count=1, tokens=t, context=c, heads=16) for t, c in ((64, 65536), (512, 16384), (8192, 0)))
NO_VLLM = "needs the package vllm, which is not installed"


def test_limits():
    """Few new tokens are bound by the way through latent space, many by that over expanded heads."""
    pairs = 64 * 65536 + 64 * 65 // 2
    assert SHORT.flop == 2 * 16 * (pairs * 1088 + 64 * 512 * 256)
    pairs = 512 * 16384 + 512 * 513 // 2
    assert LONG.flop == 2 * 16 * (pairs * 320 + (512 + 16384) * 512 * 256)
    assert NEW.flop == 2 * 16 * (8192 * 8193 // 2 * 320 + 8192 * 512 * 256)
    assert SHORT.bytes == 2 * ((64 + 65536) * 576 + 64 * 16 * 320)
    assert SHORT.limit_us == SHORT.flop / FLOP_PER_US > SHORT.bytes / BYTES_PER_US


def test_rows_know_that_they_are_steps():
    assert case_of(prefill_row(SHORT, 1.0)) == SHORT


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one, and kernels alone were right and fast."""
    monkeypatch.setattr(compare, "machine", lambda: FACTS)
    monkeypatch.setattr(compare, "need_gpu", lambda: None)
    monkeypatch.setattr(prefill, "verify", lambda *_, **__: None)
    monkeypatch.setattr(prefill, "measure", lambda case, *_, **__: prefill_row(case, 60.0))


def test_without_vllm_steps_are_left_out_with_the_reason(monkeypatch, gpu):
    monkeypatch.setattr(prefill_steps, "find_spec", lambda name: None)
    rows, refusals = prefill.run([CASES[0], SHORT, LONG], peers=["fa3"])
    assert ([row["case"] for row in rows], refusals) == (["kernel"], {("step", NO_VLLM): [str(SHORT), str(LONG)]})
    with pytest.raises(BenchmarkError, match=f"case {SHORT}: {NO_VLLM}"):
        prefill.run([SHORT], peers=["fa3"])


def test_without_a_gpu_nothing_runs():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BenchmarkError, match="the benchmark wants an NVIDIA or AMD GPU"):
        prefill.run([SHORT], peers=[])


def test_steps_join_the_rows(monkeypatch, gpu, tmp_path, capsys):
    def run(cases, *, refused, **options):
        assert options == {"peers": ["fa3"], "kernel": None, "eager": False}
        refused("fa3", "is not here", cases[0])
        yield from (prefill_row(case, 60.0, fa3=75.0) for case in cases)

    monkeypatch.setattr(prefill_steps, "why_not", lambda: None)
    monkeypatch.setattr(prefill_steps, "run", run)
    rows, refusals = prefill.run([SHORT, CASES[0]], peers=["fa3"], csv=tmp_path / "rows.csv")
    assert [row["case"] for row in rows] == ["kernel", "step"]
    assert refusals == {("fa3", "is not here"): [str(SHORT)]}
    assert "step n1 s64 c65536 h16 192/128" in capsys.readouterr().out
    assert (tmp_path / "rows.csv").read_text().splitlines()[2].startswith("2026-11-22,a GPU,2,3,step,1,64,65536,16,")


class Layer:
    """What `_watched` needs of a layer: its widths, its up-projection, and a step with one request."""

    num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, scale = 2, 32, 16, 8, 12, 0.2

    def __init__(self, context: int, tokens: int, wrong: float = 0.0):
        g = torch.Generator().manual_seed(0)
        self.context, self.wrong, self.calls = context, wrong, 0
        self.up = torch.randn(32, 2 * 28, generator=g) / 6
        self.rows = torch.randn(context + tokens, 40, generator=g)
        self.cache, self.table = torch.full((9, 4, 40), torch.nan), torch.randperm(9, generator=g)[None]
        for position, row in enumerate(self.rows[:context]):
            self.cache[self.table[0, position // 4], position % 4] = row
        self.q = torch.randn(tokens, 2, 24, generator=g)
        self.output = torch.full((tokens, 2 * 12), torch.nan)

    def kv_b_proj(self, latent):
        return (latent @ self.up, None)

    def forward_mha(self, q, latent, rope, cache, metadata, k_scale, output, output_scale=None):
        k_nope, v = (self.rows[:, :32] @ self.up).view(-1, 2, 28).split([16, 12], -1)
        starts = torch.tensor([0, len(q)]), torch.tensor([0, len(self.rows)])
        keys = k_nope, self.rows[:, None, 32:].expand(-1, 2, -1), v
        answer, _ = reference.prefill(q, *keys, *starts, max_query_len=len(q), scale=self.scale, causal=True)
        output.copy_(answer.flatten(1) * (1 + self.wrong))
        self.calls += 1

    def step(self, seen: list, tokens: int | None = None) -> None:
        new = self.rows[self.context :]
        metadata = SimpleNamespace(prefill=SimpleNamespace(block_table=self.table))
        arrays = self.q, new[:, :32], new[:, None, 32:], self.cache, metadata, None
        wanted = self.forward_mha, self, tokens or len(self.q), self.context, seen, clock
        vllm_prefill_engine._watched(*wanted, *arrays, output=self.output)


@pytest.fixture(autouse=True)
def no_gpu_memory(monkeypatch):
    """One call, of 7 bytes."""
    monkeypatch.setattr(vllm_prefill_engine, "peak_bytes", lambda call: call() or 7)


def clock(calls, **_):
    calls[0]()
    return 3.0


@pytest.mark.parametrize("context", [0, 13, 16])
def test_the_step_that_is_looked_for_is_checked_and_timed(context):
    layer, seen = Layer(context, 5), []
    layer.step(seen)
    assert (seen, layer.calls) == ([(3.0, 7)], 4), "one for the layer, one for its memory, two for its time"
    layer.step(seen, tokens=6)
    assert (seen, layer.calls) == ([(3.0, 7)], 5), "another step is done, and no more"


def test_a_wrong_answer_is_not_timed():
    seen = []
    with pytest.raises(BenchmarkError, match=r"forward_mha is off by 3.0e-02 of the norm of float32 attention"):
        Layer(13, 5, wrong=0.03).step(seen)
    assert seen == []


def serve_on_a_cpu(connection, folder, which, experiment):
    """`engine.serve` with a clock that looks at no GPU."""
    vllm_prefill_engine.graph_us, vllm_prefill_engine.peak_bytes = clock, lambda call: call() or 7
    engine.serve(connection, folder, which, experiment)


def serve_without_vllm(connection, folder, which, experiment):
    """What an engine's process sends: its version and times, or why it did not start."""
    if which.backend == "NO_SUCH+PREFILL" or which.environment:
        connection.send(BenchmarkError(f"{which}: does not start"))
        return
    connection.send("vLLM 0")
    while True:
        tokens, context = connection.recv()
        other = which.backend == "OTHER+PREFILL"
        connection.send(prefill_steps.StepCost(tokens + context + 0.5 * other, (tokens + other) << 20))


CASES_OF_TWO = [StepCase(count=1, tokens=tokens, context=128, heads=heads) for heads in (4, 2) for tokens in (64, 192)]


def steps(cases, target, **options) -> list[dict]:
    return list(prefill_steps.run(cases, model=engine.MODEL | TINY_MODEL, target=target, **options))


def test_a_peer_that_does_not_start_is_an_empty_cell():
    engines, refusals = {"fa3": Engine(backend="OTHER+PREFILL"), "flashinfer": Engine(backend="NO_SUCH+PREFILL")}, []
    options = {"peers": list(engines), "engines": engines, "refused": lambda *why: refusals.append(why)}
    rows = steps(CASES_OF_TWO, serve_without_vllm, **options)
    assert [(row["heads"], row["tokens"], row["ours_us"], row["fa3_us"]) for row in rows] == [
        *((2, 64, 192, 192.5), (2, 192, 320, 320.5), (4, 64, 192, 192.5), (4, 192, 320, 320.5)),
    ]
    assert prefill_cases.line(rows[0]).endswith("fa3 192.5 (1.00x)  memory ours 64 MiB, fa3 65 MiB")
    reason = "NO_SUCH+PREFILL: does not start"
    assert refusals == [("flashinfer", reason, case) for case in sorted(CASES_OF_TWO, key=lambda case: case.heads)]


def test_ours_must_start():
    with pytest.raises(BenchmarkError, match=r"CUSTOM\+CUSTOM:my_kernel: does not start"):
        steps(CASES_OF_TWO, serve_without_vllm, peers=[], refused=None, kernel="my_kernel")


def test_real_engines(monkeypatch):
    """Ours leaves one case in latent space and expands the other, vLLM's own expands both: a check in their processes
    compares all with float32 attention. vLLM's own is under our decode, since its decode on a CPU caches no prefix."""
    pytest.importorskip("vllm")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # helpers of vLLM's compile themselves, which takes longer
    engines = {"fa3": Engine(backend="CUSTOM+FLASH_ATTN")}
    rows = steps(CASES_OF_TWO[2:], serve_on_a_cpu, peers=["fa3"], engines=engines, refused=None)
    assert [(row["tokens"], row["context"], row["ours_us"], row["fa3_us"]) for row in rows] == [
        (64, 128, 3.0, 3.0),
        (192, 128, 3.0, 3.0),
    ]
    assert all(row["kernel"].startswith("forward_mha, vLLM 0.") for row in rows)
    assert {(row["ours_bytes"], row["fa3_bytes"]) for row in rows} == {(7, 7)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_long_prefix_hit_takes_less_memory_than_vllms_own():
    """Both gather and expand what is cached: ours 16384 rows at a time, straight to where attention reads them."""
    pytest.importorskip("vllm")
    (case,) = chosen_cases("c131072 h16 ", CASES)
    (row,) = prefill_steps.run([case], peers=["fa3"], refused=lambda *why: pytest.fail(str(why)))
    print(prefill_cases.line(row))
    assert row["ours_bytes"] < row["fa3_bytes"]
