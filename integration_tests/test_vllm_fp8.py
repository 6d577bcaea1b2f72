"""vLLM's real engine with an fp8 cache gives the tokens and log-probabilities of transformers with a cache that rounds
likewise, in float32 otherwise; and a layer's scale reaches our kernels."""

from types import SimpleNamespace

import pytest
import torch
from fp8_oracle import FP8_TOLERANCE, generate_fp8, tile_scaled
from harness import assert_same_answers, prompts
from vllm_config import vllm_config

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.steps import DecodeStep
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of, reference
from mla_kernels.testing import TOLERANCE, assert_matches, make_decode

pytest.importorskip("vllm")


@pytest.mark.parametrize(("kernels", "name", "lengths"), [("torch", "fp8", None), ("triton", "fp8_e4m3", (2, 17, 65))])
def test_uneven_batch(engine, checkpoints, oracle, kernels, name, lengths):
    folder, batch = checkpoints(), prompts(lengths) if lengths else prompts()
    run = engine(folder, [batch], kernels=kernels, kv_cache_dtype=name, max_tokens=8)
    assert "fp8 cache, 576 bytes a token and layer" in run.log
    assert_same_answers(run.rounds[0], generate_fp8(folder, batch, 8), tolerance=FP8_TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same_answers(run.rounds[0], oracle(folder, batch, 8), tolerance=FP8_TOLERANCE)
    assert {call.split(":")[0] for call in run.calls} == {"cache_write", "prefill", "decode"}
    assert all(call.split(":")[1].startswith(kernels) for call in run.calls)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_chunked_prefill_and_prefix_cache(engine, checkpoints, kernels):
    """A prompt is prefilled in pieces, each over the cache of those before; again, all but the last are there. The last
    is short enough for latent space."""
    folder, batch = checkpoints(), prompts((312,))
    run = engine(
        folder,
        [batch, batch],
        kernels=kernels,
        kv_cache_dtype="fp8",
        max_tokens=4,
        max_num_batched_tokens=152,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=16,
    )
    wanted = generate_fp8(folder, batch, 4, pieces=(152, 152), most_in_latent_space=8)
    for answers in run.rounds:
        assert_same_answers(answers, wanted, tolerance=FP8_TOLERANCE)
    assert run.rounds[1][0]["cached"] == 304
    assert "cache_gather" in {call.split(":")[0] for call in run.calls}


def test_tile_scaled_rows(engine, checkpoints, oracle):
    """An uneven batch, then a prompt in pieces, the last in latent space, then again, the first two from the cache."""
    folder, batch, long = checkpoints(), prompts((2, 17, 40)), prompts((312,))
    run = engine(
        folder,
        [batch, long, long],
        kernels="triton",
        kv_cache_dtype="fp8_ds_mla",
        max_tokens=4,
        max_num_batched_tokens=152,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=16,
    )
    assert "fp8_ds_mla cache, 656 bytes a token and layer" in run.log
    wanted = generate_fp8(folder, batch, 4, rounded=tile_scaled)
    assert_same_answers(run.rounds[0], wanted, tolerance=FP8_TOLERANCE)
    for other in (oracle(folder, batch, 4), generate_fp8(folder, batch, 4)):
        with pytest.raises(AssertionError):
            assert_same_answers(run.rounds[0], other, tolerance=FP8_TOLERANCE)
    wanted = generate_fp8(folder, long, 4, pieces=(152, 152), most_in_latent_space=8, rounded=tile_scaled)
    for answers in run.rounds[1:]:
        assert_same_answers(answers, wanted, tolerance=FP8_TOLERANCE)
    assert run.rounds[2][0]["cached"] == 304
    assert {call.split(":")[0] for call in run.calls} == {"cache_write", "cache_gather", "prefill", "decode"}


def refused(dtype=torch.bfloat16, prefill=None, **model) -> list[str]:
    """Reasons against a server with a tile-scaled cache."""
    from mla_backend.vllm_adapter.backend import refusals

    config = vllm_config(heads=4, prefill=prefill, **model)
    return refusals(config, dtype=dtype, kv_cache_dtype="fp8_ds_mla", page_size=64, use_mla=True)


def test_refusals_of_tile_scaled_rows():
    for fine in ((), (torch.float16,), (torch.bfloat16, "FLASH_ATTN"), (torch.float32, "CUSTOM")):
        assert refused(*fine) == []
    (reason,) = refused(kv_lora_rank=256, qk_rope_head_dim=32)
    assert "rows of latent 512 + rope 64 only, got 256 + 32; take --kv-cache-dtype fp8, or" in reason
    (reason,) = refused(torch.float16, "FLASH_ATTN")
    assert "in bfloat16 only, got torch.float16; leave out -ac.mla_prefill_backend FLASH_ATTN" in reason


@pytest.mark.parametrize(("name", "row"), [("fp8_ds_mla", 656), ("fp8", 576), ("auto", 576)])
def test_shapes_for_a_vllm_that_asks(name, row):
    """0.26 to 0.28; later ones made the tensors of the tests above themselves."""
    from mla_backend.vllm_adapter.backend import MLABackend

    assert MLABackend.get_kv_cache_shape(10, 64, 1, 576, cache_dtype_str=name) == (10, 64, row)


def test_scale_of_a_layer():
    """Our layer writes what vLLM hands over as bytes, with the scale of the call, and decodes with the layer's."""
    from mla_backend.vllm_adapter.impl import MLAImpl

    geometry = MLAGeometry(num_heads=3, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    layout = CacheLayout(geometry=geometry, format=format_of(torch.float8_e4m3fn), page_size=16)
    impl = object.__new__(MLAImpl)  # its __init__ wants an engine; the calls below want these three
    impl.attention = MLAAttention(
        Problem(layout=layout, dtype=torch.float32), Device("cpu"), MLABackendConfig(), scale=geometry.softmax_scale
    )
    impl.kv_lora_rank, impl._scratch_shapes = 128, ()
    q_latent, q_rope, rows, table, lens = make_decode(geometry, [40, 7]).arrays
    scale = torch.tensor(0.3)
    pool = torch.zeros(rows.shape, dtype=torch.uint8)
    latent, rope = rows.nan_to_num().flatten(0, 1).split([128, 32], -1)
    slots = torch.arange(len(latent))
    impl.do_kv_cache_update(latent, rope[:, None], pool, slots, "fp8", scale)
    wanted = torch.zeros(rows.shape, dtype=torch.float8_e4m3fn)
    reference.cache_write(latent, rope, wanted, slots, cache_scale=scale)
    assert torch.equal(pool, wanted.view(torch.uint8))
    step = DecodeStep(block_table_BM=table, seq_lens_B=lens, query_len=1)
    metadata, layer = SimpleNamespace(decode=SimpleNamespace(step=step)), SimpleNamespace(_k_scale=scale)
    out, _ = impl.forward_mqa((q_latent, q_rope), pool, metadata, layer)
    read = wanted.double() * scale
    expected, _ = reference.decode(q_latent.double(), q_rope.double(), read, table, lens, scale=geometry.softmax_scale)
    assert_matches("out", out, expected, TOLERANCE[torch.float32])
