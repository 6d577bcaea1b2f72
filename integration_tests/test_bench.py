"""The benchmark's own arithmetic, checks and output. Nothing is timed here: that takes a GPU."""

import inspect
import math
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from bench_mistakes import MISTAKES, make_mistake
from bench_rows import FACTS, row

from mla_backend.bench import compare, decode, peers, prefill, results, timing
from mla_backend.bench.cases import CASES, Case, chosen_cases
from mla_backend.bench.machine import BenchmarkError
from mla_backend.config import MLABackendConfig
from mla_kernels import reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

UNEVEN = Case(name="tiny", lengths=(5, 17, 3, 8), heads=2, query_len=3)
PAGE = 4


@pytest.fixture
def config(monkeypatch):
    monkeypatch.delenv("MLA_BACKEND_DECODE", raising=False)
    return MLABackendConfig()


@pytest.fixture
def inputs():
    return decode.make_inputs(UNEVEN, page_size=PAGE, dtype=torch.float32, device="cpu")


def test_uneven_inputs(inputs):
    """Lengths as the case says; a page of its own in every cell of the table, enough for the longest request."""
    assert inputs.seq_lens_B.tolist() == [5, 17, 3, 8]
    assert inputs.block_table_BM.shape == (4, 5)
    assert sorted(inputs.block_table_BM.flatten().tolist()) == list(range(20))
    assert inputs.cache_AGK.shape == (20, PAGE, 576)
    assert inputs.q_BQNK.shape == (4, 3, 2, 576)
    assert {inputs.seq_lens_B.dtype, inputs.block_table_BM.dtype} == {torch.int32}


def test_input_sets_differ(inputs):
    other = decode.make_inputs(UNEVEN, page_size=PAGE, dtype=torch.float32, device="cpu", seed=1)
    assert not torch.equal(inputs.cache_AGK, other.cache_AGK)


def test_expected_is_the_reference(inputs):
    """The benchmark's float32 attention, which does not repeat keys, against the definition of correct."""
    flat = inputs.q_BQNK.flatten(0, 1).double()
    wanted = reference.decode(
        flat[..., :512],
        flat[..., 512:],
        inputs.cache_AGK.double(),
        inputs.block_table_BM,
        inputs.seq_lens_B,
        scale=inputs.scale,
        query_len=3,
    )
    out, lse = decode.expected(inputs)
    assert_matches("out", out, wanted[0], TOLERANCE[torch.float32])
    assert_matches("lse", lse, wanted[1], LSE_TOLERANCE)


def verify(config):
    decode.verify(UNEVEN, config, page_size=PAGE, dtype=torch.float32, device="cpu")


def test_verify_accepts_our_kernel(config):
    verify(config)


def test_verify_accepts_fixed_splits(config):
    decode.verify(UNEVEN, config, page_size=PAGE, dtype=torch.float32, device="cpu", batch_invariant=True)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
def test_verify_accepts_an_fp8_cache(config, cache_dtype):
    options = {"page_size": PAGE, "dtype": torch.float32, "cache_dtype": cache_dtype, "device": "cpu"}
    assert decode.make_inputs(UNEVEN, **options).cache_AGK.dtype == cache_dtype
    decode.verify(UNEVEN, config, **options)


@pytest.mark.parametrize("peer", ["fa3", "flashinfer"])
def test_peers_of_16_bits_refuse_fp8(peer):
    data = decode.make_inputs(
        UNEVEN, page_size=PAGE, dtype=torch.float32, cache_dtype=torch.float8_e4m3fn, device="cpu"
    )
    with pytest.raises(NotImplementedError, match="16-bit caches only"):
        peers.DECODE[peer](data)


@pytest.mark.parametrize("peer", peers.DECODE)
def test_peers_refuse_tile_scaled_rows(peer):
    data = decode.make_inputs(UNEVEN, page_size=PAGE, dtype=torch.float32, cache_dtype=torch.uint8, device="cpu")
    with pytest.raises(NotImplementedError, match="caches"):
        peers.DECODE[peer](data)


def test_cost_of_invariance_is_a_ratio(monkeypatch, capsys, config):
    """Every case is checked, and timed in both modes on the same inputs."""
    from mla_backend.bench import invariance

    splits = []

    def timed(calls):
        for call in calls:
            splits.append(call.__closure__ and inspect.getclosurevars(call).nonlocals["attention"].problem.split_tokens)
        return 10.0 if splits[-1] is None else 11.5

    monkeypatch.setattr(invariance, "need_gpu", lambda: None)
    monkeypatch.setattr(invariance, "machine", lambda: {"gpu": "none"})
    monkeypatch.setattr(invariance, "input_sets", lambda nbytes: 1)
    monkeypatch.setattr(invariance, "graph_us", timed)
    monkeypatch.setattr(invariance, "DTYPE", torch.float32)
    monkeypatch.setattr(invariance, "make_inputs", partial(decode.make_inputs, device="cpu"))
    monkeypatch.setattr(invariance, "verify", partial(decode.verify, device="cpu"))
    (row,) = invariance.run([UNEVEN], page_size=PAGE)
    assert splits == [None, 256]
    assert (row["ordinary_us"], row["invariant_us"], row["ratio"]) == (10.0, 11.5, 1.15)
    assert "1.15 in geometric mean, 1.15 at worst" in capsys.readouterr().out


def test_poisoned_memory():
    with compare.poisoned_memory():
        assert torch.empty(4, 4).isnan().all()
        assert torch.empty_like(torch.ones(4, dtype=torch.bfloat16)).isnan().all()
        assert torch.empty(4, dtype=torch.int32).ne(0).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_catches(monkeypatch, config, mistake):
    make_mistake(monkeypatch, "decode", mistake)
    with pytest.raises(BenchmarkError, match=r"wrong answer of \w+ in case tiny b4 s33 h2 q3"):
        verify(config)


def test_kernel_is_the_named_one(monkeypatch, config, inputs):
    monkeypatch.setenv("MLA_BACKEND_DECODE", "triton_splitkv")
    monkeypatch.setenv("MLA_BACKEND_MERGE", "torch_merge")
    assert compare.config_for("decode", None) == MLABackendConfig.from_environment()
    named = compare.config_for("decode", "torch_decode")
    assert named.kernel_for("decode") == "torch_decode"
    assert named.kernel_for("merge") == "torch_merge"
    assert decode.attention_for(inputs, named).chosen["decode"].kernel.name == "torch_decode"


def test_unknown_kernel_is_refused_with_the_names(config):
    with pytest.raises(BenchmarkError, match=r"unknown decode kernel 'nope'; choose from auto, .*torch_decode"):
        verify(compare.config_for("decode", "nope"))


def test_every_peer_has_a_column():
    assert tuple(peers.DECODE) == results.PEERS


def test_page_lists():
    """Pages of 4: lengths 5, 17, 4 and 1 take 2, 5, 1 and 1."""
    table = torch.arange(20, dtype=torch.int32).view(4, 5)
    starts, pages = peers.page_lists(table, torch.tensor([5, 17, 4, 1], dtype=torch.int32), 4)
    assert starts.tolist() == [0, 2, 7, 8, 9]
    assert pages.tolist() == [0, 1, 5, 6, 7, 8, 9, 10, 15]
    assert {starts.dtype, pages.dtype} == {torch.int32}


class FlashInferByTheBook:
    """FlashInfer's wrapper as its documentation describes it, for CPU tensors."""

    def __init__(self, workspace, backend):
        assert backend == "fa3"

    def plan(self, *arguments):
        self.arguments = arguments

    def run(self, q_latent, q_rope, latent_rows, rope_rows, *, return_lse):
        q_starts, starts, pages, lengths, heads, latent, rope, page_size, causal, scale, *dtypes = self.arguments
        assert (heads, latent, rope, causal, return_lse) == (q_latent.shape[1], 512, 64, True, True)
        assert dtypes == [q_latent.dtype, latent_rows.dtype]
        out = torch.empty_like(q_latent)
        for b, length in enumerate(lengths.tolist()):
            mine = slice(*q_starts[b : b + 2].tolist())
            used = pages[starts[b] : starts[b + 1]].long()
            assert len(used) == math.ceil(length / page_size)
            key = torch.cat([latent_rows, rope_rows], -1)[used].flatten(0, 1)[:length]
            q = torch.cat([q_latent, q_rope], -1)[mine]
            score = (q @ key.T * scale).transpose(0, 1)
            hidden = torch.ones(len(q), length, dtype=torch.bool).triu(length - len(q) + 1)
            weight = score.masked_fill(hidden, -math.inf).softmax(-1)
            out[mine] = (weight @ key[:, :512]).transpose(0, 1)
        return out, None


def test_flashinfer_gets_what_it_documents(monkeypatch, inputs):
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = FlashInferByTheBook
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    assert compare.peer_error(peers.flashinfer(inputs)(), decode.expected(inputs)[0]) < 1e-5


def measured(monkeypatch, config, **kernels):
    """A row of UNEVEN and the refusals, with these functions as peers and a clock that always says 3."""
    monkeypatch.setattr(decode, "DECODE", kernels)
    refusals = []
    options = {"page_size": PAGE, "dtype": torch.float32, "device": "cpu", "clock": lambda calls: 3.0}
    made = decode.measure(UNEVEN, config, peers=list(kernels), refused=lambda *why: refusals.append(why), **options)
    return made, refusals


def test_measured_row(monkeypatch, config):
    made, refusals = measured(monkeypatch, config, fa3=lambda data: lambda: decode.expected(data))
    assert refusals == []
    times = {"limit_us": 0.02, "ours_us": 3.0, "fa3_us": 3.0}
    shape = {"case": "tiny", "batch": 4, "tokens": 33, "heads": 2, "q_len": 3, "cache_dtype": "fp32", "page_size": PAGE}
    assert made.items() >= (shape | times).items()


def test_peer_that_refuses_is_an_empty_cell_with_a_reason(monkeypatch, config):
    def absent(data):
        import no_such_package

        return no_such_package

    def refuses(data):
        raise NotImplementedError("one query token only\nsecond line")

    made, refusals = measured(monkeypatch, config, fa3=absent, vllm_triton=refuses)
    assert not made.keys() & {"fa3_us", "vllm_triton_us"}
    assert refusals == [
        ("fa3", "needs the package no_such_package, which is not installed"),
        ("vllm_triton", "NotImplementedError: one query token only"),
    ]


@pytest.mark.parametrize("factor", [1.03, math.nan])
def test_peer_that_computes_something_else_is_no_comparison(monkeypatch, config, factor, capsys):
    made, refusals = measured(monkeypatch, config, fa3=lambda data: lambda: decode.expected(data)[0] * factor)
    assert "fa3_us" not in made
    assert refusals == [("fa3", "its output differs from float32 attention by more than 0.02 of the norm")]
    assert capsys.readouterr().out.startswith("warning: fa3 is off by ")


@pytest.fixture
def fake_run(monkeypatch):
    """run(cases, measure, **options): decode.run on a machine whose clock is the function `measure`."""
    log = []
    monkeypatch.setattr(compare, "need_gpu", lambda: None)
    monkeypatch.setattr(compare, "machine", lambda: FACTS)
    monkeypatch.setattr(decode, "verify", lambda case, *_, **__: log.append(f"verify {case.heads}"))

    def run(cases, measure, **options):
        def logged(case, *_, refused, **__):
            log.append(f"measure {case.heads}")
            return measure(case, refused)

        monkeypatch.setattr(decode, "measure", logged)
        return decode.run(cases, peers=["fa3"], **options)

    run.log = log
    return run


THREE = chosen_cases("b128 s4096 h(8|32|64) q1")


def test_everything_is_checked_before_anything_is_timed(fake_run, capsys):
    def measure(case, refused):
        refused("flashinfer", "needs the package flashinfer")
        return row(2.0, fa3=3.0)

    rows, refusals = fake_run(THREE, measure)
    assert rows == [FACTS | row(2.0, fa3=3.0)] * 3
    assert fake_run.log == [f"{what} {heads}" for what in ("verify", "measure") for heads in (8, 32, 64)]
    assert refusals == {("flashinfer", "needs the package flashinfer"): [str(case) for case in THREE]}
    assert capsys.readouterr().out.count("fa3 3.0 (1.50x)") == 3


def test_killed_run_keeps_its_rows(fake_run, tmp_path):
    def measure(case, refused):
        if case.heads == 64:
            raise KeyboardInterrupt
        return row(float(case.heads))

    with pytest.raises(KeyboardInterrupt):
        fake_run(THREE, measure, csv=tmp_path / "new/kept.csv")
    assert [kept["ours_us"] for kept in results.read_csv(tmp_path / "new/kept.csv")] == [8.0, 32.0]


@pytest.mark.parametrize(("benchmark", "kernel"), [(decode, "flashinfer_mla"), (prefill, "flashinfer_ragged")])
def test_a_kernel_that_no_graph_captures_needs_eager(monkeypatch, benchmark, kernel):
    monkeypatch.setattr(compare, "need_gpu", lambda: None)
    monkeypatch.setattr(compare, "machine", lambda: FACTS)
    with pytest.raises(BenchmarkError, match=rf"^{kernel} plans on the host, .* add --eager$"):
        benchmark.run([], peers=[], kernel=kernel)
    assert benchmark.run([], peers=[], kernel=kernel, eager=True) == ([], {})


def test_eager_rows_are_timed_and_marked_as_such(monkeypatch, config, capsys):
    """Ours and the peer by the same clock; the CSV has no column for that."""
    monkeypatch.setattr(compare, "need_gpu", lambda: None)
    monkeypatch.setattr(compare, "machine", lambda: FACTS)
    monkeypatch.setattr(compare, "call_us", lambda calls, **_: 7.0)
    monkeypatch.setattr(decode, "DTYPE", torch.float32)
    make, here = decode.make_inputs, {"cache_dtype": torch.float32, "device": "cpu"}
    monkeypatch.setattr(decode, "make_inputs", lambda case, **options: make(case, **options | here))
    monkeypatch.setattr(decode, "DECODE", {"fa3": lambda data: lambda: decode.expected(data)})
    (made,), _ = decode.run([UNEVEN], peers=["fa3"], page_size=PAGE, eager=True)
    assert made["eager"] is True
    assert (made["ours_us"], made["fa3_us"]) == (7.0, 7.0)
    assert "as the host calls them, its work included" in capsys.readouterr().out


def test_calls_of_the_host(monkeypatch):
    """Two calls that the host needs 1 and 3 ms for and the GPU, which runs behind it, 10 more in all of a round."""
    clock = SimpleNamespace(now=0.0, queued=0.0, rounds=0)

    def call(seconds):
        clock.now, clock.queued = clock.now + seconds, 0.010

    def synchronize():
        clock.now, clock.queued, clock.rounds = clock.now + clock.queued, 0.0, clock.rounds + 1

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    us = timing.call_us([lambda: call(0.001), lambda: call(0.003)], at_least=3, replays=5)
    assert us == pytest.approx((2 * 4 + 10) * 1e3 / 4)
    assert clock.rounds == 2 * (5 + 2)


def test_cases():
    assert len(CASES) == len(set(map(str, CASES))) == 25
    four, mixed, wide = chosen_cases("four|mixed")
    assert (four.batch, four.tokens, four.heads, four.query_len) == (4, 4641 + 45118 + 1730 + 1696, 16, 4)
    assert (mixed.batch, min(mixed.lengths), wide.heads) == (64, 512, 128)
    assert mixed.tokens == sum(mixed.lengths)
    assert chosen_cases(None) == CASES


@pytest.mark.parametrize("pattern", ["no such case", "("])
def test_pattern_for_no_case_is_refused(pattern):
    with pytest.raises(ValueError, match="--cases"):
        chosen_cases(pattern)
