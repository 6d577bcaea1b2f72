"""--enable-deterministic-inference: SGLang takes our backend in this mode, with its radix cache, and every request goes
through our decode in fixed splits.

SGLang's own operations of the mode (matrix products, mean, log-softmax) need an accelerator, so the real engine runs
without them here, against transformers; the bits that the mode promises are compared where they are ours.
"""

from types import SimpleNamespace

import pytest
import torch
from harness import assert_same_answers, prompts, run_sglang

from mla_backend.attention import MLAAttention
from mla_backend.config import MLABackendConfig
from mla_backend.steps import DecodeStep
from mla_kernels import CacheLayout, Device, MLAGeometry, Problem, format_of
from mla_kernels.testing import make_pool

pytest.importorskip("sglang")

GEOMETRY = MLAGeometry(num_heads=16, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
TOKENS, VERIFIED = 150, 4
DETERMINISTIC = {"enable_deterministic_inference": True}
WITHOUT_OPS = {"MLA_TEST_BATCH_INVARIANT_OPS": "0"}


def test_engine(tmp_path, checkpoints, oracle):
    """Prompts in one piece, in chunks and behind a cached prefix, of more tokens than a tile and than a split."""
    folder, batch = checkpoints(), prompts((5, 70, 300))
    longer = [p + q for p, q in zip(batch, prompts((40,) * 3, seed=1), strict=True)]
    options = {"chunked_prefill_size": 128, "page_size": 16, **DETERMINISTIC}
    run = run_sglang(tmp_path, folder, [batch, longer], env=WITHOUT_OPS, **options)
    assert "; batch invariant, in splits of 256 tokens" in run.log
    assert_same_answers(run.rounds[0], oracle(folder, batch))
    assert_same_answers(run.rounds[1], oracle(folder, longer))
    assert run.rounds[1][2]["cached"] > 256, "SGLang leaves its radix cache on"
    assert set(run.calls) == {"cache_write:torch_write", "decode:torch_decode"}


def test_another_backend_for_a_part_is_refused(tmp_path, checkpoints):
    options = {"decode_attention_backend": "torch_native", **DETERMINISTIC}
    run = run_sglang(tmp_path, checkpoints(), [prompts((5,))], env=WITHOUT_OPS, fails=True, **options)
    assert "it must do both prefill and decode: leave out --prefill-attention-backend" in run.log


@pytest.mark.parametrize(
    "arguments",
    [{"enable_deterministic_inference": True}, {"rl_on_policy_target": "fsdp"}],
    ids=lambda a: next(iter(a)),
)
def test_trees_are_refused(arguments):
    from mla_backend.sglang_adapter.problem import Facts, make_problem

    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["DeepseekV2ForCausalLM"]), context_len=1024)
    vars(model).update(kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)

    def problems(topk):
        return make_problem(
            Facts(
                model_config=model, arguments=SimpleNamespace(speculative_eagle_topk=topk, **arguments), is_mla=True,
                is_draft=False, dtype=torch.float32, kv_cache_dtype=torch.float32, page_size=1, device=Device("cpu"),
                heads=16, draft_tokens=VERIFIED,
            )
        )  # fmt: skip

    decode, extend = problems(1)
    assert decode == extend, "one kernel, one split"
    assert decode.split_tokens == 384
    with pytest.raises(ValueError, match="with --enable-deterministic-inference it needs --speculative-eagle-topk 1"):
        problems(2)


def test_extend_verify_and_decode_have_the_same_bits():
    from mla_backend.sglang_adapter.metadata import ExtendMetadata

    layout = CacheLayout(geometry=GEOMETRY, format=format_of(torch.float32), page_size=16)
    problem = Problem(layout=layout, dtype=torch.float32, max_query_len=16, split_tokens=64, max_seq_len=TOKENS)
    attention = MLAAttention(problem, Device("cpu"), MLABackendConfig(), scale=GEOMETRY.softmax_scale)
    g = torch.Generator().manual_seed(0)
    sequences = [torch.randn(TOKENS, GEOMETRY.latent_dim, generator=g) for _ in range(2)]
    queries = [torch.randn(TOKENS, GEOMETRY.num_heads, GEOMETRY.latent_dim, generator=g) for _ in range(2)]
    cache, table = make_pool(sequences, GEOMETRY.latent_dim, page_size=16, generator=g)

    def attend(step, *parts):
        """parts: (sequence, first query token, end) of each request. Returns the answers of the last."""
        q = torch.cat([queries[i][first:end] for i, first, end in parts]).split([128, 32], -1)
        return attention.decode(*q, cache, step)[0][-(parts[-1][2] - parts[-1][1]) :]

    def extend(*parts):
        new, old = [end - first for _, first, end in parts], [first for _, first, _ in parts]
        metadata = ExtendMetadata(
            problem=problem, query_lens=new, context_lens=old, block_table_BM=table[[i for i, *_ in parts]],
            query_start_B1=torch.tensor([0, *new]).cumsum(0).int(),
            seq_lens_B=torch.tensor([end for *_, end in parts], dtype=torch.int32), most_keys=64,
        )  # fmt: skip
        return attend(metadata.latent, *parts)

    def uniform(tokens, end):
        """Decode, or verification of a chain, beside another request."""
        lens = torch.tensor([TOKENS, end], dtype=torch.int32)
        step = DecodeStep(block_table_BM=table[[1, 0]], seq_lens_B=lens, query_len=tokens)
        return attend(step, (1, TOKENS - tokens, TOKENS), (0, end - tokens, end))

    whole = extend((0, 0, TOKENS))
    for chunk in (5, 64, 100):
        for first in range(0, TOKENS, chunk):
            end = min(first + chunk, TOKENS)
            assert torch.equal(extend((1, 3, 90), (0, first, end)), whole[first:end]), (chunk, first)
    for end in (4, 63, 64, 65, 129, TOKENS):
        assert torch.equal(uniform(1, end), whole[end - 1 : end]), end
        assert torch.equal(uniform(VERIFIED, end), whole[end - VERIFIED : end]), end
