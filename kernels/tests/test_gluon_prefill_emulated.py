"""The text of the Hopper prefill kernel, executed on a CPU by gluon_emulator.py, against the float64 reference."""

from functools import partial
from unittest.mock import patch

import gluon_emulator
import pytest
import torch
from gluon_emulator import emulated

import mla_kernels.prefill_pieces as prefill_pieces
import mla_kernels.primitives as primitives
from mla_kernels import Device, MLAGeometry
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, RaggedCase, assert_matches, check_prefill, make_prefill

MODULES = ("hopper", "tma", "hopper_prefill_load", "hopper_prefill", "prefill.gluon_sm90_ragged")
GPU = Device("cuda", 90, "a small Hopper", 5)


def merge_pieces(*args, **options):
    """Many rows at once: how many changes nothing, and programs are what takes time in the interpreter."""
    with patch.object(prefill_pieces, "_VALUES", 8192):
        prefill_pieces.merge_pieces(*args, **options | {"overlap": False})


def build(**edits):
    *_, roles, kernel = emulated(*(f"mla_kernels.{name}" for name in MODULES), **edits)
    roles.LN_2 = primitives.LN_2.value
    kernel.device_of = lambda tensor: GPU
    kernel.merge_pieces = merge_pieces
    return kernel


@pytest.fixture(scope="module")
def kernel():
    return build()


def geometry(heads=2, nope=128, rope=64, v=128):
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v)


def check(kernel, shape, *lens, change=lambda case: case, accumulate=False, pieces=None, **options):
    case = change(make_prefill(shape, *lens, dtype=torch.float16, **options))
    check_prefill(partial(kernel.run, pieces=pieces), case, accumulate=accumulate)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("lens", [[1, 0, 16, 63], [64, 65], [17, 129], [127, 128, 300]], ids=str)
def test_causal_lengths_around_every_edge(kernel, lens, needles):
    check(kernel, geometry(), lens, needles=needles)


@pytest.mark.parametrize("needles", [True, False], ids=["needles", "random"])
@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65], [128, 400, 129]], ids=str)
def test_every_query_sees_every_key(kernel, key_lens, needles):
    check(kernel, geometry(), [20, 3, 165], key_lens, causal=False, needles=needles)


@pytest.mark.parametrize(
    ("query_lens", "key_lens"),
    [([1, 1, 1], [64, 65, 128]), ([5, 170], [67, 271]), ([65, 2], [128, 0]), ([170, 3, 66], [5, 1, 65])],
    ids=str,
)
def test_causal_queries_are_the_last_of_their_keys(kernel, query_lens, key_lens):
    check(kernel, geometry(), query_lens, key_lens)


@pytest.mark.parametrize("key_lens", [[200, 64, 1], [63, 0, 65], [128, 400, 129], [0, 0, 0]], ids=str)
def test_accumulates(kernel, key_lens):
    check(kernel, geometry(), [20, 3, 165], key_lens, causal=False, accumulate=True)


@pytest.mark.parametrize(("heads", "nope", "rope", "v"), [(1, 192, 64, 256), (3, 64, 64, 64), (2, 256, 0, 256)])
def test_accumulates_in_every_width(kernel, heads, nope, rope, v):
    check(kernel, geometry(heads, nope, rope, v), [9, 150], [70, 150], causal=False, accumulate=True)


@pytest.mark.parametrize(
    ("heads", "nope", "rope", "v"), [(1, 192, 64, 256), (3, 64, 64, 64), (2, 256, 0, 256), (20, 128, 64, 128)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_geometries(kernel, heads, nope, rope, v, causal):
    check(kernel, geometry(heads, nope, rope, v), [9, 150], [70, 150], causal=causal)


def test_a_counter_of_the_caller(kernel):
    """Also where queries are copied first. One that is not 0 shows that no other is counted with."""
    case = make_prefill(geometry(), [9, 150, 300], dtype=torch.float16)
    q, *keys = case.arrays
    expected, _ = kernel.run(q, *keys, **case.options)
    odd = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape).copy_(q)
    for queries in (q, odd):
        counters = torch.tensor([-7, 0, -7], dtype=torch.int32)
        out, _ = kernel.run(queries, *keys, **case.options, counter=counters[1:2])
        assert torch.equal(out, expected)
        tiles = 2 * (1 + 2 + 3)
        assert counters.tolist() == [-7, tiles, -7]
    out, _ = kernel.run(q, *keys, **case.options, counter=torch.tensor([1000], dtype=torch.int32))
    assert not torch.equal(out, expected)


def test_more_requests_than_are_looked_at_at_once(kernel):
    check(kernel, geometry(1), [(37 * i) % 70 if i % 3 else 0 for i in range(70)])


def test_heads_in_groups(kernel, monkeypatch):
    """As if L2 held the keys of two heads only: other tiles follow one another, and all are there."""
    monkeypatch.setattr(kernel, "_L2_BYTES", 2 * 300 * 512)
    check(kernel, geometry(5), [300, 129])


def test_strided_and_concatenated(kernel):
    """vLLM hands over one tensor of whole keys, and queries may be a slice of a projection's output."""

    def change(case, shift=8):
        q, k_nope, k_rope, v, *starts = case.arrays
        k = torch.cat([k_nope, k_rope], -1)
        wide = torch.full((len(q), q.shape[1] + 1, q.shape[2] + 32), torch.nan, dtype=q.dtype)
        view = wide[:, 1:, shift : q.shape[2] + shift].copy_(q)
        by_head = torch.empty(v.shape[1], len(v), v.shape[2], dtype=v.dtype).transpose(0, 1).copy_(v)
        arrays = (view, k[..., : k_nope.shape[-1]], k[..., k_nope.shape[-1] :], by_head, *(s.long() for s in starts))
        return RaggedCase(geometry=case.geometry, arrays=arrays, options=case.options)

    check(kernel, geometry(3), [70, 9], [100, 9], change=change)
    check(kernel, geometry(3), [70, 9], [100, 9], change=lambda case: change(case, shift=3))


PIECES = [2, 3, 7]  # the last are more than there are blocks: some see nothing


def with_pieces(cases, *, names: tuple[str, str], ids: tuple[str, str]):
    """Each case cut into each number of pieces, with the second parameter true and false in turn: merging is slow."""
    every = [(case, pieces, (i + j) % 2 == 0) for i, case in enumerate(cases) for j, pieces in enumerate(PIECES)]
    listed = [pytest.param(*one, id=f"{one[0]}-{one[1]}-{ids[one[2]]}") for one in every]
    return pytest.mark.parametrize((names[0], "pieces", names[1]), listed)


@with_pieces(
    [
        ([1, 0, 16, 63], None),
        ([127, 128, 300], None),
        ([5, 170], [67, 600]),
        ([65, 2], [128, 0]),
        ([170, 3, 66], [5, 1, 65]),
    ],
    names=("lens", "needles"),
    ids=("random", "needles"),
)
def test_causal_pieces(kernel, lens, pieces, needles):
    check(kernel, geometry(), *lens, pieces=pieces, needles=needles)


@with_pieces(
    [[200, 64, 1], [63, 0, 65], [128, 400, 129], [700, 256, 257], [0, 0, 0]],
    names=("key_lens", "accumulate"),
    ids=("new", "accumulated"),
)
def test_pieces_that_every_query_sees(kernel, key_lens, pieces, accumulate):
    check(kernel, geometry(), [20, 3, 165], key_lens, causal=False, pieces=pieces, accumulate=accumulate)


@pytest.mark.parametrize(("heads", "nope", "rope", "v"), [(1, 192, 64, 256), (3, 64, 64, 64), (2, 256, 0, 256)])
def test_pieces_in_every_width(kernel, heads, nope, rope, v):
    shape = geometry(heads, nope, rope, v)
    check(kernel, shape, [9, 150], [270, 150], pieces=2)
    check(kernel, shape, [9, 150], [270, 150], pieces=3, causal=False, accumulate=True)


def test_causal_pieces_are_accumulated(kernel):
    check(kernel, geometry(), [20, 3, 165], [200, 1, 300], pieces=2, accumulate=True)


def test_pieces_of_many_requests(kernel):
    check(kernel, geometry(1), [(37 * i) % 70 if i % 3 else 0 for i in range(70)], pieces=2)


@pytest.mark.parametrize("accumulate", [False, True], ids=["new", "accumulated"])
def test_rows_of_nobody_keep_what_they_held(kernel, accumulate):
    """Also in scratch, where nobody wrote them."""
    case = make_prefill(geometry(), [40, 150], [300, 150], causal=False, dtype=torch.float16)
    q, *keys, query_start, key_start = case.arrays
    owned = slice(3, 3 + len(q))
    wide = q.new_full((len(q) + 8, *q.shape[1:]), torch.nan)
    wide[owned] = q
    out = q.new_full((len(wide), q.shape[1], 128), 7.0)
    lse = torch.full(out.shape[:2], 5.0)
    kernel.run(
        *(wide, *keys, query_start + 3, key_start),
        **(case.options | {"accumulate": accumulate, "out_TNV": out, "lse_TN": lse, "pieces": 2}),
    )
    so_far = (torch.full_like(out[owned], 7.0), torch.full_like(lse[owned], 5.0)) if accumulate else None
    expected, expected_lse = case.reference(so_far)
    assert_matches("lse", lse[owned], expected_lse, LSE_TOLERANCE)
    assert_matches("out", out[owned], expected, TOLERANCE[torch.float16], case.magnitude() + 7)
    for rows in (slice(0, 3), slice(owned.stop, None)):
        assert (out[rows] == 7).all()
        assert (lse[rows] == 5).all()


@pytest.mark.parametrize(
    ("query_lens", "key_lens", "pieces"),
    [([100, 30], [70, 900], 3), ([100, 30], [70, 550], 2), ([100, 30], [70, 400], 1), ([300, 200, 1], [0, 0, 900], 1)],
    ids=str,
)
def test_few_tiles_are_cut(kernel, monkeypatch, query_lens, key_lens, pieces):
    """On 18 multiprocessors, in pieces of 300 keys at least. Two requests' 130 tokens may
    lie in three tiles of each head, three requests' 501 in six."""
    merged = []
    merge = kernel.merge_pieces
    monkeypatch.setattr(kernel, "device_of", lambda tensor: Device("cuda", 90, "a Hopper", 18))
    monkeypatch.setattr(prefill_pieces, "LEAST_KEYS", 300)
    monkeypatch.setattr(kernel, "merge_pieces", lambda *args, **o: merged.append(o["pieces"]) or merge(*args, **o))
    check(kernel, geometry(), query_lens, key_lens, causal=False)
    assert merged == ([pieces] if pieces > 1 else [])


def several(kernel):
    check(kernel, geometry(), [200, 9, 129], [330, 70, 129])
    check(kernel, geometry(), [200, 9, 129], [330, 70, 129], pieces=2)
    check(kernel, geometry(), [100, 9], [430, 0], causal=False, pieces=3, accumulate=True)
    check(kernel, geometry(), [200, 9, 7], [330, 70, 0], causal=False, accumulate=True)


# Barriers matter only if somebody is late: what is late, and the wait that is then needed.
SLEEP = "__import__('time').sleep(0.003)"
LATE = {
    "keys are multiplied late": (
        "            s = warpgroup_mma_wait(1, deps=[s])\n",
        "    full = smem.k_full.index(stage)\n    mbarrier.wait(smem.k_empty.index(stage), phase ^ 1)\n",
    ),
    "values are multiplied late": (
        "            acc = warpgroup_mma_wait(0, deps=[acc])\n",
        "    mbarrier.wait(smem.v_empty.index(stage), phase ^ 1)\n",
    ),
    "queries are multiplied late": (
        "        s = warpgroup_mma_wait(0, deps=[s])\n",
        "        mbarrier.wait(smem.q_empty.index(w), (count & 1) ^ 1)\n        mbarrier.expect(",
    ),
    "values come late": (
        "    tma_load(desc, [row, head * stride], full, smem.v.index(stage))\n",
        "            mbarrier.wait(smem.v_full.index(stage), phase)\n            acc",
    ),
    "queries come late": (
        "            tma_load(q_desc, [token + w * ROWS, column",
        "        mbarrier.wait(smem.q_full.index(W), count & 1)\n",
    ),
    "tiles are told late": (
        "        smem.tile.index(slot * FIELDS + f).store(",
        "    mbarrier.wait(smem.tile_full.index(slot), phase)\n",
    ),
}


@pytest.mark.parametrize("what", LATE)
def test_late_roles_are_waited_for(what, monkeypatch):
    """Right while the barrier is there, wrong without."""
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 3)
    line, wait = LATE[what]
    indent = line[: len(line) - len(line.lstrip())]
    late = {line: f"{indent}{SLEEP}\n{line}"}
    several(build(edits=late))
    first, _, rest = wait.partition("mbarrier.wait(")
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 1)  # what may fail anyway need not be waited for
    with pytest.raises(AssertionError):
        several(build(edits=late | {wait: f"{first}(lambda *_: None)({rest}"}))


MISTAKES = {
    "values behind the end are not zeroed": ("            _zero_tail(smem.v", "            (lambda *_: 0)(smem.v"),
    "a query sees one key too many": (
        "sees = gl.minimum(all_see + i, keys)",
        "sees = gl.minimum(all_see + i + 1, keys)",
    ),
    "a warpgroup thinks that it sees what the other does": ("gl.minimum(all_see + W * ROWS, keys)", "keys"),
    "outputs are not rescaled": (
        "            acc = acc * gl.convert_layout(rescale, o_row_lay)[:, None]\n            p",
        "            p",
    ),
    "a block of keys is never released": ("mbarrier.arrive(smem.k_empty.index(1 - stage), count=1)", "pass"),
    "queries are released too early": ("if b == blocks - 1:", "if b == blocks - 2:"),
    "a tile is skipped": ("_find(claim + gl.num_programs(0),", "_find(claim + gl.num_programs(0) + claim // 3,"),
    "all heads of a group are the first": ("head + local % group", "head"),
    "both warpgroups have the same queries": ("[token + w * ROWS, column", "[token, column"),
    "the answer so far is not rescaled": (
        "            acc = acc * gl.convert_layout(rescale, o_row_lay)[:, None]\n        if begin",
        "        if begin",
    ),
    "rows that have seen nothing weigh something": ("seen * rescale * 0.25", "rescale * 0.25"),
    "values of rows that have seen nothing count": ("[:, None], values, 0.0)", "[:, None] | True, values, 0.0)"),
    "both warpgroups begin with the same answer": ("_so_far(out, token + W * ROWS,", "_so_far(out, token,"),
    "all pieces begin with the first keys": ("first_key += begin", "pass"),
    "all pieces answer in the same rows": ("answer += piece * batch.tokens", "pass"),
    "the last piece sees as many keys as there are": ("gl.maximum(keys - first, 0)", "keys"),
    "causal pieces see as if they were the first": ("sees - first, gl", "sees, gl"),
    "a block is in no piece": ("share = (blocks + pieces - 1) // pieces", "share = blocks // pieces"),
    "outputs go where the next tile's do": ("token + W * ROWS, rows - W", "next_token + W * ROWS, rows - W"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake, monkeypatch):
    """The emulator is no rubber stamp: each of these fails."""
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 1)
    with pytest.raises(AssertionError):
        several(build(edits=dict([MISTAKES[mistake]])))
