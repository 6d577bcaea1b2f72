"""The cases of SGLang's kit that need a GPU: CUDA graphs of decode, of verification and of draft models."""

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention as mla
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as decode
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_extend_runner as draft_extend
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_runner as draft
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verify
from sglang_kit import KitTest

from mla_backend.sglang_adapter import NAME

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
WIDTHS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "dtype": torch.bfloat16}
PAGES = pytest.mark.parametrize("page_size", [1, 16, 64])
DRAFT_TOKENS = 3  # trees of the kit have no other size


def case(mode: ForwardMode, page_size: int, extend_lens=(), prefix_lens=(4, 7, 12)) -> mla.MLAAttentionCase:
    return mla.MLAAttentionCase(
        name=mode.name.lower(),
        backend=NAME,
        forward_mode=mode,
        num_heads=16,
        page_size=page_size,
        prefix_lens=prefix_lens,
        extend_lens=extend_lens,
    )


def one_page(page_size: int) -> tuple[int, ...]:
    """Prefixes that a page holds: these cases of the kit write longer ones where nobody reads them, and then SGLang's
    own backends fail as ours does (seen with pages of one token, 0.5.17)."""
    return tuple(min(length, page_size) for length in (4, 7, 12))


@PAGES
def test_decode(page_size):
    decode.run_mla_cuda_graph_decode_case(KitTest(), case(ForwardMode.DECODE, page_size), **WIDTHS)


@PAGES
@pytest.mark.parametrize("topk", [1, 2])
def test_verification(page_size, topk):
    verify.run_mla_eagle_verify_cuda_graph_case(
        KitTest(),
        case(ForwardMode.TARGET_VERIFY, page_size, (DRAFT_TOKENS,) * 3, one_page(page_size)),
        topk=topk,
        **WIDTHS,
    )


@PAGES
def test_draft_extend(page_size):
    asked = case(ForwardMode.DRAFT_EXTEND_V2, page_size, (DRAFT_TOKENS,) * 3)
    draft_extend.run_mla_draft_extend_v2_cuda_graph_case(KitTest(), asked, **WIDTHS)
    draft_extend.run_mla_eagle_draft_extend_v2_cuda_graph_runner_case(KitTest(), asked, **WIDTHS)


@pytest.mark.parametrize(("page_size", "topk"), [(1, 1), (16, 1), (64, 1), (1, 2)])
def test_draft_steps(page_size, topk):
    """In float32: the kit compares the tokens that are drafted, which in bfloat16 are near-ties of random weights, with
    SGLang's triton backend as with ours."""
    exact = {**WIDTHS, "dtype": torch.float32}
    draft.run_mla_eagle_draft_cuda_graph_runner_case(
        KitTest(), case(ForwardMode.DECODE, page_size, prefix_lens=one_page(page_size)[:2]), topk=topk, **exact
    )
