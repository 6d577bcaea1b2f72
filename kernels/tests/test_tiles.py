"""The tiles of the portable kernels: every device has them, and where nobody has measured they are those that
tile_resources.py found, which take no more of a GPU than it has."""

from itertools import product

import pytest
import tile_resources
from tile_resources import CLASSES, MEASURED, candidates, faults, hopeless, in_table, keys, preferred

from mla_kernels import Device
from mla_kernels.device import device_called
from mla_kernels.dispatch import SPLIT_UNIT
from mla_kernels.tiles import TILES, class_of, decode_tile, prefill_tile

REPORT = tile_resources.read()
COMPILED = [name for name in CLASSES if name not in MEASURED]
UNLISTED = ("sm_87", "sm_89", "sm_103", "sm_110", "sm_121", "sm_999", "gfx90a", "gfx950", "gfx1201")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        *((name, name) for name in CLASSES),
        *(("sm_87", "sm_80"), ("sm_89", "sm_86"), ("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_121", "sm_120")),
        *(("gfx90a", "gfx942"), ("gfx950", "gfx942")),
        *(("sm_999", "sm_120"), ("gfx1201", "gfx942")),  # known to nobody: the least shared memory of its kind
    ],
)
def test_class_of(device, name):
    assert class_of(device_called(device)) == name


def test_interpreter_is_a_class_of_its_own():
    assert class_of(Device("cpu", interpreted=True)) == class_of(Device("cuda", 90, interpreted=True)) == "interpreter"


@pytest.mark.parametrize("name", [*CLASSES, *UNLISTED, "interpreter"])
def test_every_device_has_a_tile_for_everything(name):
    device = Device("cpu", interpreted=True) if name == "interpreter" else device_called(name)
    widths = (128, 288, 320, 576, 640)
    for rows, width, itemsize, fp8 in product((1, 16, 17, 33, 64, 65, 2048), widths, (2, 4), (False, True)):
        tile = decode_tile(rows, width, itemsize, device, fp8)
        assert SPLIT_UNIT % tile.tokens == 0
        assert tile.rows in (16, 32, 64)
        assert rows <= tile.rows or tile.rows == decode_tile(10**6, width, itemsize, device, fp8).rows
    for itemsize, qk, v in product((2, 4), (16, 96, 192, 256, 1024), (16, 64, 128, 256, 1024)):
        assert prefill_tile(device, itemsize, qk, v).queries >= 16


def test_classes_of_the_table_are_those_that_are_compiled():
    assert [*CLASSES, "interpreter"] == list(TILES)
    assert set(REPORT) == set(product(CLASSES, keys()))


@pytest.mark.parametrize("name", COMPILED)
def test_report_leaves_no_better_candidate_out(name):
    devices = [device_called(target) for target in CLASSES[name]]
    for key in keys():
        tried = [one for one, _ in REPORT[name, key]]
        wanted = [one for one in candidates(key) if not any(hopeless(key, one, device) for device in devices)]
        assert tried == wanted[: len(tried)], key
        good = [not faults(*line, devices[0]) for line in REPORT[name, key]]
        assert not any(good[:-1]), key
        assert good[-1] or len(tried) == len(wanted), key


@pytest.mark.parametrize("name", COMPILED)
def test_table_has_what_the_report_prefers(name):
    for key in keys():
        got, wanted = in_table(device_called(name), key), preferred(REPORT, name, key)
        if wanted is None:
            assert got.rows == 32, key
        else:
            assert got[:4] == wanted[0][:4], key
            assert key.operation == "prefill" or got.programs == wanted[0].programs, key


@pytest.mark.parametrize("name", CLASSES)
def test_tiles_fit_and_spill_only_where_every_tile_does(name):
    device = device_called(name)
    for key in keys():
        one = in_table(device, key)
        if one.rows < key.rows:
            continue
        found = next(found for other, found in reversed(REPORT[name, key]) if other[:4] == one[:4])
        if name in MEASURED:  # how many programs an SM has room for is no question there, nor are spills
            assert found.shared <= device.shared_bytes, key
        else:
            assert faults(one, found._replace(spilled=0), device) == [], key
            assert not found.spilled or all(other.spilled for _, other in REPORT[name, key]), key
