"""Geometry and cache layout: the numbers, checked against ones worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels import FORMATS, CacheLayout, MLAGeometry, expanded_bytes_per_token, format_of
from mla_kernels.cache_layout import PackedRow, packed_row

DEEPSEEK_V3 = MLAGeometry(num_heads=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def layout(page_size=64, name="bf16", geometry=DEEPSEEK_V3):
    return CacheLayout(geometry=geometry, format=FORMATS[name], page_size=page_size)


def test_deepseek_v3_geometry():
    assert DEEPSEEK_V3.latent_dim == 576
    assert DEEPSEEK_V3.qk_head_dim == 192
    assert DEEPSEEK_V3.softmax_scale == pytest.approx(0.0721687836, abs=1e-10)  # 1 / sqrt(192), not 1 / sqrt(576)
    assert str(DEEPSEEK_V3) == "128 heads, latent 512 + rope 64, nope 128, v 128"


def test_geometry_without_rope():
    geometry = MLAGeometry(num_heads=1, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=0, v_head_dim=64)
    assert geometry.latent_dim == 128
    assert geometry.softmax_scale == 0.125


def test_impossible_geometry_names_every_wrong_number():
    with pytest.raises(ValueError, match="impossible MLA geometry") as error:
        MLAGeometry(num_heads=0, kv_lora_rank=-1, qk_nope_head_dim=128, qk_rope_head_dim=-64, v_head_dim=128)
    for reason in (
        "num_heads must be positive, got 0",
        "kv_lora_rank must be positive, got -1",
        "qk_rope_head_dim must be 0 or more, got -64",
    ):
        assert reason in str(error.value)
    assert "nope" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "row_bytes"), [("bf16", 1152), ("fp16", 1152), ("fp32", 2304), ("fp8", 576), ("fp8_ds_mla", 656)]
)
def test_deepseek_v3_bytes_a_token_and_layer(name, row_bytes):
    assert layout(name=name).row_bytes == row_bytes
    assert layout(64, name).page_bytes == 64 * row_bytes
    assert layout(64, name).shape(10) == (10, 64, 656 if name == "fp8_ds_mla" else 576)


def test_bytes_of_a_tile_scaled_row():
    """As vLLM's flashmla_sparse.py and FlashMLA document them: 512 codes, 4 scales, 64 bfloat16."""
    row = PackedRow(latent=512, rope=64)
    assert (row.scales_at, row.rope_at, row.bytes) == (512, 528, 656)
    assert layout(64).row_bytes / layout(64, "fp8_ds_mla").row_bytes == pytest.approx(1.756, abs=5e-4)


@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (128, 0), (256, 32), (1024, 2)])
def test_widths_of_a_tile_scaled_row_follow_from_its_bytes(latent, rope):
    row = PackedRow(latent=latent, rope=rope)
    assert packed_row(torch.empty(1, 1, row.bytes, dtype=torch.uint8), latent + rope) == row
    assert packed_row(torch.empty(1, 1, row.bytes, dtype=torch.float8_e4m3fn), latent + rope) is None


def test_widths_without_a_tile_scaled_row_are_refused():
    odd = MLAGeometry(num_heads=1, kv_lora_rank=320, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
    with pytest.raises(ValueError, match="multiples of 128 and an even rope, got 320 and 64"):
        layout(name="fp8_ds_mla", geometry=odd)
    assert not FORMATS["fp8_ds_mla"].holds(odd)
    assert FORMATS["fp8"].holds(odd)


def test_deepseek_v3_whole_model():
    """61 layers of 1152 bytes: 70 272 bytes a token, 128 Ki tokens in 9 GB."""
    assert layout(1).bytes_for(1, num_layers=61) == 70272
    assert layout(64).bytes_for(128 * 1024, num_layers=61) == 9_210_691_584
    assert layout(64).tokens_in(9_210_691_584, num_layers=61) == 128 * 1024


@pytest.mark.parametrize(
    ("kv_heads", "expected"),
    [
        (None, 81920),  # MHA: 128 heads x (192 + 128) values x 2 bytes
        (128, 81920),
        (8, 5120),  # GQA of 8 groups: 8 x 320 x 2
        (1, 640),  # MQA: 320 x 2
    ],
)
def test_expanded_cache_bytes(kv_heads, expected):
    assert expanded_bytes_per_token(DEEPSEEK_V3, torch.bfloat16, kv_heads=kv_heads) == expected


def test_mla_beside_expanded_heads():
    """71 times smaller than MHA of the same model, larger than MQA: the constant factor, both ways."""
    assert expanded_bytes_per_token(DEEPSEEK_V3, torch.bfloat16) / layout().row_bytes == pytest.approx(71.1, abs=0.05)
    assert layout().row_bytes > expanded_bytes_per_token(DEEPSEEK_V3, torch.bfloat16, kv_heads=1)


@pytest.mark.parametrize("kv_heads", [0, 129, -1])
def test_expanded_cache_refuses_impossible_heads(kv_heads):
    with pytest.raises(ValueError, match=f"1 to 128 .*got {kv_heads}"):
        expanded_bytes_per_token(DEEPSEEK_V3, torch.bfloat16, kv_heads=kv_heads)


layouts = st.builds(
    CacheLayout,
    geometry=st.builds(
        MLAGeometry,
        num_heads=st.integers(1, 128),
        kv_lora_rank=st.sampled_from([128, 256, 512]),
        qk_nope_head_dim=st.integers(64, 256),
        qk_rope_head_dim=st.sampled_from([0, 32, 64]),
        v_head_dim=st.integers(64, 256),
    ),
    format=st.sampled_from(list(FORMATS.values())),
    page_size=st.sampled_from([1, 16, 32, 64, 128]),
)
layers = st.integers(1, 61)


@given(layouts, st.integers(0, 10**6), layers)
def test_tokens_fit_in_the_bytes_they_need(layout, tokens, num_layers):
    need = layout.bytes_for(tokens, num_layers=num_layers)
    fit = layout.tokens_in(need, num_layers=num_layers)
    assert tokens <= fit < tokens + layout.page_size
    if tokens:
        assert layout.tokens_in(need - 1, num_layers=num_layers) < tokens


@given(layouts, st.integers(0, 10**12), layers)
def test_bytes_of_the_tokens_that_fit_are_within_budget(layout, num_bytes, num_layers):
    fit = layout.tokens_in(num_bytes, num_layers=num_layers)
    assert layout.bytes_for(fit, num_layers=num_layers) <= num_bytes
    assert layout.bytes_for(fit + 1, num_layers=num_layers) > num_bytes


@given(layouts, st.integers(0, 10**4), st.integers(0, 10**4), layers)
def test_cache_grows_linearly(layout, pages, more, num_layers):
    """MLA makes a row small, not constant: twice the tokens take twice the bytes."""

    def need(pages):
        return layout.bytes_for(pages * layout.page_size, num_layers=num_layers)

    assert need(pages) + need(more) == need(pages + more)
    assert need(pages) == pages * need(1)


@given(layouts)
def test_shape_and_bytes_agree(layout):
    cache = torch.empty(layout.shape(2), dtype=layout.format.dtype, device="meta")
    assert cache.numel() * cache.itemsize == 2 * layout.page_bytes
    layout.check(cache)


@pytest.mark.parametrize("name", FORMATS)
def test_format_of_finds_each_format(name):
    assert format_of(FORMATS[name].dtype) is FORMATS[name]


def test_format_of_names_what_there_is():
    with pytest.raises(ValueError, match=r"no latent cache format stores torch\.int8.*bf16.*fp16.*fp32"):
        format_of(torch.int8)


@pytest.mark.parametrize("page_size", [0, -16])
def test_page_size_must_hold_a_token(page_size):
    with pytest.raises(ValueError, match=f"1 token or more, got {page_size}"):
        layout(page_size)


def test_check_takes_pages_that_lie_apart():
    pool = torch.empty(4, 3, 16, 576, dtype=torch.bfloat16)
    layout(16).check(pool[:, 1])


def test_check_lists_all_reasons():
    cache = torch.empty(3, 576, 32).transpose(1, 2)[:, :, :500]
    with pytest.raises(ValueError, match="not a bf16 latent cache") as error:
        layout(16).check(cache)
    for reason in (
        "shape must be (pages, 16, 576), got (3, 32, 500)",
        "dtype must be torch.bfloat16, got torch.float32",
        "values of a row must be adjacent, got stride 32",
    ):
        assert reason in str(error.value)


@pytest.mark.parametrize("shape", [(), (576,), (16, 576), (2, 1, 16, 576)])
def test_check_refuses_other_ranks(shape):
    with pytest.raises(ValueError, match=r"shape must be \(pages, 16, 576\)"):
        layout(16).check(torch.empty(shape, dtype=torch.bfloat16))
