"""How a batch's cache is cut over the GPU: a model in Python of `share` and `piece` of mla_kernels/schedule.py.

It says what the schedule is and shows that the schedule is right; that the kernel follows it is for the GPU tests.

All requests' blocks of 64 tokens lie in a row. Part p takes blocks p * size .. (p + 1) * size - 1, so that it works on
the end of one request, some whole ones, and the beginning of another, and a long request spans many parts. A request of
which a part has only a piece leaves a partial answer in a slot: each part has two, 2 p for the piece that begins inside
a request, 2 p + 1 for the one that begins a request and ends inside. split_merge.py merges them.
"""

from itertools import accumulate
from typing import NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

BLOCK = 64
TRIES = 8


def cost_of(seq_len: int, query_tokens: int) -> int:
    """Blocks of a request. Without keys somebody must still write its zeros; without queries there is nothing to do."""
    return max(-(-seq_len // BLOCK), 1) if query_tokens else 0


def spans(costs: list[int]) -> list[tuple[int, int]]:
    """Where each request's blocks begin and end in the row of all."""
    return [(end - cost, end) for cost, end in zip(costs, accumulate(costs), strict=True)]


def cuts_of(costs: list[int], size: int) -> list[bool]:
    """Which requests are cut if every part takes `size` blocks."""
    return [begin // size < (end - 1) // size for begin, end in spans(costs)]


def size_of(costs: list[int], parts: int) -> int:
    """Blocks of a part: as few as will do, or a little more where that saves cuts. A cut costs about two blocks."""
    size = max(-(-sum(costs) // parts), 1)
    if size < 16:
        return size
    tries = [size + k * max(size // 32, 1) for k in range(TRIES)]
    return min(tries, key=lambda s: (s * 1024 + sum(cuts_of(costs, s)) * 2048 // parts, s))


class Share(NamedTuple):
    """What one part works on; no work if the last request is before the first."""

    first_request: int
    first_block: int  # of the first request
    last_request: int
    end_block: int  # of the last request
    pieces: int  # of the last request if it begins here and goes on in other parts, else 0
    cuts: int  # cut requests of the batch
    cuts_before: int  # those before the last request


def share_of(costs: list[int], part: int, parts: int) -> Share:
    size, total, where = size_of(costs, parts), sum(costs), spans(costs)
    cut = cuts_of(costs, size)
    begin_of_part, end_of_part = part * size, min((part + 1) * size, total)
    first = sum(end <= begin_of_part for _, end in where)
    last = sum(end < end_of_part for _, end in where)
    first_block = begin_of_part - sum(costs[:first])
    end_block = end_of_part - sum(costs[:last])
    if begin_of_part >= total:
        return Share(first, first_block, first - 1, end_block, 0, sum(cut), sum(cut[:last]))
    begin, end = where[last]
    begins_here_and_goes_on = begin >= begin_of_part and end > end_of_part
    pieces = (end - 1) // size - part + 1 if begins_here_and_goes_on else 0
    return Share(first, first_block, last, end_block, pieces, sum(cut), sum(cut[:last]))


def pieces_of(costs: list[int], part: int, share: Share):
    """(request, first block, end block, slot of the partial answer or -1) of everything that a part does."""
    for request in range(share.first_request, share.last_request + 1):
        if costs[request]:
            begin = share.first_block if request == share.first_request else 0
            end = share.end_block if request == share.last_request else costs[request]
            yield request, begin, end, 2 * part if begin else 2 * part + 1 if end < costs[request] else -1


def slots_merged(part: int, pieces: int) -> list[int]:
    """Where `_merge_kernel` looks for the pieces of a request whose plan entry is (request, part, pieces)."""
    return [2 * part + 1, *(2 * (part + k) for k in range(1, pieces))]


blocks = st.one_of(st.integers(0, 2), st.integers(0, 100), st.integers(0, 5000))
requests = st.tuples(blocks.flatmap(lambda n: st.integers(max(n - 1, 0) * BLOCK, n * BLOCK)), st.integers(0, 2))


@given(st.lists(requests, min_size=1, max_size=60), st.sampled_from([1, 2, 7, 33, 66, 132]))
@example([(0, 1)], 132)
@example([(0, 0), (9, 0)], 2)
@example([(64 * 132, 1)], 132)
@example([(1, 0), (64 * 20, 1), (5, 0), (64 * 12, 1), (7, 0)], 2)
@example([(1_000_000, 1), *[(1, 1)] * 40], 132)
@settings(max_examples=500, deadline=None)
def test_every_block_is_done_once_and_every_piece_is_merged(batch, parts):
    costs = [cost_of(*request) for request in batch]
    done = {request: [] for request, cost in enumerate(costs) if cost}
    plan = {}
    for part in range(parts):
        share = share_of(costs, part, parts)
        for request, begin, end, slot in pieces_of(costs, part, share):
            assert 0 <= begin < end <= costs[request]
            done[request].append((begin, end, slot))
        if share.pieces:
            assert share.cuts_before not in plan
            plan[share.cuts_before] = (share.last_request, part, share.pieces)

    used = [slot for pieces in done.values() for *_, slot in pieces if slot >= 0]
    assert len(used) == len(set(used))
    assert all(slot < 2 * parts for slot in used)
    assert sorted(plan) == list(range(share.cuts)), "plan[0] entries without gaps"
    merged = {request: slots_merged(part, pieces) for request, part, pieces in plan.values()}
    for request, pieces in done.items():
        assert [begin for begin, _, _ in pieces] == [0, *(end for _, end, _ in pieces[:-1])]
        assert pieces[-1][1] == costs[request]
        assert merged.get(request, [-1]) == [slot for *_, slot in pieces]
    assert set(merged) <= set(done)


@given(st.lists(blocks, min_size=1, max_size=60), st.sampled_from([1, 7, 132]))
def test_saving_cuts_never_costs_much(costs, parts):
    """The largest try is 7 steps of a 32nd, or of one block where that is more, above the least size that will do."""
    least = max(-(-sum(costs) // parts), 1)
    assert least <= size_of(costs, parts) <= least + (TRIES - 1) * max(least // 32, 1)
