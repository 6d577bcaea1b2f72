"""Merging the partial answers of requests that were cut: `merge_parts` against the float64 reference."""

import sys
from itertools import pairwise

import pytest
import torch

from mla_kernels import reference
from mla_kernels.device import interpreting
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

pytest.importorskip("triton")
WHERE = "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"
pytestmark = pytest.mark.skipif(WHERE == "cpu" and not interpreting(), reason="needs a GPU (or TRITON_INTERPRET=1)")
HEADS = 2


def cut(pieces: list[int], tokens: list[int], latent: int, dead=()):
    """Scratch as a decode kernel leaves it, with NaN and floats' bits where nobody wrote: (values, base-2 LSE, plan,
    parts), and what each cut request's pieces hold.

    pieces, tokens: of each request; one piece is no cut.  dead: requests of which no piece sees a key.
    """
    generator = torch.Generator().manual_seed(0)
    parts = 3 + sum(pieces)
    values = torch.full((2 * parts, max(tokens) * HEADS, latent), torch.nan)
    lse = torch.full(values.shape[:2], torch.nan)
    plan = torch.rand(parts + 1, 4, generator=generator).add(2).view(torch.int32)  # floats that others left there
    held = {}
    part = 3  # what parts before it do is not cut
    for request, count in enumerate(pieces):
        if count == 1:
            continue
        plan[1 + len(held), :3] = torch.tensor([request, part, count])
        slots = [2 * part + 1, *(2 * (part + k) for k in range(1, count))]
        shape = (count, tokens[request] * HEADS)
        apart = 10.0 ** torch.randint(0, 3, shape, generator=generator)
        unseen = torch.rand(shape, generator=generator) < (2 if request in dead else 0.2)  # by a query before the piece
        piece_lse = (torch.randn(shape, generator=generator) * apart).masked_fill(unseen, -torch.inf)
        piece = torch.randn(*shape, latent, generator=generator).masked_fill(unseen[..., None], 0.0)
        values[slots, : shape[1]], lse[slots, : shape[1]] = piece, piece_lse
        held[request] = piece, piece_lse
        part += count - 1  # the next may begin in the part in which this one ends
    plan[0, 0] = len(held)
    return (values, lse, plan, parts), held


def merged(values, lse):
    """(out [t, N, L], natural LSE [t, N]) of one request's pieces, in float64."""
    values, lse = (x.double().unflatten(1, (-1, HEADS)) for x in (values, lse))
    out, total = torch.zeros_like(values[0]), torch.full_like(lse[0], -torch.inf)
    for part, part_lse in zip(values, lse * torch.tensor(2.0).double().log(), strict=True):
        reference.merge(out, total, part, part_lse)
    return out, total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("latent", "num_sms"), [(64, 132), (128, 1)], ids=["a-task-each", "taking-turns"])
@pytest.mark.parametrize(
    ("pieces", "tokens", "dead"),
    [
        ([1, 1], [8, 8], ()),
        ([2], [1], ()),
        ([130], [1], ()),
        ([1, 2, 1, 3, 2, 1], [2] * 6, ()),
        ([3, 2], [3, 3], (0,)),
        ([2, 1, 1, 300, 2], [1, 4, 0, 3, 2], ()),
        ([70], [40], ()),
    ],
    ids=["nothing-cut", "2-pieces", "130-pieces", "several", "sees-nothing", "ragged", "many-rows-of-many-pieces"],
)
def test_cut_requests_are_merged(pieces, tokens, dead, latent, num_sms, dtype):
    from mla_kernels.split_merge import merge_parts, plan_size

    (values, lse, plan, parts), held = cut(pieces, tokens, latent, dead)
    assert plan.numel() == plan_size(parts)
    starts = torch.tensor([0, *tokens]).cumsum(0).to(torch.int32)
    total = sum(tokens)
    # Engines hand over slices, and an LSE with heads first.
    out = torch.full((total, HEADS + 1, latent + 8), torch.nan, dtype=dtype, device=WHERE)[:, :HEADS, :latent]
    out_lse = torch.full((HEADS, total + 3), torch.nan, device=WHERE).T[:total]
    merge_parts(
        out, out_lse, *(x.flatten().to(WHERE) for x in (values, lse, plan)),
        starts.to(WHERE) if len(set(tokens)) > 1 else None,
        query_len=max(tokens), rows=max(tokens) * HEADS, requests=len(pieces), parts=parts, num_sms=num_sms,
        overlap=False,
    )  # fmt: skip
    for request, (begin, end) in enumerate(pairwise(starts.tolist())):
        got, got_lse = out[begin:end], out_lse[begin:end]
        if request not in held:
            assert got.isnan().all(), "the answer of a request that was not cut is there already"
            assert got_lse.isnan().all()
            continue
        expected, expected_lse = merged(*held[request])
        assert_matches("lse", got_lse, expected_lse, LSE_TOLERANCE)
        assert_matches("out", got, expected, TOLERANCE[dtype])


def test_every_tile_is_tested():
    """Of the forms that `merge_form` has, each by one of the cases above (requests, parts, rows)."""
    from mla_kernels.split_merge import merge_form

    cases = {"130-pieces": (1, 133, 2), "2-pieces": (1, 5, 2), "many-rows-of-many-pieces": (1, 73, 80)}
    assert {merge_form(*case) for case in cases.values()} == {(128, 1, 64), (8, 2, 512), (32, 1, 256)}
    chosen = {merge_form(b, p, r) for b in (1, 3, 16, 200) for p in (1, 7, 66, 132) for r in (1, 16, 128, 8448)}
    assert chosen <= {(128, 1, 64), (8, 2, 512), (32, 1, 256)}


def test_tokens_that_were_not_announced_are_not_merged(monkeypatch):
    """A ragged request with more query tokens than `query_len`: its scratch holds those of others behind its own. Three
    heads, so that a tile of two rows reaches behind the last."""
    from mla_kernels.split_merge import merge_parts

    monkeypatch.setattr(sys.modules[__name__], "HEADS", 3)
    (values, lse, plan, parts), _ = cut([2, 2], [1, 1], 64)
    starts = torch.tensor([0, 3, 4], dtype=torch.int32, device=WHERE)
    out = torch.full((4, HEADS, 64), torch.nan, device=WHERE)
    out_lse = torch.full((4, HEADS), torch.nan, device=WHERE)
    merge_parts(
        out, out_lse, *(x.flatten().to(WHERE) for x in (values, lse, plan)), starts,
        query_len=1, rows=HEADS, requests=2, parts=parts, num_sms=1, overlap=False,
    )  # fmt: skip
    assert not out[0].isnan().any()
    assert out[1:3].isnan().all()
    assert not out[3].isnan().any()
