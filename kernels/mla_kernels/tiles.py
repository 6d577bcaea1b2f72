"""Tiles of the portable kernels, as data: how much of the cache, or of the keys, a program takes at once on each class
of devices, and how it runs.

A class is named by its first architecture. A device that is not here is tiled as the class of its kind that has as much
shared memory, or the next smaller, or the smallest if there is none; of several, as the newest that is no newer than
the device. So sm_89 is tiled as sm_86, sm_103 as sm_100, gfx950 as gfx942.

Where numbers come from stands beside each class. "Compiled" means never timed: the largest that spills no register
(with fixed splits, not much) and of which an SM has shared memory and registers for as many programs as stand there, by
what Triton made of candidates without a GPU (`make tile-resources`, benchmarks/results/tile_resources.csv).
tests/tile_resources.py has the rule, and tests/test_tiles.py sees that the table follows it.
"""

from functools import cache
from typing import NamedTuple

from mla_kernels.device import Device, device_called


class DecodeTile(NamedTuple):
    """Query rows and cache tokens of a tile, warps and pipeline stages of a program, programs that an SM works on."""

    rows: int
    tokens: int
    warps: int
    stages: int
    pieces_per_sm: int


class PrefillTile(NamedTuple):
    """Queries and keys of a tile, warps and pipeline stages of a program."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of one class of devices.

    decode: by cache ("16-bit", "fp8" whatever its scales, "float32"), query rows of a tile and values of a cache row
        (latent and rotary, at most): the rest of a DecodeTile.
    prefill: by widths of a key and of a value (padded, at most), of 16 bits each: a PrefillTile.
    """

    decode: dict[str, dict[int, dict[int, tuple[int, int, int, int]]]]
    prefill: dict[tuple[int, int], PrefillTile]


# IEEE float32 has no tensor cores: small tiles, or registers spill. Also for heads wider than any known model's.
_SMALL = PrefillTile(16, 16, 4, 1)

TILES = {
    # Compiled. 164 KiB of shared memory an SM: two programs with 64 tokens of 512 + 64 each do not fit. With an fp8
    # cache every tile of 64 query rows spills; with a 16-bit one that of 32 tokens spills 3 KB with fixed splits.
    "sm_80": Tiles(
        decode={
            "16-bit": {
                16: {288: (64, 4, 3, 2), 640: (64, 8, 3, 1)},
                32: {288: (64, 4, 2, 2), 576: (32, 8, 2, 1), 640: (64, 8, 2, 1)},
            },
            "fp8": {
                16: {640: (64, 8, 3, 1)},
                32: {288: (64, 8, 2, 1), 640: (32, 8, 2, 1)},
            },
            "float32": {16: {288: (16, 4, 1, 2), 640: (16, 8, 1, 1)}},
        },
        prefill={
            (96, 64): PrefillTile(128, 64, 8, 3),
            (192, 128): PrefillTile(128, 32, 8, 3),
            (256, 256): PrefillTile(64, 32, 8, 3),
        },
    ),
    # Compiled, for sm_86 and sm_89. 100 KiB an SM: tiles of 64 query rows would be shorter than those of 32. With an
    # fp8 cache and 32 rows, 32 tokens of 512 + 64 miss by two registers.
    "sm_86": Tiles(
        decode={
            "16-bit": {
                16: {288: (64, 4, 3, 2), 576: (64, 8, 3, 1), 640: (32, 8, 3, 1)},
                32: {288: (64, 8, 2, 1), 640: (32, 8, 2, 1)},
            },
            "fp8": {
                16: {288: (64, 4, 3, 2), 640: (64, 8, 3, 1)},
                32: {288: (64, 8, 2, 1), 576: (16, 8, 2, 1), 640: (32, 8, 2, 1)},
            },
            "float32": {16: {288: (16, 4, 1, 2), 640: (16, 8, 1, 1)}},
        },
        prefill={
            (96, 64): PrefillTile(128, 64, 8, 3),
            (192, 128): PrefillTile(128, 32, 8, 3),
            (256, 256): PrefillTile(64, 32, 8, 2),
        },
    ),
    # 16-bit caches: measured, the fastest of those tried on an H200 (benchmarks/results/h200_decode_triton_splitkv.csv,
    # 2026-11-22), though tiles of 32 and 64 query rows spill. Rows wider than 576 nobody has measured. The others were
    # compared with no other tile: fp8 is timed as it is (h200_decode_fp8_triton_splitkv.csv) and smaller, since
    # conversion takes registers; prefill is the largest of which nothing spilled inside loops.
    "sm_90": Tiles(
        decode={
            "16-bit": {
                16: {640: (64, 4, 3, 2)},
                32: {640: (64, 4, 2, 2)},
                64: {576: (64, 8, 2, 1), 640: (32, 8, 2, 1)},
            },
            "fp8": {16: {640: (32, 4, 2, 2)}, 32: {640: (32, 8, 2, 1)}, 64: {640: (32, 8, 2, 1)}},
            "float32": {16: {640: (16, 4, 1, 2)}},
        },
        prefill={
            (192, 256): PrefillTile(128, 64, 8, 3),
            (256, 128): PrefillTile(128, 64, 8, 3),
            (256, 256): PrefillTile(128, 64, 8, 2),
            # Wider than any model that is known. Elsewhere such keys take the smallest tile: nothing was compiled.
            (320, 64): PrefillTile(128, 64, 8, 3),
            (320, 256): PrefillTile(128, 64, 8, 2),
            (384, 128): PrefillTile(128, 64, 8, 2),
            (384, 256): PrefillTile(128, 32, 8, 2),
        },
    ),
    # Compiled. Tiles of 64 query rows would multiply in tensor memory: all of them spill, and the Hopper one, of 64
    # tokens in two stages, wants 345 KiB of shared memory.
    "sm_100": Tiles(
        decode={
            "16-bit": {
                16: {640: (64, 4, 3, 2)},
                32: {288: (64, 4, 2, 2), 640: (64, 8, 2, 1)},
            },
            "fp8": {
                16: {288: (64, 8, 3, 1), 576: (32, 8, 3, 1), 640: (64, 8, 3, 1)},
                32: {288: (64, 8, 2, 1), 640: (16, 8, 2, 1)},
            },
            "float32": {16: {288: (16, 4, 1, 2), 640: (16, 8, 1, 1)}},
        },
        prefill={
            (96, 64): PrefillTile(128, 64, 8, 3),
            (192, 128): PrefillTile(128, 64, 8, 2),
            (256, 256): PrefillTile(64, 32, 8, 3),
        },
    ),
    # Compiled. 100 KiB an SM as sm_86, but other registers.
    "sm_120": Tiles(
        decode={
            "16-bit": {
                16: {288: (64, 4, 3, 2), 576: (64, 8, 3, 1), 640: (32, 8, 3, 1)},
                32: {288: (64, 8, 2, 1), 640: (32, 8, 2, 1)},
            },
            "fp8": {
                16: {288: (64, 8, 3, 1), 576: (32, 8, 3, 1), 640: (64, 8, 3, 1)},
                32: {288: (64, 8, 2, 1), 576: (16, 8, 2, 1), 640: (32, 8, 2, 1)},
            },
            "float32": {16: {288: (16, 4, 1, 2), 640: (16, 8, 1, 1)}},
        },
        prefill={
            (96, 64): PrefillTile(128, 64, 8, 3),
            (192, 128): PrefillTile(128, 32, 8, 3),
            (256, 256): PrefillTile(64, 32, 8, 2),
        },
    ),
    # Compiled. 64 KiB a compute unit, but 512 registers a thread: one program of four warps takes more than half.
    "gfx942": Tiles(
        decode={
            "16-bit": {
                16: {288: (64, 4, 3, 1), 640: (32, 4, 3, 1)},
                32: {288: (64, 4, 2, 1), 640: (32, 4, 2, 1)},
            },
            "fp8": {
                16: {288: (64, 4, 3, 1), 640: (32, 4, 3, 1)},
                32: {288: (64, 4, 2, 1), 640: (32, 4, 2, 1)},
            },
            "float32": {16: {288: (16, 8, 1, 1), 640: (16, 4, 1, 1)}},
        },
        prefill={
            (96, 64): PrefillTile(128, 64, 8, 3),
            (192, 128): PrefillTile(128, 64, 8, 2),
            (256, 256): PrefillTile(64, 32, 8, 2),
        },
    ),
    # Triton's interpreter, where time goes by the number of operations.
    "interpreter": Tiles(
        decode={cache: {rows: {640: (64, 4, 1, 2)} for rows in (16, 32)} for cache in ("16-bit", "fp8", "float32")},
        prefill={(256, 256): PrefillTile(64, 64, 4, 1)},
    ),
}


@cache
def class_of(device: Device) -> str:
    """The class that a device is tiled as: a key of `TILES`."""
    if device.interpreted or device.kind == "cpu":
        return "interpreter"
    classes = [one for name in TILES if (one := _first(name)).kind == device.kind]
    fitting = [one for one in classes if one.shared_bytes <= device.shared_bytes]
    if not fitting:
        least = min(one.shared_bytes for one in classes)
        fitting = [one for one in classes if one.shared_bytes == least]
    return max(fitting, key=lambda one: (one.shared_bytes, one.arch <= device.arch, one.arch)).name


def _first(name: str) -> Device:
    return Device("none") if name == "interpreter" else device_called(name)


@cache
def decode_tile(rows: int, row_values: int, itemsize: int, device: Device, fp8: bool = False) -> DecodeTile:
    """The tile for requests of so many query rows: the least that holds them all, or the largest.

    row_values: of a cache row, latent and rotary.   itemsize: of queries, and of cached values where they are
    multiplied.   fp8: cached values are converted before.
    """
    by_rows = TILES[class_of(device)].decode["float32" if itemsize == 4 else "fp8" if fp8 else "16-bit"]
    most = next((most for most in by_rows if rows <= most), max(by_rows))
    return DecodeTile(most, *next(tile for width, tile in by_rows[most].items() if row_values <= width))


@cache
def prefill_tile(device: Device, itemsize: int, qk_width: int, v_width: int) -> PrefillTile:
    """The tile for keys and values of these widths, padding included."""
    name = class_of(device)
    if itemsize == 4 and name != "interpreter":
        return _SMALL
    by_widths = TILES[name].prefill.items()
    return next((tile for (qk, v), tile in by_widths if qk_width <= qk and v_width <= v), _SMALL)
