"""Keys of a prefill in pieces: into how many, what that takes, and `merge_pieces` against the float64 reference."""

import random

import pytest
import torch
from hopper_devices import H200

from mla_kernels import OPERATIONS, CacheLayout, MLAGeometry, Problem, format_of, reference, tensor_bytes
from mla_kernels.device import interpreting
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

pytest.importorskip("triton")
KERNEL = next(k for k in OPERATIONS["prefill"] if k.name == "gluon_sm90_ragged")
WHERE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
NEEDS_TRITON = pytest.mark.skipif(WHERE == "cpu" and not interpreting(), reason="needs a GPU (or TRITON_INTERPRET=1)")
BEFORE, AFTER = 2, 3  # rows of nobody


def problem_of(heads: int, v: int = 128) -> Problem:
    geometry = MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=v)
    return Problem(
        layout=CacheLayout(geometry=geometry, format=format_of(torch.bfloat16), page_size=64), dtype=torch.bfloat16
    )


def make(pieces: int, tokens: int, heads: int, v: int, dtype):
    """(values, LSE) of pieces, of which some rows see nothing and some are hopelessly far from others, and of an answer
    so far, with NaN where it has seen nothing."""
    g = torch.Generator().manual_seed(pieces * tokens)
    shape = (pieces + 1, tokens, heads)
    lse = torch.randn(shape, generator=g) * 10.0 ** torch.randint(0, 3, shape, generator=g)
    lse[torch.rand(shape, generator=g) < 0.3] = -torch.inf
    lse[:, 0] = -torch.inf  # a token that sees nothing anywhere
    lse[:-1, 1] = -torch.inf  # one that has seen something before
    values = torch.randn(*shape, v, generator=g)
    values[:-1][lse[:-1] == -torch.inf] = 0.0
    values[-1][lse[-1] == -torch.inf] = torch.nan
    return values[:-1], lse[:-1], values[-1].to(dtype), lse[-1]


def merge_pieces(parts, part_lse, out, lse, *, tokens, accumulate):
    """The answer, in memory where what is written beside it shows, and rows of scratch that nobody owns hold NaN."""
    from mla_kernels.prefill_pieces import merge_pieces, shapes

    pieces, _, heads, v = parts.shape
    rows = BEFORE + tokens + AFTER
    mine = slice(BEFORE, BEFORE + tokens)
    wide = torch.full((rows, heads + 1, v + 16), torch.nan, dtype=out.dtype, device=WHERE)
    into, into_lse = wide[:, :heads, :v], torch.full((heads, rows + 1), torch.nan, device=WHERE).T[:rows]
    into[mine], into_lse[mine] = (out.to(WHERE), lse.to(WHERE)) if accumulate else (torch.nan, torch.nan)
    scratch = [torch.full(*shape, device=WHERE) for shape in _filled(shapes(pieces, rows, heads, v))]
    for flat, part in zip(scratch, (parts, part_lse), strict=True):
        flat.view(pieces, rows, *flat.shape[1:])[:, mine] = part.to(WHERE)
    starts = torch.tensor([BEFORE, BEFORE, BEFORE + tokens], dtype=torch.int32, device=WHERE)
    merge_pieces(into, into_lse, *scratch, starts, pieces=pieces, accumulate=accumulate, overlap=False)
    assert int(wide.isnan().sum()) == wide.numel() - into[mine].numel(), "wrote beside the output, or NaN"
    assert into_lse[:BEFORE].isnan().all()
    assert into_lse[mine.stop :].isnan().all()
    return into[mine].clone(), into_lse[mine].clone()


def _filled(shapes):
    assert all(dtype == torch.float32 for _, dtype in shapes)
    return [(shape, torch.nan) for shape, _ in shapes]


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "accumulated"])
@pytest.mark.parametrize(
    ("pieces", "tokens", "heads", "v"), [(2, 9, 3, 128), (3, 7, 1, 64), (4, 2, 16, 256), (13, 6, 2, 128)]
)
def test_pieces_are_merged(pieces, tokens, heads, v, accumulate, dtype):
    parts, part_lse, out, lse = make(pieces, tokens, heads, v, dtype)
    expected, expected_lse = torch.zeros_like(out).double(), torch.full_like(lse, -torch.inf).double()
    if accumulate:
        expected, expected_lse = out.double(), lse.double()
    for part in zip(parts.double(), part_lse.double(), strict=True):
        expected, expected_lse = reference.merge(expected, expected_lse, *part)
    got, got_lse = merge_pieces(parts, part_lse, out, lse, tokens=tokens, accumulate=accumulate)
    assert_matches("lse", got_lse, expected_lse, LSE_TOLERANCE)
    assert_matches("out", got, expected, TOLERANCE[dtype], torch.full_like(expected, 4.0))  # of about unit size


@pytest.mark.parametrize(
    ("heads", "tokens", "keys", "pieces"),
    [
        (16, 512, 16384, 2),
        (16, 128, 16384, 8),
        (16, 64, 65536, 8),
        (8, 512, 16384, 4),
        (16, 1024, 1024, 1),  # 128 tiles for 132 multiprocessors
        (16, 512, 512, 1),  # pieces would be too small
        (4, 2048, 2048, 2),
        (128, 1, 131072, 1),
        (1, 1, 131072, 128),
    ],
)
def test_how_many(heads, tokens, keys, pieces):
    from mla_kernels.prefill_pieces import pieces_of

    assert pieces_of(KERNEL.load()._most_tiles(tokens, 1, heads), keys, H200.num_sms) == pieces


def test_every_tile_has_a_program_however_requests_divide_the_tokens():
    rng = random.Random(0)
    for _ in range(500):
        lens = [rng.choice([0, 1, 127, 128, 129, rng.randrange(900)]) for _ in range(rng.randrange(1, 9))]
        tiles = sum(-(-n // 128) for n in lens)
        most = KERNEL.load()._most_tiles(sum(lens) + rng.randrange(3), len(lens), 5)
        assert 5 * tiles <= most
    assert KERNEL.load()._most_tiles(130, 2, 1) == 3  # 1 and 129
    assert KERNEL.load()._most_tiles(2, 100, 1) == 2


@pytest.mark.parametrize("v", [64, 256])
def test_scratch_is_never_more_than_was_said(v):
    from mla_kernels.prefill_pieces import pieces_of, shapes

    most = 0
    for heads in (1, 5, 16, 66):
        said = KERNEL.load().step_bytes(problem_of(heads, v), H200, tokens=8192, keys=131072)
        for tokens, requests, keys in [
            (1, 1, 9000),
            (200, 7, 16384),
            (512, 1, 16384),
            (8192, 1, 131072),
            (70, 70, 5000),
        ]:
            pieces = pieces_of(KERNEL.load()._most_tiles(tokens, requests, heads), keys, H200.num_sms)
            taken = sum(tensor_bytes(*shape) for shape in shapes(pieces, tokens, heads, v)) if pieces > 1 else 0
            assert taken <= said
            most = max(most, taken / said)
    assert most > 0.9
    assert said == 132 * 128 * (v + 1) * 4


def test_none_is_said_where_nothing_is_cut():
    bytes_of = KERNEL.load().step_bytes
    assert bytes_of(problem_of(67), H200, tokens=8192, keys=131072) == 0
    assert bytes_of(problem_of(16), H200, tokens=8192, keys=2047) == 0
    assert bytes_of(problem_of(16), H200, tokens=0, keys=131072) == 0


@pytest.mark.parametrize(
    ("heads", "own_keys", "cut"),
    [(16, False, True), (67, False, False), (16, True, False), (4, True, True), (5, True, False)],
)
def test_forms_that_can_come(heads, own_keys, cut):
    """New tokens of a prompt see each other: with many heads, those that are enough to be cut fill the GPU."""
    forms = KERNEL.load().variants(problem_of(heads), H200, own_keys=own_keys)
    assert forms == [{}, {"pieces": 2}][: 1 + cut]
