"""SGLang's own attention tests (sglang.test.kits.attention_unittest), run against our backend by its name: every case
for MLA that runs without CUDA graphs. The kit compares with an attention of its own, on random locations of pages.

On a CPU our kernels in torch run, and with TRITON_INTERPRET=1 in the environment those in Triton.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as mla
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verify
from sglang.test.kits.attention_unittest.runner_modes import split_op_runner as split_op
from sglang_kit import KitTest

from mla_backend.sglang_adapter import NAME
from mla_kernels.device import default_place, device_of, interpreting

PLACE = default_place()
LATENT = 32 if device_of(PLACE).kind == "cpu" and not interpreting() else 128  # the kit's own; Triton's smallest
ROPES, LAYOUTS = (0, 16), ("contiguous", "shuffled_pages", "interleaved_pages")

attention = partial(mla.run_mla_attention_case, device=PLACE, dtype=torch.float32)


def cases():
    return [pytest.param(case, id=case.name) for case in mla.make_mla_cases(NAME)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("case", cases())
def test_attention(case, rope, layout):
    attention(KitTest(), case, kv_lora_rank=LATENT, qk_rope_head_dim=rope, loc_layout=layout)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("case", cases())
def test_attention_of_real_width(case, heads):
    """Also with the one head that tensor parallelism may leave to a rank."""
    attention(KitTest(), replace(case, num_heads=heads), kv_lora_rank=512, qk_rope_head_dim=64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", cases())
def test_fp8_cache(case, layout):
    """The kit's reference, which rounds nothing, gets keys as the cache holds them, with the tolerance of float32."""
    options = {"max_context_len": mla.DEFAULT_MAX_CONTEXT_LEN, "dtype": torch.float32, "device": PLACE}
    fixture = mla.build_mla_attention_fixture(
        KitTest(), case, kv_lora_rank=512, qk_rope_head_dim=64, fp8_kv_cache=True, loc_layout=layout, **options
    )
    assert fixture.runner.token_to_kv_pool.get_key_buffer(0).dtype == torch.float8_e4m3fn
    project = fixture.reference_module.project_latent_qk

    def rounded(hidden):
        q, k, q_rope, k_rope = project(hidden)
        return q, k.to(torch.float8_e4m3fn).float(), q_rope, k_rope.to(torch.float8_e4m3fn).float()

    fixture.reference_module.project_latent_qk = rounded
    actual = mla.run_mla_fixture_eager(fixture)
    torch.testing.assert_close(actual, mla.expected_mla_fixture_output(fixture), atol=1e-4, rtol=1e-4)


def test_scattered_new_tokens():
    """New tokens of a request lie anywhere. (With larger pages they cannot: whole pages are handed out.)"""
    case = replace(mla.make_mla_cases(NAME)[0], page_size=1, prefix_lens=(8, 13), extend_lens=(5, 3))
    attention(KitTest(), case, kv_lora_rank=LATENT, loc_layout="non_monotonic_extend")


@pytest.mark.parametrize(("draft_tokens", "topk"), [(3, 1), (5, 1), (3, 2)])
@pytest.mark.parametrize("page_size", [1, 16])
def test_verification_of_drafts(draft_tokens, topk, page_size):
    """Of a chain (topk 1) and of a tree, whose branches must not see one another."""
    case = mla.MLAAttentionCase(
        name="verify",
        backend=NAME,
        forward_mode=ForwardMode.TARGET_VERIFY,
        num_heads=4,
        page_size=page_size,
        prefix_lens=(4, 7, 33),
        extend_lens=(draft_tokens,) * 3,
    )
    verify.run_mla_eagle_verify_case(KitTest(), case, topk=topk, device=PLACE, dtype=torch.float32, kv_lora_rank=LATENT)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("breakable", [True, False])
@pytest.mark.parametrize("case", [one for one in cases() if not one.values[0].forward_mode.is_decode()])
def test_extend_between_pieces_of_a_graph(case, breakable, padding):
    """Attention of a prefill whose other layers are graphs for a larger number of tokens."""
    split_op.run_mla_split_op_extend_case(
        KitTest(),
        case,
        breakable=breakable,
        static_num_tokens=case.num_input_tokens + padding,
        device=PLACE,
        dtype=torch.float32,
        kv_lora_rank=LATENT,
    )
