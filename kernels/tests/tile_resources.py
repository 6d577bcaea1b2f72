"""Find tiles for the portable kernels on GPUs that are not here: what mla_kernels/tiles.py has for classes that nobody
has measured.

    python tile_resources.py                   every class; a quarter of an hour on two cores
    python tile_resources.py sm_86 gfx942      these alone, the others' lines stay

`make tile-resources` calls it. For each cache, tile of query rows and width, candidates are compiled as `run` would
launch them (compile_worker.py), the preferred first, until one has no `faults`: it spills no register, and an SM has
shared memory and registers for as many programs as it assumes. kernels/benchmarks/results/tile_resources.csv has a line
for each that was compiled: what the greediest of its forms takes (cache formats, page sizes, GPUs of the class), or the
first form with a fault. For sm_90, which was measured, it has what is in the table.

Nothing runs: what a tile costs in time nobody knows. So candidates go by what was found on an H200: those that load
ahead before those of one stage; of these the largest tile first; of one size two programs of four warps on an SM, then
one of eight, then one of four; then most stages.
Must run without TRITON_INTERPRET.
"""

import csv
import os
import pathlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import torch
import triton
from compile_faults import MOST_SPILLED
from compile_worker import compiled_instead_of_launched, launch_case, launch_ragged
from compiled_code import resources

from mla_kernels import Device, MLAGeometry, split_for
from mla_kernels.decode import triton_splitkv
from mla_kernels.device import device_called
from mla_kernels.prefill import triton_ragged
from mla_kernels.testing import make_decode, make_prefill
from mla_kernels.tiles import DecodeTile, PrefillTile, decode_tile, prefill_tile

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks/results/tile_resources.csv"
MEASURED = ("sm_90",)
CLASSES = {"sm_80": ("sm_80",), "sm_86": ("sm_86", "sm_89"), "sm_90": ("sm_90",), "sm_100": ("sm_100",)}
CLASSES |= {"sm_120": ("sm_120",), "gfx942": ("gfx942",)}  # and the GPUs to compile for
CACHES = {"16-bit": (torch.bfloat16,), "fp8": (torch.float8_e4m3fn, torch.uint8), "float32": (torch.float32,)}
DECODE = {576: (512, 64), 288: (256, 32), 640: (512, 128)}  # values of a cache row: latent and rotary width
USUAL = 576
PREFILL = {  # values of a key and a value: nope, rope and value widths
    (192, 128): ((128, 64, 128),),
    (96, 64): ((64, 32, 64),),
    (256, 256): ((192, 64, 256), (256, 0, 256)),
}
PREFILL_FORMS = ((True, False), (False, True))  # causal, accumulate
PAGES = (64, 16)  # tokens; a tile that is longer than a page looks every row up
TENSOR_COLUMNS = 512  # of an SM's tensor memory, which Blackwell alone has


class Key(NamedTuple):
    """What the table has a tile for.

    operation: "decode" or "prefill".   cache: a key of CACHES; of prefill the dtype, "16-bit" or "float32".
    width: values of a cache row, or of a key and a value.   rows: of a tile of queries; 0 for prefill, which chooses.
    """

    operation: str
    cache: str
    width: int | tuple[int, int]
    rows: int


class Candidate(NamedTuple):
    """rows, tokens: query rows and cache tokens, or queries and keys.   programs: that an SM is to have room for."""

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int


class Taken(NamedTuple):
    """Registers of a thread, bytes that a thread spills, shared bytes of a program, its columns of tensor memory; bytes
    spilled with fixed splits, which few ask for: what the compile tests allow is enough there."""

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_columns: int = 0
    spilled_in_splits: int = 0


def keys():
    yield from (Key("decode", "float32", width, 16) for width in DECODE)
    yield from (Key("decode", *rest) for rest in product(("16-bit", "fp8"), DECODE, (16, 32, 64)))
    yield from (Key("prefill", "16-bit", widths, 0) for widths in PREFILL)


def candidates(key: Key) -> list[Candidate]:
    """The preferred first."""
    if key.cache == "float32":
        return [Candidate(16, 16, 4, 1, 2), Candidate(16, 16, 8, 1, 1), Candidate(16, 16, 4, 1, 1)]
    if key.operation == "prefill":
        shapes = product(((128, 8, 1), (64, 4, 2), (64, 8, 1), (64, 4, 1), (32, 4, 2)), (64, 32), (3, 2, 1))
        found = [Candidate(queries, keys, warps, stages, n) for (queries, warps, n), keys, stages in shapes]
        return sorted(
            found,
            key=lambda one: (one.stages > 1, one.rows * one.tokens, one.rows, one.programs, one.stages),
            reverse=True,
        )
    shapes = ((8, 1),) if key.rows == 64 else ((4, 2), (8, 1), (4, 1))
    stages = (3, 2, 1) if key.rows == 16 else (2, 1)  # three pay for 16 rows alone, on an H200
    found = [
        Candidate(key.rows, tokens, warps, n, programs)
        for (warps, programs), tokens, n in product(shapes, (64, 32, 16), stages)
    ]
    return sorted(
        found, key=lambda one: (one.stages > 1, one.tokens, one.programs, one.warps, one.stages), reverse=True
    )


def in_table(device: Device, key: Key) -> Candidate:
    """What `device` gets from mla_kernels/tiles.py."""
    if key.operation == "prefill":
        queries, keys, warps, stages = prefill_tile(device, _itemsize(key), *key.width)
        return Candidate(queries, keys, warps, stages, 8 // warps)
    return Candidate(*decode_tile(key.rows, key.width, _itemsize(key), device, key.cache == "fp8"))


def faults(one: Candidate, found: Taken, device: Device) -> list[str]:
    """What speaks against a candidate, "wanted, got"."""
    amd = device.kind == "hip"
    lanes, all_registers, overhead = (64, 4 * 512 * 64, 0) if amd else (32, 64 << 10, 1 << 10)
    threads, per_thread = one.warps * lanes, -(-found.registers // 8) * 8
    limits = {
        "registers": (threads * per_thread, all_registers),
        "shared bytes": (found.shared + overhead, device.shared_bytes + overhead),
        "columns of tensor memory": (found.tensor_columns, TENSOR_COLUMNS),
    }
    wrong = [f"no spills, got {found.spilled} bytes"] if found.spilled else []
    if found.spilled_in_splits > MOST_SPILLED:
        wrong.append(f"at most {MOST_SPILLED} bytes spilled with fixed splits, got {found.spilled_in_splits}")
    return wrong + [
        f"{one.programs} programs in {limit} {what}, got {took} each"
        for what, (took, limit) in limits.items()
        if one.programs * took > limit
    ]


def _itemsize(key: Key) -> int:
    return 4 if key.cache == "float32" else 2


def _geometry(heads=3, latent=512, nope=128, rope=64, v=128):
    return MLAGeometry(num_heads=heads, kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v)


def _forms(key: Key, one: Candidate):
    """What launches the kernel with a candidate, in each form that there is."""
    dtype = torch.float32 if key.cache == "float32" else torch.bfloat16
    if key.operation == "decode":
        triton_splitkv.decode_tile = lambda *_: DecodeTile(*one)
        latent, rope = DECODE[key.width]
        heads = 128 if one.rows == 64 else one.rows  # as many as need tiles of 64 rows for one token
        usual = key.width == USUAL  # what engines have with tile-scaled rows, and in every form
        for cache in CACHES[key.cache] if usual else CACHES[key.cache][:1]:
            options = {"dtype": dtype, "cache_dtype": cache, "needles": False}
            options["cache_scale"] = 0.5 if cache == torch.float8_e4m3fn else None
            pages = PAGES if usual and cache != torch.uint8 and one.tokens > min(PAGES) else PAGES[:1]
            geometry = _geometry(heads, latent, rope=rope)
            cases = [make_decode(geometry, [70, 1], page_size=page, **options) for page in pages]
            for case in cases:
                yield lambda case=case: launch_case(triton_splitkv.run, case)
            if usual:
                cases[0].options["split_tokens"] = split_for(geometry)
                yield lambda case=cases[0]: launch_case(triton_splitkv.run, case)
        return
    triton_ragged.prefill_tile = lambda *_: PrefillTile(*one[:4])
    for (nope, rope, v), (causal, accumulate) in product(PREFILL[key.width], PREFILL_FORMS):
        case = make_prefill(_geometry(nope=nope, rope=rope, v=v), [5], causal=causal, dtype=dtype, needles=False)
        yield lambda case=case, accumulate=accumulate: launch_ragged(triton_ragged.run, case, accumulate)


class NotLaunched:
    """In the place of a kernel that is of no interest here."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


def taken(key: Key, one: Candidate, device: Device) -> Taken:
    """The most that any form takes, or what was found at the first fault."""
    most = Taken()
    for launch in _forms(key, one):
        with compiled_instead_of_launched(device) as compiled:
            launch()
        ((function, kernel, log),) = compiled
        found = resources(kernel, device, log)
        spilled = (0, found["spilled"]) if function == "_fixed_splits_kernel" else (found["spilled"], 0)
        columns = getattr(kernel.metadata, "tmem_size", 0) or 0
        numbers = (found["registers"], spilled[0], found["shared"], columns, spilled[1])
        most = Taken(*map(max, most, numbers))
        if faults(one, most, device):
            break
    return most


def hopeless(key: Key, one: Candidate, device: Device) -> bool:
    """Whether shared memory cannot do, even if it held one tile of cached values, or of keys and values, alone."""
    values = one.tokens * (sum(key.width) if key.operation == "prefill" else key.width)
    return one.programs * values * (1 if key.cache == "fp8" else _itemsize(key)) > device.shared_bytes


def compile_key(name: str, key: Key) -> list[tuple[Candidate, Taken]]:
    """The candidates of a class that were tried, and what they take: the last has no fault, if any has none."""
    tried, devices = [], [device_called(target) for target in CLASSES[name]]
    triton_splitkv._merge_kernel, triton_splitkv.merge_splits = NotLaunched(), lambda *_, **__: None
    for one in [in_table(devices[0], key)] if name in MEASURED else candidates(key):
        if any(hopeless(key, one, device) for device in devices):
            continue
        most, wrong = Taken(), []
        for device in devices:
            triton_splitkv.device_of = triton_ragged.device_of = lambda where, device=device: device
            most = Taken(*map(max, most, taken(key, one, device)))
            wrong = faults(one, most, device)
            if wrong:
                break
        tried.append((one, most))
        print(name, *key, *one, *most, *wrong, flush=True)
        if not wrong:
            break
    return tried


def preferred(found: dict, name: str, key: Key) -> tuple[Candidate, Taken] | None:
    """What a class takes, and what that takes: the candidate without faults, else of those that fit the first that
    spills least; None if none fits. found: the report.

    Tiles of 64 query rows are taken only if rows of the usual width neither spill then nor make them shorter than those
    of 32, which would be the larger ones.
    """
    device = device_called(name)
    fit = [both for both in found[name, key] if not faults(both[0], both[1]._replace(spilled=0), device)]
    if key.rows == 64 and key.width != USUAL:
        fit = fit if preferred(found, name, key._replace(width=USUAL)) else []
    elif key.rows == 64:
        half, _ = preferred(found, name, key._replace(rows=32))
        fit = [(one, most) for one, most in fit if not most.spilled and one.tokens >= half.tokens]
    return min(fit, key=lambda both: both[1].spilled, default=None)


HEADER = ("triton", "class", "operation", "cache", "width", *Candidate._fields, *Taken._fields)


def read(path: pathlib.Path = RESULTS) -> dict[tuple[str, Key], list[tuple[Candidate, Taken]]]:
    """(class, key) -> the candidates that were tried, in order."""
    found, split = {}, len(Candidate._fields)
    with path.open(newline="") as file:
        for _, name, operation, cache, width, *numbers in list(csv.reader(file))[1:]:
            one, most = Candidate(*map(int, numbers[:split])), Taken(*map(int, numbers[split:]))
            if operation == "decode":
                key = Key(operation, cache, int(width), one.rows)
            else:
                key = Key(operation, cache, tuple(map(int, width.split("+"))), 0)
            found.setdefault((name, key), []).append((one, most))
    return found


def write(found, path: pathlib.Path = RESULTS) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(HEADER)
        for (name, key), tried in sorted(found.items(), key=lambda item: (list(CLASSES).index(item[0][0]), str(item))):
            width = "+".join(map(str, key.width)) if key.operation == "prefill" else key.width
            of_key = (triton.__version__, name, key.operation, key.cache, width)
            lines.writerows([(*of_key, *one, *most) for one, most in tried])


def main(*names: str) -> None:
    found = read() if RESULTS.exists() else {}
    jobs = [(name, key) for key in keys() for name in names or CLASSES]
    with (
        tempfile.TemporaryDirectory() as folder,  # a cache of its own: nothing is found there
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = folder  # before the pool starts a process
        for tried in pool.map(compile_key, *zip(*jobs, strict=True)):
            found[jobs[0]] = tried
            write(found)
            jobs = jobs[1:]


if __name__ == "__main__":
    main(*sys.argv[1:])
