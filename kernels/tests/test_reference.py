"""The definition of correct against attention that nobody here wrote, and its edges."""

import math
from dataclasses import dataclass

import pytest
import torch

from mla_kernels import MLAGeometry, reference
from mla_kernels.testing import (
    Tolerance,
    assert_matches,
    make_decode,
    make_pool,
    make_prefill,
)

ABSORPTION = Tolerance(absolute=1e-10, relative=1e-10, cosine=1e-14)  # float64; absorbing reorders the sums
SMALL = MLAGeometry(num_heads=3, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
HIDDEN = 96


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """One sequence through a transformers module: what goes into attention and what comes out of the layer."""

    q_nope_TNP: torch.Tensor
    q_rope_TNR: torch.Tensor
    latent_TL: torch.Tensor
    k_rope_TR: torch.Tensor
    out_TH: torch.Tensor

    def __len__(self) -> int:
        return len(self.latent_TL)

    @property
    def q_TNQ(self) -> torch.Tensor:
        return torch.cat([self.q_nope_TNP, self.q_rope_TNR], -1)


def build_attention(arch: str, q_lora_rank: int | None, rope: str = "yarn"):
    """(attention module, rotary embedding, rotary function) of transformers, random float64 weights."""
    if arch == "v2":
        from transformers.models.deepseek_v2 import DeepseekV2Config as Config
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling
    else:
        from transformers.models.deepseek_v3 import DeepseekV3Config as Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling
    rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    if rope == "yarn":
        scaling = {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7}
        rope_parameters |= {"rope_type": "yarn", **scaling}
    config = Config(
        hidden_size=HIDDEN,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=SMALL.kv_lora_rank,
        qk_nope_head_dim=SMALL.qk_nope_head_dim,
        qk_rope_head_dim=SMALL.qk_rope_head_dim,
        v_head_dim=SMALL.v_head_dim,
        max_position_embeddings=256,
        rope_parameters=rope_parameters,
    )
    config._attn_implementation = "sdpa"  # "eager" rounds its softmax to float32
    torch.manual_seed(0)
    name = f"Deepseek{arch.upper()}"
    module = getattr(modeling, f"{name}Attention")(config, layer_idx=0).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    rotary = getattr(modeling, f"{name}RotaryEmbedding")(config)
    rotate = {"v2": "apply_rotary_emb", "v3": "apply_rotary_pos_emb_interleave"}[arch]
    return module, rotary, getattr(modeling, rotate)


@torch.no_grad()
def run_sequence(module, rotary, rotate, tokens: int) -> Sequence:
    hidden = torch.randn(1, tokens, HIDDEN, dtype=torch.float64)
    positions = rotary(hidden, torch.arange(tokens)[None])
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out, _ = module(hidden, position_embeddings=positions, attention_mask=mask)

    if module.q_lora_rank is None:
        q = module.q_proj(hidden)
    else:
        q = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
    q = q.view(1, tokens, SMALL.num_heads, -1).transpose(1, 2)
    q_nope, q_rope = q.split([SMALL.qk_nope_head_dim, SMALL.qk_rope_head_dim], -1)
    latent, k_rope = module.kv_a_proj_with_mqa(hidden).split([SMALL.kv_lora_rank, SMALL.qk_rope_head_dim], -1)
    angles = positions if isinstance(positions, tuple) else (positions,)
    q_rope, k_rope = rotate(q_rope, k_rope[:, None], *angles)
    return Sequence(
        q_nope_TNP=q_nope[0].transpose(0, 1),
        q_rope_TNR=q_rope[0].transpose(0, 1),
        latent_TL=module.kv_a_layernorm(latent)[0],
        k_rope_TR=k_rope[0, 0],
        out_TH=out[0],
    )


@pytest.fixture(scope="module", params=[("v2", None), ("v2", 24), ("v3", None), ("v3", 24)], ids=str)
def layer(request):
    """An attention module and three sequences that went through it."""
    parts = build_attention(*request.param)
    return parts[0], [run_sequence(*parts, tokens) for tokens in (37, 1, 10)]


def expand(module, latent_SL):
    """Keys (nope part) and values of every head: the up-projection that absorption avoids."""
    kv_SNX = module.kv_b_proj(latent_SL).view(len(latent_SL), SMALL.num_heads, -1)
    return kv_SNX.split([SMALL.qk_nope_head_dim, SMALL.v_head_dim], -1)


def over_heads(k_rope_SR):
    return k_rope_SR[:, None].expand(-1, SMALL.num_heads, -1)


def starts(*lens: int) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0)


def paged(sequences: list[Sequence], page_size: int):
    """The sequences' rows in shuffled pages of a pool, put there by reference.cache_write."""
    g = torch.Generator().manual_seed(1)
    rows = [torch.zeros(len(s), SMALL.latent_dim) for s in sequences]
    empty, table = make_pool(rows, SMALL.latent_dim, page_size=page_size, generator=g)
    cache = torch.full(empty.shape, torch.nan, dtype=torch.float64)
    for b, sequence in enumerate(sequences):
        token = torch.arange(len(sequence))
        slots = table[b, token // page_size] * page_size + token % page_size
        reference.cache_write(sequence.latent_TL, sequence.k_rope_TR, cache, slots)
    return cache, table


@torch.no_grad()
def test_prefill_equals_transformers(layer):
    module, sequences = layer
    k_nope, v = expand(module, torch.cat([s.latent_TL for s in sequences]))
    k_rope = over_heads(torch.cat([s.k_rope_TR for s in sequences]))
    start = starts(*map(len, sequences))
    out_TNV, _ = reference.prefill(
        torch.cat([s.q_TNQ for s in sequences]),
        k_nope,
        k_rope,
        v,
        start,
        start,
        max_query_len=37,
        scale=module.scaling,
        causal=True,
    )
    expected = torch.cat([s.out_TH for s in sequences])
    assert_matches("layer output", module.o_proj(out_TNV.flatten(1)), expected, ABSORPTION)


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [3, 1, 5], [37, 1, 10]], ids=str)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@torch.no_grad()
def test_absorbed_decode_equals_transformers(layer, query_lens, page_size):
    module, sequences = layer
    up_NXL = module.kv_b_proj.weight.view(SMALL.num_heads, -1, SMALL.kv_lora_rank)
    up_k_NPL, up_v_NVL = up_NXL.split([SMALL.qk_nope_head_dim, SMALL.v_head_dim], 1)
    cache, table = paged(sequences, page_size)
    pairs = list(zip(sequences, query_lens, strict=True))
    q_nope_TNP = torch.cat([s.q_nope_TNP[-n:] for s, n in pairs])
    out_TNL, _ = reference.decode(
        torch.einsum("tnp,npl->tnl", q_nope_TNP, up_k_NPL),
        torch.cat([s.q_rope_TNR[-n:] for s, n in pairs]),
        cache,
        table,
        torch.tensor([len(s) for s in sequences]),
        scale=module.scaling,
        query_len=max(query_lens),
        query_start_B1=starts(*query_lens),
    )
    out_TNV = torch.einsum("tnl,nvl->tnv", out_TNL, up_v_NVL)
    expected = torch.cat([s.out_TH[-n:] for s, n in pairs])
    assert_matches("layer output", module.o_proj(out_TNV.flatten(1)), expected, ABSORPTION)


@torch.no_grad()
def test_context_chunks_merged_equal_transformers(layer):
    """20 cached tokens, read in chunks of 12 and 8, and 17 new ones: as an engine prefills a long prompt in parts."""
    module, sequences = layer
    sequence, old = sequences[0], 20
    cache, table = paged([sequence], page_size=4)
    q_TNQ, new = sequence.q_TNQ[old:], len(sequence) - old

    def attend(latent_SL, k_rope_SR, causal):
        k_nope, v = expand(module, latent_SL)
        ends = starts(new), starts(len(latent_SL))
        options = {"max_query_len": new, "scale": module.scaling, "causal": causal}
        return reference.prefill(q_TNQ, k_nope, over_heads(k_rope_SR), v, *ends, **options)

    out, lse = attend(sequence.latent_TL[old:], sequence.k_rope_TR[old:], causal=True)
    for first, count in ((0, 12), (12, 8)):
        rows = torch.empty(count, SMALL.latent_dim, dtype=torch.float64)
        reference.cache_gather(cache, table, torch.tensor([first]), starts(count), rows, max_key_len=count)
        reference.merge(out, lse, *attend(*rows.split([SMALL.kv_lora_rank, SMALL.qk_rope_head_dim], -1), causal=False))
    assert_matches("layer output", module.o_proj(out.flatten(1)), sequence.out_TH[old:], ABSORPTION)
    _, whole_lse = attend(sequence.latent_TL, sequence.k_rope_TR, causal=True)
    assert_matches("lse", lse, whole_lse, ABSORPTION)


@pytest.mark.parametrize("arch", ["v2", "v3"])
def test_softmax_scale_is_the_models(arch):
    plain, *_ = build_attention(arch, None, rope="default")
    assert math.isclose(plain.scaling, SMALL.softmax_scale)
    yarn, *_ = build_attention(arch, None)
    assert yarn.scaling > plain.scaling * 1.1, "YaRN multiplies the scale: engines must hand it to the kernels"


def test_empty_request_gives_zeros_and_minus_infinity():
    case = make_decode(SMALL, [7, 0, 3], query_lens=[1, 2, 0])
    out, lse = case.reference()
    assert out[1:].eq(0).all()
    assert lse[1:].eq(-torch.inf).all()
    assert lse[0].isfinite().all()
    out, lse = make_prefill(SMALL, [4, 2], [4, 0], causal=False).reference()
    assert out[4:].eq(0).all()
    assert lse[4:].eq(-torch.inf).all()


def test_query_that_sees_no_key_gives_zeros_and_minus_infinity():
    out, lse = make_decode(SMALL, [2], query_lens=5).reference()  # token i of 5 sees keys 0 .. 2 - 5 + i
    assert lse.eq(-torch.inf).all(1).tolist() == [True, True, True, False, False]
    assert out[:3].eq(0).all()
    out, lse = make_prefill(SMALL, [3], [1]).reference()
    assert lse.eq(-torch.inf).all(1).tolist() == [True, True, False]
    assert out[:2].eq(0).all()


def test_rows_behind_the_last_request_are_zeros_and_minus_infinity():
    """CUDA graphs pad the batch: more query rows than requests own."""
    case = make_decode(SMALL, [5, 6], query_lens=[1, 2])
    q_latent, q_rope, *rest = case.arrays
    padded = [torch.cat([q, torch.full_like(q[:2], torch.nan)]) for q in (q_latent, q_rope)]
    out, lse = reference.decode(*padded, *rest, **case.options)
    assert out[3:].eq(0).all()
    assert lse[3:].eq(-torch.inf).all()


def test_ragged_equals_uniform_when_lengths_are_equal():
    uniform, ragged = (make_decode(SMALL, [9, 30, 2], query_lens=lens) for lens in (2, [2, 2, 2]))
    assert "query_start_B1" in ragged.options
    for one, other in zip(uniform.reference(), ragged.reference(), strict=True):
        assert torch.equal(one, other)


def test_decode_is_one_key_head_attention():
    """The absorbed form is plain attention whose keys are whole rows and whose values are their latents."""
    case = make_decode(SMALL, [20], query_lens=20, page_size=4)
    q_latent, q_rope, cache, table, _ = (x.double() if x.is_floating_point() else x for x in case.arrays)
    row = cache[table[0, :5].long()].flatten(0, 1)[None].expand(SMALL.num_heads, -1, -1)
    q = torch.cat([q_latent, q_rope], -1).transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, row, row[..., : SMALL.kv_lora_rank], is_causal=True, scale=case.options["scale"]
    )
    assert_matches("out", case.reference()[0], expected.transpose(0, 1), ABSORPTION)


def test_lse_is_natural_and_float32():
    case = make_decode(SMALL, [6], dtype=torch.bfloat16)
    q_latent, q_rope, cache, table, seq_lens = case.arrays
    _, lse = reference.decode(torch.zeros_like(q_latent), torch.zeros_like(q_rope), cache, table, seq_lens, scale=1.0)
    assert lse.dtype == torch.float32
    assert torch.allclose(lse, torch.tensor(6.0).log())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 7.0])
def test_merge_with_an_empty_part_changes_nothing(poison):
    out, lse = make_decode(SMALL, [6, 0]).reference()
    expected = out.clone(), lse.clone()
    reference.merge(out, lse, torch.full_like(out, poison), torch.full_like(lse, -torch.inf))
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_merge_into_nothing_takes_the_part():
    part, part_lse = make_decode(SMALL, [6, 0]).reference()
    out, lse = torch.full_like(part, torch.nan), torch.full_like(part_lse, -torch.inf)
    reference.merge(out, lse, part, part_lse)
    assert torch.equal(out, part)
    assert torch.equal(lse, part_lse)


def test_cache_write_skips_slots_outside_the_pool():
    cache = torch.zeros(2, 4, SMALL.latent_dim)
    latent, rope = torch.ones(4, SMALL.kv_lora_rank), torch.full((4, SMALL.qk_rope_head_dim), 2.0)
    reference.cache_write(latent, rope, cache, torch.tensor([5, -1, 8, 0]))
    written = cache.flatten(0, 1).ne(0).any(1)
    assert written.nonzero().flatten().tolist() == [0, 5]
    assert cache[1, 1].tolist() == [1.0] * SMALL.kv_lora_rank + [2.0] * SMALL.qk_rope_head_dim


def test_cache_gather_converts_and_leaves_other_rows():
    case = make_decode(SMALL, [20, 9], page_size=4, dtype=torch.float16)
    _, _, cache, table, _ = case.arrays
    out = torch.full((8, SMALL.latent_dim), -1.0)
    reference.cache_gather(cache, table, torch.tensor([3, 0]), torch.tensor([1, 6, 7]), out, max_key_len=5)
    first = cache[table[0, :2].long()].flatten(0, 1)[3:8]
    assert torch.equal(out[1:6], first.float())
    assert torch.equal(out[6], cache[table[1, 0], 0].float())
    assert out[[0, 7]].eq(-1).all()
