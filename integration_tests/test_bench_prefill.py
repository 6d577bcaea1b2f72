"""The prefill benchmark's arithmetic, checks and output. Nothing is timed here: that takes a GPU."""

import math
import sys
from types import ModuleType

import pytest
import torch
from bench_mistakes import MISTAKES, make_mistake
from bench_rows import FACTS, prefill_row

from mla_backend.bench import compare, peers, prefill, prefill_cases, results
from mla_backend.bench.cases import chosen_cases
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.prefill_cases import CASES, PrefillCase
from mla_backend.config import MLABackendConfig
from mla_kernels import reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

CAUSAL = PrefillCase(count=3, tokens=5, heads=2)
CACHED = PrefillCase(count=2, tokens=3, context=7, heads=2)
WIDE = PrefillCase(count=2, tokens=4, heads=1, qk_dim=256, v_dim=256)
LONG = PrefillCase(count=2, tokens=70, heads=1)
ON_CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def config(monkeypatch):
    monkeypatch.delenv("MLA_BACKEND_PREFILL", raising=False)
    return MLABackendConfig()


@pytest.fixture
def sampled(monkeypatch):
    """Sequences of more than 16 tokens are compared in one row of every 8."""
    monkeypatch.setattr(prefill, "WHOLE", 16)
    monkeypatch.setattr(prefill, "SAMPLE", 8)


def test_cases():
    assert len(CASES) == len(set(map(str, CASES))) == 20
    assert [str(case) for case in chosen_cases("h20|^n1 .*c16384", CASES)] == [
        *("n16 s512 h20 256/256", "n1 s8192 h20 256/256", "n1 s512 c16384 h16 192/128"),
    ]
    assert [str(case) for case in chosen_cases("step", CASES)] == [
        f"step n1 {shape} h{heads} 192/128"
        for heads in (16, 128)
        for shape in ("s8192", "s512 c16384", "s64 c65536", "s1024 c131072")
    ]


@pytest.mark.parametrize(
    ("shape", "limit"),
    [((16, 512, 16), 39.0), ((8, 1024, 16), 54.4), ((1, 32768, 16), 6958.9), ((4, 4096, 128), 3479.5)],
)
def test_limits(shape, limit):
    """As the peers' times were first compared with: 16 x 512 is bound by bytes."""
    count, tokens, heads = shape
    assert PrefillCase(count=count, tokens=tokens, heads=heads).limit_us == pytest.approx(limit, abs=0.051)


def test_no_mask_hides_cached_tokens():
    """512 queries and 16384 keys of 16 heads, 320 multiply-adds each."""
    (cached,) = chosen_cases("^n1 .*c16384", CASES)
    assert (cached.causal, cached.flop) == (False, 2 * 16 * 512 * 16384 * 320)
    assert cached.bytes == 2 * 16 * (512 + 16384) * 320


def test_keys_and_values_are_views():
    data = prefill.make_inputs(WIDE, **ON_CPU)
    assert data.k_nope_SNP.shape == (8, 1, 192)
    assert data.v_SNV.shape == (8, 1, 256)
    assert data.k_nope_SNP.stride() == data.v_SNV.stride()
    assert data.v_SNV.data_ptr() == data.k_nope_SNP.data_ptr() + 192 * 4
    assert prefill.make_inputs(CAUSAL, **ON_CPU).k_rope_SNR.stride(1) == 0
    assert not torch.equal(data.q_TNQ, prefill.make_inputs(WIDE, **ON_CPU, seed=1).q_TNQ)


@pytest.mark.parametrize("case", [CAUSAL, CACHED, WIDE, LONG], ids=str)
def test_expected_is_the_reference(sampled, case):
    data = prefill.make_inputs(case, **ON_CPU)
    q, k_nope, k_rope, v = (x.double() for x in (data.q_TNQ, data.k_nope_SNP, data.k_rope_SNR, data.v_SNV))
    starts = data.query_start_B1, data.key_start_B1
    options = {"max_query_len": data.max_query_len, "scale": data.scale, "causal": data.causal}
    wanted, wanted_lse = reference.prefill(q, k_nope, k_rope, v, *starts, **options)
    row_M, out, lse, magnitude = prefill.expected(data)
    assert_matches("out", out, wanted[row_M], TOLERANCE[torch.float32])
    assert_matches("lse", lse, wanted_lse[row_M], LSE_TOLERANCE)
    sums, _ = reference.prefill(q, k_nope, k_rope, v.abs(), *starts, **options)
    assert_matches("magnitude", magnitude, sums[row_M], TOLERANCE[torch.float32])
    assert len(row_M) < len(q) if case is LONG else len(row_M) == len(q)


def test_expected_is_the_same_a_head_at_a_time(monkeypatch):
    data = prefill.make_inputs(CACHED, **ON_CPU)
    whole = prefill.expected(data)
    monkeypatch.setattr(prefill, "COMPARED_BYTES", 0)
    for mine, wanted in zip(prefill.expected(data), whole, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_sampled_rows(sampled):
    """A row of every 8 of each sequence, its first and its last."""
    row_M, *_ = prefill.expected(prefill.make_inputs(LONG, **ON_CPU))
    for first in (0, 70):
        mine = row_M[(row_M >= first) & (row_M < first + 70)] - first
        assert {0, 69} <= set(mine.tolist())
        assert set((mine // 8).tolist()) == set(range(9))


@pytest.mark.parametrize("case", [CAUSAL, CACHED, WIDE, LONG], ids=str)
def test_verify_accepts_our_kernel(config, sampled, case):
    prefill.verify(case, config, **ON_CPU)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_catches(monkeypatch, config, mistake):
    make_mistake(monkeypatch, "attend", mistake)
    with pytest.raises(BenchmarkError, match=r"wrong answer of \w+ in case n3 s5 h2 192/128"):
        prefill.verify(CAUSAL, config, **ON_CPU)


def test_unwritten_row_between_sampled_ones_is_caught(monkeypatch, config, sampled):
    row_M, *_ = prefill.expected(prefill.make_inputs(LONG, **ON_CPU))
    between = next(row for row in range(140) if row not in row_M.tolist())

    def spoil(out, lse, call):
        out[between] = torch.empty_like(out[between])

    make_mistake(monkeypatch, "attend", spoil)
    with pytest.raises(BenchmarkError, match="out: 128 of 17920 values are not finite"):
        prefill.verify(LONG, config, **ON_CPU)


def test_unknown_kernel_is_refused_with_the_names(config):
    with pytest.raises(BenchmarkError, match=r"unknown prefill kernel 'nope'; choose from auto, .*torch_prefill"):
        prefill.verify(CAUSAL, compare.config_for("prefill", "nope"), **ON_CPU)


def test_long_cases_are_repeated_less():
    short, long = prefill.effort(CASES[0]), prefill.effort(PrefillCase(count=1, tokens=32768, heads=16))
    assert short == {"at_least": 10, "replays": 12}
    assert long == {"at_least": 2, "replays": 6}


def test_every_peer_has_a_column():
    assert tuple(peers.PREFILL) == prefill_cases.PEERS
    assert set(prefill_cases.PEERS) <= set(results.PEERS)


def by_the_book(q, k, v, query_start, key_start, scale, causal):
    """Attention over whole keys, as peers document it: queries are the last of their keys."""
    out = torch.empty(*q.shape[:2], v.shape[-1])
    for b in range(len(query_start) - 1):
        mine, keys = slice(*query_start[b : b + 2].tolist()), slice(*key_start[b : b + 2].tolist())
        score = torch.einsum("mnq,snq->nms", q[mine], k[keys]) * scale
        if causal:
            hidden = torch.ones(score.shape[1:], dtype=torch.bool).triu(score.shape[2] - score.shape[1] + 1)
            score = score.masked_fill(hidden, -math.inf)
        out[mine] = torch.einsum("nms,snv->mnv", score.softmax(-1), v[keys])
    return out, None


def flash_attn_varlen_func(
    *, q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k, softmax_scale, causal, return_softmax_lse,
    fa_version,
):  # fmt: skip
    assert (return_softmax_lse, fa_version) == (True, 3)
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    return by_the_book(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


class Wrapper:
    """FlashInfer's, as its documentation describes it."""

    def __init__(self, workspace, layout, *, backend):
        assert (workspace.dtype, layout, backend) == (torch.uint8, "NHD", "auto")

    def plan(self, **options):
        self.options = options

    def run(self, q, k, v, *, return_lse):
        plan = self.options
        assert (plan["num_qo_heads"], plan["num_kv_heads"], return_lse) == (q.shape[1], k.shape[1], True)
        assert (plan["head_dim_qk"], plan["head_dim_vo"]) == (q.shape[2], v.shape[2])
        assert plan["q_data_type"] == q.dtype
        return by_the_book(q, k, v, plan["qo_indptr"], plan["kv_indptr"], plan["sm_scale"], plan["causal"])


@pytest.fixture
def packages(monkeypatch):
    """The peers' packages, by the book."""
    flash, flashinfer = ModuleType("vllm.vllm_flash_attn"), ModuleType("flashinfer")
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    flashinfer.BatchPrefillWithRaggedKVCacheWrapper = Wrapper
    for module in (ModuleType("vllm"), flash, flashinfer):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("case", [CAUSAL, CACHED, WIDE], ids=str)
@pytest.mark.parametrize("peer", prefill_cases.PEERS)
def test_peers_get_what_they_document(packages, peer, case):
    data = prefill.make_inputs(case, **ON_CPU)
    row_M, out_MNV, *_ = prefill.expected(data)
    assert compare.peer_error(peers.PREFILL[peer](data)(), out_MNV, row_M) < 1e-5


def measured(monkeypatch, config, case=CAUSAL, **kernels):
    """A row and the refusals, with these functions as peers, one set of inputs and a clock that always says 3."""
    monkeypatch.setattr(prefill, "PREFILL", kernels)
    monkeypatch.setattr(prefill, "input_sets", lambda size: 1)
    refusals = []
    options = {"peers": list(kernels), "refused": lambda *why: refusals.append(why), "clock": lambda calls, **_: 3.0}
    return prefill.measure(case, config, **options, **ON_CPU), refusals


def test_measured_row(monkeypatch, config, packages, sampled):
    made, refusals = measured(monkeypatch, config, LONG, fa3=peers.fa3_prefill)
    assert refusals == []
    shape = {"count": 2, "tokens": 70, "context": 0, "heads": 1, "qk_dim": 192, "v_dim": 128}
    assert made.pop("kernel")
    assert made == {"case": "kernel"} | shape | {"limit_us": 0.04, "ours_us": 3.0, "fa3_us": 3.0}


def test_peer_that_refuses_or_computes_something_else_is_an_empty_cell(monkeypatch, config, capsys):
    def refuses(data):
        raise RuntimeError("head dimension must be 192\nsecond line")

    made, refusals = measured(monkeypatch, config, fa3=refuses, flashinfer=lambda data: lambda: data.v_SNV * 2)
    assert not made.keys() & {"fa3_us", "flashinfer_us"}
    assert refusals == [
        ("fa3", "RuntimeError: head dimension must be 192"),
        ("flashinfer", "its output differs from float32 attention by more than 0.02 of the norm"),
    ]
    assert capsys.readouterr().out.startswith("warning: flashinfer is off by ")


def test_wrong_kernel_is_not_timed(monkeypatch):
    def wrong(case, *_, **__):
        raise BenchmarkError("wrong answer")

    monkeypatch.setattr(compare, "need_gpu", lambda: None)
    monkeypatch.setattr(compare, "machine", lambda: FACTS)
    monkeypatch.setattr(prefill, "verify", wrong)
    monkeypatch.setattr(prefill, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(BenchmarkError, match="wrong answer"):
        prefill.run(CASES[:1], peers=[])


def test_run_writes_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "need_gpu", lambda: None)
    monkeypatch.setattr(compare, "machine", lambda: FACTS)
    monkeypatch.setattr(prefill, "verify", lambda *_, **__: None)
    monkeypatch.setattr(prefill, "measure", lambda case, *_, **__: prefill_row(case, 60.0, fa3=75.0))
    rows, refusals = prefill.run(CASES[:1], peers=["fa3"], csv=tmp_path / "new/rows.csv")
    assert (rows, refusals) == ([prefill_row(CASES[0], 60.0, fa3=75.0)], {})
    assert "60.0 us,  358 TFLOP/s (ours_best)  fa3 75.0 (1.25x)" in capsys.readouterr().out
    assert (tmp_path / "new/rows.csv").read_text().splitlines() == [
        "date,gpu,torch,triton,case,count,tokens,context,heads,qk_dim,v_dim,limit_us,ours_us,fa3_us,flashinfer_us",
        "2026-11-22,a GPU,2,3,kernel,16,512,0,16,192,128,39.02,60.0,75.0,",
    ]
