"""Fixed splits on a GPU: the statements of test_invariance.py where matrix instructions compute, in bf16."""

from dataclasses import replace

import pytest
import torch
from invariance_cases import Decoder, differences

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, device_of, format_of, split_for
from mla_kernels.device import interpreting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a GPU, and no interpreter"),
]
NAMES = ("gluon_sm90", "triton_splitkv")
TOKENS = 2200


def decoder(name, *, heads=16, rope=64, page_size=64, dtype=torch.bfloat16, split_tokens=None):
    geometry = MLAGeometry(
        num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128
    )
    kernel = next(k for k in OPERATIONS["decode"] if k.name == name)
    layout = CacheLayout(geometry=geometry, format=format_of(dtype), page_size=page_size)
    if reasons := kernel.unsupported(Problem(layout=layout, dtype=dtype), device_of("cuda")):
        pytest.skip("; ".join(reasons))
    return Decoder(
        run=kernel.run, geometry=geometry, dtype=dtype, device="cuda", page_size=page_size,
        split_tokens=split_tokens or split_for(geometry),
    )  # fmt: skip


def edges(split: int, tokens: int) -> list[int]:
    """Positions around the first cuts, around tiles and blocks, and the last."""
    around = [p + d for p in (64, split, 2 * split) for d in (-1, 0, 1)]
    return sorted({0, 15, 16, *around, tokens - 2, tokens - 1} & set(range(tokens)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"heads": 128},
        {"heads": 5, "dtype": torch.float16},
        {"heads": 20, "page_size": 16},
        {"heads": 32, "rope": 0},
        {"heads": 40},
        {"page_size": 1},
        {"heads": 32, "page_size": 48},
        {"rope": 0, "page_size": 48},
        {"split_tokens": 64},
    ],
    ids=lambda case: ", ".join(f"{key} {value}" for key, value in case.items()) or "DeepSeek TP8",
)
def test_same_bits_in_every_way(name, case):
    decode = decoder(name, **case)
    # One call takes 8448 query rows at most.
    tokens = min(TOKENS, 8448 // decode.geometry.num_heads) if name == "gluon_sm90" else TOKENS // 2
    assert differences(decode, tokens, edges(decode.split_tokens, tokens)) == []


@pytest.mark.parametrize("name", NAMES)
def test_long_contexts(name):
    """One token and sixteen, alone and among many, behind contexts of many splits."""
    decode = decoder(name)
    subject = decode.sequence(40_000, 0)
    others = [decode.sequence(n, n) for n in (1, 700, 5000, 20_000)]
    wanted = decode((subject, 39_984, 40_000))[0]
    mixed = [(other, len(other.row_SK) - 1, len(other.row_SK)) for other in others] * 8
    for p in (39_984, 39_999):
        out, lse = decode(*mixed, (subject, p, p + 1), *mixed)[len(mixed)]
        assert torch.equal(out[0], wanted[0][p - 39_984])
        assert torch.equal(lse[0], wanted[1][p - 39_984])
    decode.check(subject, 39_999, 40_000, (out, lse))


@pytest.mark.parametrize("name", NAMES)
def test_turns_change_no_bit(name):
    """With scratch for little more than the longest request, so that a batch takes many turns in the same slots."""
    decode = decoder(name)
    sequences = [decode.sequence(n, n) for n in (900, 5, 3000, 384, 385, 20_000, 1, 7000)]
    members = [(one, len(one.row_SK) - 1, len(one.row_SK)) for one in sequences] * 4
    rows = 60 * decode.geometry.num_heads
    workspace = tuple(torch.full((n,), torch.nan, device="cuda") for n in (rows * 512, rows))
    for one, other in zip(decode(*members), replace(decode, workspace=workspace)(*members), strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_right(name):
    decode = decoder(name)
    subject, other = decode.sequence(2000, 0), decode.sequence(500, 1)
    members = [(other, 499, 500), (subject, 1900, 1970), (subject, 350, 400), (other, 0, 5), (subject, 0, 1)]
    for member, answer in zip(members, decode(*members), strict=True):
        decode.check(*member, answer)


@pytest.mark.parametrize("name", NAMES)
def test_without_fixed_splits_bits_differ(name):
    """So the tests above can fail."""
    decode = replace(decoder(name), split_tokens=None)
    assert differences(decode, 500, [100, 384, 499])
