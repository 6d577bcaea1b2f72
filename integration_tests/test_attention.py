"""`MLAAttention` without an engine: prefill over cached context gives what one pass over the whole sequence gives.

The context comes in the two forms in which vLLM plans it: rectangular arrays until 0.27, packed chunks since 0.28.
"""

from types import SimpleNamespace

import pytest
import torch

from mla_backend.attention import MLAAttention
from mla_backend.config import OPERATIONS, MLABackendConfig
from mla_backend.steps import TILES_AT_ONCE, DecodeStep, PrefillStep
from mla_backend.vllm_adapter import compat
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of, reference
from mla_kernels.splits import turns_of
from mla_kernels.testing import TOLERANCE, assert_matches, make_pool

GEOMETRY = MLAGeometry(num_heads=3, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=48)
PAGE_SIZE = 16
CONTEXT, NEW = [0, 70, 33], [5, 3, 20]
FP8 = torch.float8_e4m3fn
scales = pytest.mark.parametrize("scale", [None, 0.3], ids=["fp32 cache", "fp8 cache"])


def attention(operations=OPERATIONS, cache_dtype=torch.float32) -> MLAAttention:
    layout = CacheLayout(geometry=GEOMETRY, format=format_of(cache_dtype), page_size=PAGE_SIZE)
    problem = Problem(layout=layout, dtype=torch.float32, max_query_len=max(NEW))
    scale = GEOMETRY.softmax_scale
    return MLAAttention(problem, Device("cpu"), MLABackendConfig(), scale=scale, operations=operations)


def starts(lens) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


class Batch:
    """Three requests with cached context (one without), and what attention over their whole sequences gives.

    scale: of an fp8 cache, which holds these rows exactly; None for a float32 cache.
    """

    def __init__(self, scale: float | None = None):
        g = torch.Generator().manual_seed(0)
        width = GEOMETRY.qk_nope_head_dim + GEOMETRY.v_head_dim
        self.up = torch.randn(GEOMETRY.kv_lora_rank, GEOMETRY.num_heads * width, generator=g) * 0.1
        self.rows = [torch.randn(c + n, GEOMETRY.latent_dim, generator=g) for c, n in zip(CONTEXT, NEW, strict=True)]
        self.scale = None if scale is None else torch.tensor(scale)
        held = self.rows if scale is None else [(row / scale).to(FP8).float() for row in self.rows]
        self.cache, self.table = make_pool(held, GEOMETRY.latent_dim, page_size=PAGE_SIZE, generator=g)
        if scale is not None:
            self.cache, self.rows = self.cache.to(FP8), [row * self.scale for row in held]
        self.q = torch.randn(sum(NEW), GEOMETRY.num_heads, GEOMETRY.qk_head_dim, generator=g)
        new = torch.cat([rows[c:] for rows, c in zip(self.rows, CONTEXT, strict=True)])
        self.latent, self.rope = new.split([GEOMETRY.kv_lora_rank, GEOMETRY.qk_rope_head_dim], -1)

    def up_project(self, latent):
        return (latent @ self.up.to(latent.dtype)).view(len(latent), GEOMETRY.num_heads, -1)

    def expected(self):
        rows = torch.cat(self.rows).double()
        latent, rope = rows.split([GEOMETRY.kv_lora_rank, GEOMETRY.qk_rope_head_dim], -1)
        k_nope, v = self.up_project(latent).split([GEOMETRY.qk_nope_head_dim, GEOMETRY.v_head_dim], -1)
        rope = rope[:, None].expand(-1, GEOMETRY.num_heads, -1)
        lens = [len(rows) for rows in self.rows]
        out, _ = reference.prefill(
            *(self.q.double(), k_nope, rope, v, starts(NEW), starts(lens)),
            max_query_len=max(NEW),
            scale=GEOMETRY.softmax_scale,
            causal=True,
        )
        return out


def rectangular(longest: int) -> SimpleNamespace:
    """As vLLM 0.26 plans it: chunk i holds up to `longest` context tokens of every request from i * longest on."""
    first = [longest * i for i in range(-(-max(CONTEXT) // longest))]
    lens = [[min(max(c - f, 0), longest) for c in CONTEXT] for f in first]
    return SimpleNamespace(
        cu_seq_lens=torch.stack([starts(row) for row in lens]),
        starts=torch.tensor([[f] * len(CONTEXT) for f in first], dtype=torch.int32),
        seq_tot=[sum(row) for row in lens],
        max_seq_lens=[max(row) for row in lens],
        workspace=torch.full((longest * len(CONTEXT), GEOMETRY.latent_dim), torch.nan),
    )


def packed() -> SimpleNamespace:
    """As vLLM 0.28 plans it with room for 64 rows: request 1 begins; its rest and request 2; request 0 has none."""

    def chunk(requests, tokens, first, lens):
        return SimpleNamespace(
            request_slice=requests,
            token_slice=tokens,
            query_start_loc=starts(NEW[requests]),
            max_query_len=max(NEW[requests]),
            starts=torch.tensor(first, dtype=torch.int32),
            cu_seq_lens=starts(lens),
            max_seq_len=max(lens),
            num_context_tokens=sum(lens),
        )

    chunks = [
        chunk(slice(1, 2), slice(5, 8), [0], [64]),
        chunk(slice(1, 3), slice(5, 28), [64, 0], [6, 33]),
    ]
    return SimpleNamespace(chunks=chunks, workspace=torch.full((64, GEOMETRY.latent_dim), torch.nan))


def chunks_of(context) -> list:
    """As vLLM names them in its calls."""
    if hasattr(context, "chunks"):
        return [(chunk, None) for chunk in context.chunks]
    return [(None, number) for number in range(len(context.seq_tot))]


@scales
@pytest.mark.parametrize("context", [rectangular(32), rectangular(128), packed()], ids=["0.26", "0.26-one", "0.28"])
def test_prefill_over_cached_context(context, scale):
    batch = Batch(scale)
    prefill = SimpleNamespace(chunked_context=context, query_start_loc=starts(NEW), max_query_len=max(NEW))
    step = PrefillStep(
        query_start_B1=starts(NEW),
        max_query_len=max(NEW),
        block_table_BM=batch.table,
        chunks=tuple(compat.context_chunk_of_call(prefill, *which) for which in chunks_of(context)),
        gather_buffer_SK=context.workspace,
    )
    out = torch.full((sum(NEW), GEOMETRY.num_heads, GEOMETRY.v_head_dim), torch.nan)
    options = {"up_project": batch.up_project, "out_TNV": out, "cache_scale": batch.scale}
    attention(cache_dtype=batch.cache.dtype).prefill(batch.q, batch.latent, batch.rope, batch.cache, step, **options)
    assert_matches("out", out, batch.expected(), TOLERANCE[torch.float32])


@scales
def test_absorbed_decode_equals_expanded_prefill(scale):
    """The same new tokens through decode, ragged, with the projections moved to query and output."""
    batch = Batch(scale)
    w_k, w_v = (
        w.transpose(0, 1)
        for w in batch.up.view(GEOMETRY.kv_lora_rank, GEOMETRY.num_heads, -1).split(
            [GEOMETRY.qk_nope_head_dim, GEOMETRY.v_head_dim], -1
        )
    )
    q_nope, q_rope = batch.q.split([GEOMETRY.qk_nope_head_dim, GEOMETRY.qk_rope_head_dim], -1)
    step = DecodeStep(
        block_table_BM=batch.table,
        seq_lens_B=torch.tensor([len(rows) for rows in batch.rows], dtype=torch.int32),
        query_len=max(NEW),
        query_start_B1=starts(NEW),
    )
    latent_out, _ = attention(cache_dtype=batch.cache.dtype).decode(
        torch.einsum("tnp,nlp->tnl", q_nope, w_k), q_rope, batch.cache, step, cache_scale=batch.scale
    )
    out = torch.einsum("tnl,nlv->tnv", latent_out, w_v)
    assert_matches("out", out, batch.expected(), TOLERANCE[torch.float32])


def test_write_then_read():
    batch = Batch()
    cache = torch.full_like(batch.cache, torch.nan)
    slots = torch.randperm(cache.shape[0] * PAGE_SIZE)[: len(batch.latent)]
    attention().write(batch.latent, batch.rope, cache, slots)
    assert torch.equal(cache.flatten(0, 1)[slots], torch.cat([batch.latent, batch.rope], -1))


def test_write_to_an_fp8_cache_then_read():
    batch = Batch(0.3)
    cache = torch.zeros_like(batch.cache)
    slots = torch.randperm(cache.shape[0] * PAGE_SIZE)[: len(batch.latent)]
    attention(cache_dtype=FP8).write(batch.latent, batch.rope, cache, slots, cache_scale=batch.scale)
    held = cache.flatten(0, 1)[slots].float() * batch.scale
    assert torch.equal(held, torch.cat([batch.latent, batch.rope], -1)), "these rows need no rounding"


def test_a_cache_without_scale_is_not_scaled():
    """An engine may hand over its factor whatever the cache is."""
    batch = Batch()
    cache = torch.zeros_like(batch.cache)
    slots = torch.arange(len(batch.latent))
    attention().write(batch.latent, batch.rope, cache, slots, cache_scale=torch.tensor(0.3))
    assert torch.equal(cache.flatten(0, 1)[slots], torch.cat([batch.latent, batch.rope], -1))


def test_only_what_is_asked_for_is_chosen():
    assert set(attention(("prefill",)).chosen) == {"prefill"}


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=["gluon_sm90", "triton_splitkv"])
def test_scratch_of_a_small_server_is_enough_for_tiles(cache_dtype):
    """Tiles are requests of their own: with room for the requests alone they would take thousands of turns."""
    geometry = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    layout = CacheLayout(geometry=geometry, format=format_of(cache_dtype), page_size=64)
    problem = Problem(layout=layout, dtype=torch.bfloat16, max_query_len=4, split_tokens=384, max_seq_len=131072)
    one = MLAAttention(problem, Device("cuda", 90, "H200", 132), MLABackendConfig(), scale=1.0)
    _, ((rows,), _) = one.decode_workspace(1)
    assert one.decode_workspace(1) == one.decode_workspace(TILES_AT_ONCE)
    assert turns_of(rows, 4 * 16, TILES_AT_ONCE, 131072, 384).count < 64


def test_kernels_that_plan_on_the_host_are_told(monkeypatch):
    """FlashInfer's, when named: the start-up line says what they cost, and prefill what it takes for a moment."""
    monkeypatch.setattr("mla_kernels.flashinfer_calls.find_spec", lambda name: True)
    shape = MLAGeometry(num_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    layout = CacheLayout(geometry=shape, format=format_of(torch.bfloat16), page_size=64)
    problem, device = Problem(layout=layout, dtype=torch.bfloat16), Device("cuda", 90, "H200", 132)
    plain = MLAAttention(problem, device, MLABackendConfig(), scale=1.0)
    kernels = (("decode", "flashinfer_mla"), ("prefill", "flashinfer_ragged"))
    named = MLABackendConfig(kernels=tuple((dict(MLABackendConfig().kernels) | dict(kernels)).items()))
    attention = MLAAttention(problem, device, named, scale=1.0)
    said = "; calls of flashinfer_mla, flashinfer_ragged wait for the GPU and fit no CUDA graph; 16 heads"
    assert said in attention.describe(max_requests=8)
    assert "128.0 MiB of scratch for decode" in attention.describe(max_requests=8)
    assert "CUDA graph" not in plain.describe(max_requests=8)
    assert attention.prefill_bytes(tokens=0, keys=100) == 100 * 16 * 192 * 2
    assert (
        plain.prefill_bytes(tokens=4096, keys=4096) == 132 * 128 * (128 + 1) * 4
    )  # answers of pieces, 128 queries each
    assert plain.prefill_bytes(tokens=4096, keys=1024) == 0
    assert attention.decode_variants(8, range(1, 4)) == [(1, 1)]
