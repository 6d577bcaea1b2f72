"""Roles of the Hopper kernels do not race in shared memory (gluon_races.py), and a barrier less would be seen."""

import gluon_emulator
import pytest
import test_gluon_emulated
import test_gluon_few_emulated
import test_gluon_tiles_emulated
import test_gluon_turns_emulated
from gluon_races import no_races
from test_gluon_emulated import check, make


def rows(kernel):
    check(kernel, make(20, [5, 130, 400], query_lens=4))
    check(kernel, make(16, [1400, 30], page_size=48))


FORMS = {  # how it is built, what it does
    "rows": (test_gluon_emulated.build, rows),
    "few": (test_gluon_few_emulated.build, test_gluon_few_emulated.both),
    "turns": (test_gluon_emulated.build, test_gluon_turns_emulated.all_forms),
    "tiles": (test_gluon_tiles_emulated.build, test_gluon_tiles_emulated.both),
}
# Not prefill: both of its warpgroups zero the rows of values that nobody owns, each before it reads them, which is a
# race of equal writes. Its tests have roles that are late.


@pytest.mark.parametrize("form", FORMS)
def test_roles_do_not_race(form):
    build, work = FORMS[form]
    with no_races():
        work(build())


READ = "            top = -smem.minus_top.load(QUERY)\n"
MEET = "            sum_of_query = _sum_of_both(total, pieces, smem, turn)\n"
LAST_WORDS = "    words = words_of_tile(b, 0, 1, values, seq_len, BLOCK, BLOCK)\n"
RELEASE = "    mbarrier.arrive(smem.k_empty.index(2 * stage + turn), count=1)\n"
TILE_WORDS = "    words = words_of_tile(b, 0, 0, values, known, KEYS, STEP_KEYS)\n"
HALF_FULL = "            mbarrier.wait(smem.k_full.index(2 * stage + 1), phase)\n"
ROPE_EMPTY = "mbarrier.wait(smem.rope_empty.index(place), turn ^ 1)\n"
MISTAKES = {
    "rows: weights are written over": (
        "rows",
        {"    mbarrier.wait(smem.weight_empty, (block & 1) ^ 1)\n    smem.weight": "    smem.weight"},
    ),
    "rows: keys are not waited for": (
        "rows",
        {"        mbarrier.wait(smem.k_full.index(2 * stage + half), phase)\n        if GATHER": "        if GATHER"},
    ),
    "few: weights are written over": (
        "few",
        {"    mbarrier.wait(smem.weight_empty, (block & 1) ^ 1)\n    if grew": "    if grew"},
    ),
    "few: weights of codes are not waited for": ("few", {"    mbarrier.wait(smem.weight_full, step & 1)\n": ""}),
    "tiles: weights are written over": (
        "tiles",
        {"    mbarrier.wait(smem.weight_empty, (step & 1) ^ 1)\n    smem.factor": "    smem.factor"},
    ),
    "tiles: weights are not waited for": (
        "tiles",
        {f"{TILE_WORDS}    mbarrier.wait(smem.weight_full, step & 1)\n": TILE_WORDS},
    ),
    "tiles: the second half is not waited for": (
        "tiles",
        {f"{HALF_FULL}        half0": "            pass\n        half0"},
    ),
    "tiles: values are not waited for": (
        "tiles",
        {f"    mbarrier.wait(smem.k_full.index(2 * stage + half), phase)\n{TILE_WORDS}": TILE_WORDS},
    ),
    "tiles: rotary values are not waited for": (
        "tiles",
        {"        mbarrier.wait(smem.rope_full.index(place), turn)\n": ""},
    ),
    "tiles: rotary values are written over": (
        "tiles",
        {f"            {ROPE_EMPTY}        _expect": "            pass\n        _expect"},
    ),
    "tiles: rotary values that are read one by one are written over": (
        "tiles",
        {f"                    {ROPE_EMPTY}                cp": "                    pass\n                cp"},
    ),
    "turns: values are not waited for": (
        "turns",
        {"        mbarrier.wait(smem.k_full.index(2 * stage + turn), phase)\n": "        pass\n"},
    ),
    "turns: the other's weights are not waited for": (
        "turns",
        {"        mbarrier.wait(smem.weight_full.index(whose), (block >> 1) & 1)\n": "        pass\n"},
    ),
    "turns: the other's sums are not waited for": (
        "turns",
        {"    mbarrier.wait(smem.sums_full.index(buffer + 1 - turn), (pieces >> 1) & 1)\n": ""},
    ),
    "turns: queries are not waited for": ("turns", {"            mbarrier.wait(smem.q_full, pieces & 1)\n": ""}),
    "turns: references are read when they may be the next piece's": ("turns", {READ + MEET: MEET + READ}),
    "turns: values are given back before they are read": (
        "turns",
        {f"QUERIES)\n{RELEASE}": "QUERIES)\n", LAST_WORDS: RELEASE + LAST_WORDS},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_barrier_less_is_seen(mistake, monkeypatch):
    """Whatever order the threads of this process run in."""
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 1)
    form, edits = MISTAKES[mistake]
    build, work = FORMS[form]
    broken = build(edits=edits)
    with pytest.raises(AssertionError), no_races():
        work(broken)
