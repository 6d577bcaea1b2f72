"""VLLM_BATCH_INVARIANT=1: every request goes through our decode in fixed splits, prefill too.

vLLM itself does not start in this mode on a CPU: it has no mixture-of-experts and no matrix products for it there. So
the real engine runs with our adapter alone in the mode, against transformers, and the bits that the mode promises are
compared where they are ours: from vLLM's batch description to the answer of `forward_mqa`.
"""

from types import SimpleNamespace

import pytest
import torch
from harness import assert_same_answers, prompts

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of
from mla_kernels.testing import make_pool

pytest.importorskip("vllm")

GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
PAGE, SPLIT, TOKENS = 16, 64, 150


def test_engine(engine, checkpoints, oracle):
    """Prompts in one piece, in chunks and behind a cached prefix, of more tokens than a tile and than a split."""
    folder, batch = checkpoints(), prompts((5, 70, 300))
    run = engine(
        folder, [batch, batch], invariant_attention=True, max_num_batched_tokens=96, enable_chunked_prefill=True,
        enable_prefix_caching=True, block_size=16,
    )  # fmt: skip
    assert "; batch invariant, in splits of 256 tokens" in run.log
    for answers in run.rounds:
        assert_same_answers(answers, oracle(folder, batch))
    assert run.rounds[1][2]["cached"] > 256
    assert set(run.calls) == {"cache_write:torch_write", "decode:torch_decode"}


def test_triton_kernels(engine, checkpoints, oracle):
    """With scratch of vLLM's workspace, and context of more than one split."""
    folder, batch = checkpoints(), prompts((5, 270))
    run = engine(folder, [batch], invariant_attention=True, kernels="triton", max_tokens=3, max_num_batched_tokens=96)
    assert_same_answers(run.rounds[0], oracle(folder, batch, 3))
    assert set(run.calls) == {"cache_write:triton_write", "decode:triton_splitkv"}


def test_speculative_decoding(engine, checkpoints, oracle):
    folder, batch = checkpoints(), [p * 8 for p in prompts((9, 5))]
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    run = engine(folder, [batch], invariant_attention=True, speculative_config=speculation)
    assert_same_answers(run.rounds[0], oracle(folder, batch))
    assert set(run.calls) == {"cache_write:torch_write", "decode:torch_decode"}


@pytest.fixture
def layer(monkeypatch):
    """forward(requests) -> the answer of each: `_build_decode` and `forward_mqa` with what they need of an engine."""
    from mla_backend.vllm_adapter import metadata
    from mla_backend.vllm_adapter.impl import MLAImpl

    builder = object.__new__(metadata.MLAMetadataBuilder)
    builder._most_untiled, builder._tile_tokens, builder.kv_cache_spec = 1, 4, SimpleNamespace(block_size=PAGE)
    layout = CacheLayout(geometry=GEOMETRY, format=format_of(torch.float32), page_size=PAGE)
    problem = Problem(
        layout=layout, dtype=torch.float32, max_query_len=4, split_tokens=SPLIT, max_seq_len=4 * TOKENS
    )  # fmt: skip
    impl = object.__new__(MLAImpl)
    impl.attention = MLAAttention(problem, Device("cpu"), MLABackendConfig(), scale=GEOMETRY.softmax_scale)
    impl.kv_lora_rank, impl.qk_rope_head_dim, impl._scratch_shapes = 128, 32, ()

    def forward(*requests):
        """requests: (rows and queries of a sequence, first query token, end)."""
        cache, table = make_pool(
            [rows[:end] for (rows, _), _, end in requests],
            GEOMETRY.latent_dim,
            page_size=PAGE,
            generator=torch.Generator().manual_seed(len(requests)),
        )
        lens = [end - first for _, first, end in requests]
        starts = torch.tensor([0, *lens]).cumsum(0).int()
        ends = torch.tensor([end for *_, end in requests], dtype=torch.int32)
        decode = builder._build_decode(
            block_table_tensor=table, seq_lens_device=ends, max_seq_len=int(ends.max()), query_start_loc_cpu=starts,
            query_start_loc_device=starts, num_decode_tokens=sum(lens), dcp_tot_seq_lens_device=None,
        )  # fmt: skip
        q = torch.cat([queries[first:end] for (_, queries), first, end in requests])
        out, _ = impl.forward_mqa(q, cache, SimpleNamespace(decode=decode), SimpleNamespace(_k_scale=None))
        return out.split(lens)

    return forward


def sequence(seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(TOKENS, GEOMETRY.latent_dim, generator=g)
    return rows, torch.randn(TOKENS, GEOMETRY.num_heads, GEOMETRY.latent_dim, generator=g)


def test_prefill_and_decode_have_the_same_bits(layer):
    mine, other = sequence(0), sequence(1)
    (whole,) = layer((mine, 0, TOKENS))
    for chunk in (1, 7, 64, 100):
        for first in range(0, TOKENS, chunk) if chunk > 1 else (0, 63, 64, 149):
            end = min(first + chunk, TOKENS)
            for batch in ([(mine, first, end)], [(other, 149, 150), (other, 0, 90), (mine, first, end), (other, 3, 9)]):
                answer = layer(*batch)[2 * (len(batch) > 1)]
                assert torch.equal(answer, whole[first:end]), (chunk, first, len(batch))


def test_another_prefill_is_refused(engine, checkpoints):
    run = engine(
        checkpoints(), [prompts((5,))], invariant_attention=True, fails=True,
        attention_config={"backend": "CUSTOM", "mla_prefill_backend": "FLASH_ATTN"}, attention_backend=None,
    )  # fmt: skip
    assert "leave out -ac.mla_prefill_backend FLASH_ATTN" in run.log


def test_our_prefill_alone_is_for_our_decode():
    """`-ac.mla_prefill_backend CUSTOM` under another decode is refused in this mode; under ours it is never called."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum as Backend

    from mla_backend.vllm_adapter.prefill import _is_under_our_decode

    assert _is_under_our_decode(SimpleNamespace(backend=Backend.CUSTOM))
    assert _is_under_our_decode(SimpleNamespace(backend=None, backend_per_kind={"mla_attention": Backend.CUSTOM}))
    assert not _is_under_our_decode(SimpleNamespace(backend=Backend.FLASH_ATTN_MLA, backend_per_kind={}))
    assert not _is_under_our_decode(SimpleNamespace(backend=None, backend_per_kind=None))
