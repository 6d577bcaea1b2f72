"""How a batch's cache is cut over the GPU: a model in Python of `share` and `piece` of mla_kernels/schedule.py, and
what `share_splits` promises.

It says what the schedule is and shows that the schedule is right, and that the text of `share` follows it.

All requests' blocks of 64 tokens lie in a row, with room between them for what a piece takes beside its blocks. Part p
takes p * size .. (p + 1) * size - 1 of it, so that it works on the end of one request, some whole ones, and the
beginning of another, and a long request spans many parts. A request of which a part has only
a piece leaves a partial answer in a slot: each part has two, 2 p for the piece that begins inside a request, 2 p + 1
for the one that begins a request and ends inside. split_merge.py merges them.
"""

import math
from itertools import accumulate
from typing import NamedTuple

import gluon_emulator
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

(SCHEDULE,) = gluon_emulator.emulated("mla_kernels.hopper", "mla_kernels.schedule")[1:]

BLOCK = 64


def cost_of(seq_len: int, query_tokens: int) -> int:
    """Blocks of a request. Without keys somebody must still write its zeros; without queries there is nothing to do."""
    return max(-(-seq_len // BLOCK), 1) if query_tokens else 0


def is_uniform(costs: list[int]) -> bool:
    return sum(costs) == len(costs) * max(1, *costs)


def size_of(costs: list[int], parts: int, rows: int, room: int = 0) -> int:
    """Blocks of a part: an even share, so many that partial answers of `rows` rows are no burden, or whole requests."""
    longest, total = max(1, *costs), sum(cost + room for cost in costs if cost)
    size = max(-(-total // parts), 1, math.isqrt(total * rows // 1300))
    whole = -(-size // longest) * longest
    saved = 1.5 + 4 * min(len(costs), parts) / parts  # in blocks: the merge, a cut request in every part
    return whole if is_uniform(costs) and whole - size < saved else size


class Share(NamedTuple):
    """What one part works on; no work if the last request is before the first."""

    first_request: int
    first_block: int  # of the first request
    last_request: int
    end_block: int  # of the last request
    pieces: int  # of the last request if it begins here and goes on in other parts, else 0
    cuts: int  # cut requests of the batch
    cuts_before: int  # those before the last request


class Line(NamedTuple):
    """Where the blocks of each request lie in the row of all, and how many of it are a part's."""

    spans: list[tuple[int, int]]
    total: int
    size: int


def line_of(costs: list[int], parts: int, rows: int, piece: int) -> Line:
    """Requests side by side if they are all alike; beginning with a part each, if there are few and parts enough (no
    part has two pieces then); or with room for `piece` blocks before each that has blocks."""
    size, room = size_of(costs, parts, rows), 0
    whole = [-(-cost // size) * size for cost in costs]
    if 1 < len(costs) <= 32 and sum(whole) <= parts * size:
        costs = whole
    elif len(costs) > 1 and not is_uniform(costs):
        room = piece
        size = size_of(costs, parts, rows, room)
    ends = list(accumulate(cost + room if cost else 0 for cost in costs))
    return Line([(end - cost, end) for cost, end in zip(costs, ends, strict=True)], ends[-1], size)


def share_of(costs: list[int], part: int, parts: int, rows: int, piece: int) -> Share:
    spans, total, size = line_of(costs, parts, rows, piece)
    cut = [begin // size < (end - 1) // size for begin, end in spans]
    begin_of_part, end_of_part = part * size, min((part + 1) * size, total)
    here = [i for i, (begin, end) in enumerate(spans) if end > begin_of_part and begin < end_of_part and end > begin]
    if not here:
        return Share(1, 0, 0, 0, 0, sum(cut), 0)
    first, last = here[0], here[-1]
    begin, end = spans[last]
    begins_here_and_goes_on = begin >= begin_of_part and end > end_of_part
    pieces = (end - 1) // size - part + 1 if begins_here_and_goes_on else 0
    first_block = max(begin_of_part - spans[first][0], 0)
    return Share(first, first_block, last, min(end, end_of_part) - begin, pieces, sum(cut), sum(cut[:last]))


def pieces_of(costs: list[int], part: int, share: Share):
    """(request, first block, end block, slot of the partial answer or -1) of everything that a part does."""
    for request in range(share.first_request, share.last_request + 1):
        if costs[request]:
            begin = share.first_block if request == share.first_request else 0
            end = min(share.end_block if request == share.last_request else costs[request], costs[request])
            yield request, begin, end, 2 * part if begin else 2 * part + 1 if end < costs[request] else -1


def slots_merged(part: int, pieces: int) -> list[int]:
    """Where `_merge_kernel` looks for the pieces of a request whose plan entry is (request, part, pieces)."""
    return [2 * part + 1, *(2 * (part + k) for k in range(1, pieces))]


blocks = st.one_of(st.integers(0, 2), st.integers(0, 100), st.integers(0, 5000))
requests = st.tuples(blocks.flatmap(lambda n: st.integers(max(n - 1, 0) * BLOCK, n * BLOCK)), st.integers(0, 2))


parts_and_rows = st.sampled_from([(1, 8448), (2, 4000), (7, 64), (33, 200), (66, 128), (132, 1), (132, 16), (132, 64)])


rooms = st.sampled_from([0, 3, 5])


@given(st.lists(requests, min_size=1, max_size=60), parts_and_rows, rooms)
@example([(0, 1)], (132, 16), 3)
@example([(0, 0), (9, 0)], (2, 16), 3)
@example([(64 * 132, 1)], (132, 16), 3)
@example([(1, 0), (64 * 20, 1), (5, 0), (64 * 12, 1), (7, 0)], (2, 16), 3)
@example([(1_000_000, 1), *[(1, 1)] * 40], (132, 16), 3)
@settings(max_examples=500, deadline=None)
def test_every_block_is_done_once_and_every_piece_is_merged(batch, where, piece):
    parts, rows = where
    costs = [cost_of(*request) for request in batch]
    done = {request: [] for request, cost in enumerate(costs) if cost}
    plan = {}
    for part in range(parts):
        share = share_of(costs, part, parts, rows, piece)
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


@given(st.lists(blocks, min_size=1, max_size=60), parts_and_rows)
def test_saving_cuts_never_costs_much(costs, where):
    least = max(-(-sum(costs) // where[0]), 1, math.isqrt(sum(costs) * where[1] // 1300))
    assert least <= size_of(costs, *where) <= least + 5


@pytest.mark.parametrize(
    ("requests", "tokens", "parts", "rows", "size"),
    [
        (128, 4096, 132, 16, 64),  # two parts a request would take 63 blocks each, and cut all but one
        (128, 4096, 66, 128, 128),
        (64, 8192, 66, 128, 128),
        (4, 8192, 132, 16, 4),
        (64, 4096, 132, 16, 32),
        (1, 4096, 132, 16, 1),
        (1, 4096, 66, 128, 2),  # 64 pieces of 128 rows would take longer to merge than to compute
    ],
)
def test_sizes_of_even_batches(requests, tokens, parts, rows, size):
    assert size_of([cost_of(tokens, 1)] * requests, parts, rows) == size


def test_uneven_requests_begin_with_a_part_each():
    costs = [cost_of(tokens, 1) for tokens in (4641, 45118, 1730, 1696)]
    parts = [list(pieces_of(costs, part, share_of(costs, part, 132, 64, 3))) for part in range(132)]
    assert [len(pieces) for pieces in parts] == [1] * 120 + [0] * 12
    assert max(end - begin for ((_, begin, end, _),) in parts[:120]) == size_of(costs, 132, 64) == 7


def pointer(numbers):
    return gluon_emulator.Pointer.of(torch.tensor(numbers, dtype=torch.int32))


def test_a_part_of_short_requests_has_fewer_blocks():
    costs = [1] * 40 + [cost_of(100_000, 1)] * 3
    parts = [list(pieces_of(costs, part, share_of(costs, part, 66, 128, 3))) for part in range(66)]
    assert max(len(pieces) for pieces in parts) <= 20
    takes = [sum(3 + end - begin for _, begin, end, _ in pieces) for pieces in parts]
    assert max(takes) <= line_of(costs, 66, 128, 3).size + 3  # for the piece that a part goes on with


@given(st.lists(requests, min_size=1, max_size=300), parts_and_rows, st.booleans(), rooms)
@example([(4096, 1)] * 128, (66, 128), False, 3)
@example([(64, 1), *[(64 * 40, 1)] * 2, (0, 0)] * 12, (33, 200), True, 3)
@settings(max_examples=60, deadline=None)
def test_the_kernel_follows_the_model(batch, where, ragged, piece):
    """The text of `share`, executed by the emulator."""
    parts, rows = where
    if not ragged:
        batch = [(seq_len, 1) for seq_len, _ in batch]
    costs = [cost_of(*request) for request in batch]
    starts = pointer([0, *accumulate(tokens for _, tokens in batch)])
    lengths = pointer([seq_len for seq_len, _ in batch])
    for part in {0, parts // 2, parts - 1}:
        shared, *of_plan = SCHEDULE.share(
            lengths, starts, *map(gluon_emulator.Int, (len(batch), part, parts, rows)), ragged, piece
        )
        share, model = Share(*shared, *of_plan), share_of(costs, part, parts, rows, piece)
        assert list(pieces_of(costs, part, share)) == list(pieces_of(costs, part, model))
        assert (share.pieces, share.cuts) == (model.pieces, model.cuts)
        assert share.cuts_before == model.cuts_before or not model.pieces  # it is read for a cut request alone


@given(
    st.lists(blocks.map(lambda n: n * BLOCK), min_size=1, max_size=300),
    st.sampled_from([(1, 6), (5, 1), (66, 16), (132, 6)]),
    st.integers(0, 3),
)
@example([0] * 200, (132, 6), 0)
@settings(max_examples=60, deadline=None)
def test_every_split_is_done_once_in_its_turn(lens, parts_and_split, turns):
    """By `share_splits` and `piece`, executed by the emulator, in the slot in which the merge looks for it."""
    parts, split = parts_and_split
    splits = [max(-(-n // (split * BLOCK)), 1) for n in lens]
    starts = [end - count for count, end in zip(splits, accumulate(splits), strict=True)]
    window = max(sum(splits) // (turns + 1), 1)
    lengths = pointer(lens)
    done = {}
    for turn in range(starts[-1] // window + 1):
        for part in range(parts):
            arguments = map(gluon_emulator.Int, (len(lens), part, parts, turn, window))
            shared = SCHEDULE.share_splits(lengths, *arguments, split)
            line = SCHEDULE.first_slot(shared, split)
            for request in map(gluon_emulator.Int, range(shared[0], shared[2] + 1)):
                begin, end, *_, slot, line = SCHEDULE.piece(
                    request, shared, (lengths, None, 1), part, 0, line, 1, 64, False, split
                )
                for first in range(begin, max(end, begin + 1), split):
                    assert (request, first) not in done
                    done[request, first] = slot + (first - begin) // split if slot >= 0 else -1
                    assert min(first + split, end) == min(first + split, -(-lens[request] // BLOCK))
    wanted = {
        (request, i * split): start % window + i if count > 1 else -1
        for request, (start, count) in enumerate(zip(starts, splits, strict=True))
        for i in range(count)
    }
    assert done == wanted


numbers = st.integers(0, 31).flatmap(lambda bits: st.integers(0, 2**bits - 1))


@given(numbers, numbers, st.sampled_from([-2, 0, 2]))
@example(5_242_881, 1, -2)
@example(33_554_434, 1, 0)
@example(15_578_844, 3, 2)
@settings(max_examples=1000)
def test_division_by_reciprocal(x, y, ulps):
    """Exact with the float32 of a GPU, whose reciprocal may be off by two units."""
    y = max(y, 1)
    assume((x // y + 1) * y < 2**31)
    reciprocal = np.float32(1) / np.float32(y)
    reciprocal += np.float32(ulps) * np.spacing(reciprocal)
    quotient = SCHEDULE._ratio(gluon_emulator.Int(x), gluon_emulator.Int(y), Float32(reciprocal))
    assert quotient == x // y


class Float32(float):
    """A factor that multiplies integers as float32."""

    def __rmul__(self, x):
        return np.float32(x) * np.float32(self)
