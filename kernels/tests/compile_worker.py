"""Compile every GPU kernel for a GPU that is not there, exactly as `run` would launch it.

    python compile_worker.py cuda 86                 one JSON line for each compiled variant of every kernel
    python compile_worker.py cuda 90 gluon_sm90      only these operations or kernels

`run` is called for real, with CPU tensors, a made-up Device and a Triton driver that knows a target but launches
nothing. So tile rules, constants and options are the ones that a user's machine would get. Each line ends with the
`faults` of what was compiled: none, or the test fails. Must run without TRITON_INTERPRET.
"""

import contextlib
import io
import json
import sys
from functools import partial
from itertools import product

import torch
from compile_faults import HOPPER, faults
from compiled_code import instructions, resources, unordered_arrivals
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import mla_kernels.device
from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, format_of, launching, split_for
from mla_kernels.testing import make_decode, make_pool, make_prefill, make_so_far, pack_cache

GEOMETRIES = {  # num_heads, kv_lora_rank, nope, rope, v
    "DeepSeek-V3 TP8": (16, 512, 128, 64, 128),
    "DeepSeek-V3": (128, 512, 128, 64, 128),
    "GLM-4.7-Flash": (20, 512, 192, 64, 256),
    "MiniCPM3": (40, 256, 64, 32, 64),
    "NoPE": (64, 512, 256, 0, 256),
}
TILE_SCALED = ("DeepSeek-V3 TP8", "GLM-4.7-Flash")  # 512 + 64, as engines have them; query tiles of 16, 32 and 64 rows
EVERY_VARIANT = "DeepSeek-V3 TP8"  # float16, float32 and every option are compiled for this one alone, to save time
# What is left to see of these is that they compile: sm_89 has the tiles of sm_86, and what those of the other two take
# is in tile_resources.csv.
COMPILED_FOR_ONE = (89, 100, 120)
LEAST_SHARED = 86  # where most kernels could fail: every dtype of queries meets an fp8 cache there
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170, "gfx942": 304}
MAX_QUERY_LEN = 4
# (heads, query tokens, page size, rope, dtype), where a list of query tokens is ragged, and with fixed splits their
# tokens. Heads, pages, rope, dtype and ragged change the code: every value of each is here. Pages below 64 tokens take
# several boxes for a block, those above begin inside one, and 1 and 48 are gathered row by row.
BF16, FP16, FP8, PACKED = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8
GLUON_SM90 = (
    (16, 1, 64, 64, BF16),
    (16, 4, 64, 64, FP16),
    (16, [4, 1], 64, 64, BF16),
    (16, 1, 64, 0, BF16),
    (16, 1, 16, 64, BF16),
    (5, [1, 4], 16, 0, FP16),
    (128, 1, 64, 64, BF16),
    (128, 4, 128, 0, FP16),
    (128, 4, 32, 64, BF16),
    (5, 4, 32, 0, BF16),
    (5, 1, 128, 64, BF16),
    (16, [1, 4], 128, 64, FP16),
    (16, 1, 1, 64, BF16),
    (5, [1, 4], 48, 0, BF16),
    (64, 1, 64, 64, BF16, 768),
    (64, [1, 4], 64, 64, BF16, 768),
    (128, 1, 64, 64, BF16, 1024),
    (40, [1, 4], 16, 0, FP16, 576),
    (64, 1, 1, 64, BF16, 768),
    (40, [1, 4], 48, 0, BF16, 576),
)
# As above, where products are transposed or the cache is fp8; and the dtype of the cache before the splits. With splits
# products are transposed by the heads alone, in tiles of 16, 32 and 64 query rows.
GLUON_SM90_FEW = (
    (16, 1, 64, 64, BF16, BF16),
    (32, 1, 16, 64, FP16, FP16),
    (5, [1, 4], 128, 0, BF16, BF16),
    (8, 4, 48, 64, BF16, BF16),
    (16, 1, 64, 64, BF16, FP8),
    (16, 1, 1, 64, BF16, FP8),
    (3, [1, 4], 128, 0, BF16, FP8),
    (4, 4, 48, 64, FP16, FP8),
    (32, 1, 64, 64, BF16, FP8),
    (5, [1, 5], 16, 0, FP16, FP8),
    (128, 4, 64, 64, BF16, FP8),
    (40, 1, 16, 64, BF16, FP8),
    (16, [1, 4], 48, 0, FP16, FP8),
    (16, 1, 64, 64, BF16, PACKED),
    (16, 1, 1, 64, BF16, PACKED),
    (5, [1, 4], 1, 0, FP16, PACKED),
    (32, 1, 64, 64, BF16, PACKED),
    (8, 4, 48, 64, BF16, PACKED),
    (32, 1, 16, 64, FP16, PACKED),
    (3, [1, 4], 128, 0, BF16, PACKED),
    (128, 1, 64, 64, BF16, PACKED),
    (16, [1, 4], 48, 64, FP16, PACKED),
    (16, 1, 64, 64, BF16, BF16, 384),
    (16, [1, 2], 64, 64, BF16, BF16, 384),
    (16, [1, 4], 64, 64, BF16, BF16, 384),
    (5, 1, 16, 0, FP16, FP16, 256),
    (5, 4, 128, 0, BF16, BF16, 256),
    (20, 4, 32, 64, FP16, FP16, 384),
    (32, 1, 64, 64, BF16, BF16, 512),
    (16, 1, 1, 64, BF16, BF16, 384),
    (5, [1, 4], 48, 0, BF16, BF16, 256),
    (16, 4, 48, 64, BF16, BF16, 384),
)
# (nope, rope, v, dtype): widths change how many columns there are to copy and multiply, and how long blocks are.
GLUON_SM90_RAGGED = (
    (128, 64, 128, BF16),
    (128, 64, 128, FP16),
    (192, 64, 256, BF16),
    (256, 0, 256, BF16),
    (64, 64, 64, BF16),
    (64, 0, 128, FP16),
    (128, 128, 64, BF16),
)
PREFILL_FORMS = ((True, False), (False, False), (False, True))  # causal, accumulate
PIECES = (None, 2)  # of keys, where a kernel cuts them
OUTPUTS = ("out_TNV", "lse_TN")


class TargetOnly:
    """A driver without a device: enough for Triton to compile."""

    def __init__(self, device: Device):
        warp = 64 if device.kind == "hip" else 32
        self.target = GPUTarget(device.kind, device.arch, warp)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return hash(self.target)  # Triton keeps what it has compiled by the device's number

    def get_current_stream(self, device):
        return 0


LOGS: dict[str, str] = {}  # by the hash of a kernel


@contextlib.contextmanager
def compiled_instead_of_launched(device: Device):
    """Collect (function, kernel, what ptxas said) of every kernel launch, and launch nothing. Gluon's functions are
    JITFunctions too."""
    compiled = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
        # Triton compiles what it has compiled before only once, and a log is never empty.
        log = LOGS.setdefault(kernel.hash, said.getvalue())
        compiled.append((self.__name__, kernel, log))
        return kernel

    driver.set_active(TargetOnly(device))
    launching.BY_TABLE = False  # every launch shall be seen
    # The log of Triton's own call of ptxas: the right one of its several tools, and the options that it gave.
    knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
    knobs.compilation.disable_line_info = True  # it takes an eighth of the time, and changes no instruction
    # An engine may listen to what is compiled (vLLM does), and then Triton writes every constant as JSON.
    knobs.runtime.jit_post_compile_hook = lambda **_: None
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def launch_case(run, case):
    run(*case.arrays, **case.options)


def _is_scaled(dtype, cache_dtype) -> bool:
    """With a scale and without one are two variants; which queries go with which does not matter."""
    return cache_dtype == FP8 and dtype == BF16


def launch_decode(run, geometry, dtype, cache_dtype, every: bool):
    options = {"page_size": 64, "dtype": dtype, "cache_dtype": cache_dtype, "needles": False}
    options["cache_scale"] = 0.5 if _is_scaled(dtype, cache_dtype) else None
    for query_len in (1, MAX_QUERY_LEN) if every else (1,):
        case = make_decode(geometry, [70, 1], query_lens=query_len, **options)
        launch_case(run, case)
        if query_len == 1:
            case.options["split_tokens"] = split_for(geometry)
            launch_case(run, case)


def launch_prefill(run, geometry, dtype, cache_dtype, every: bool):
    for causal, accumulate in PREFILL_FORMS if every and dtype == BF16 else PREFILL_FORMS[::2]:
        launch_ragged(run, make_prefill(geometry, [5], causal=causal, dtype=dtype, needles=False), accumulate)


def launch_ragged(run, case, accumulate: bool, **options):
    options |= dict(zip(OUTPUTS, make_so_far(case), strict=True))
    run(*case.arrays, **case.options, accumulate=accumulate, **options)


def _pool(geometry, dtype):
    cache, table = make_pool([torch.zeros(20, geometry.latent_dim)], geometry.latent_dim, page_size=16, generator=None)
    return pack_cache(cache, geometry) if dtype == PACKED else cache.to(dtype), table


def _scaled(dtype, cache_dtype) -> dict:
    return {"cache_scale": torch.ones(1)} if _is_scaled(dtype, cache_dtype) else {}


def launch_cache_write(run, geometry, dtype, cache_dtype, every: bool):
    cache, _ = _pool(geometry, cache_dtype)
    rows = torch.zeros(3, geometry.latent_dim, dtype=dtype).split(
        [geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1
    )
    run(*rows, cache, torch.zeros(3, dtype=torch.int64), **_scaled(dtype, cache_dtype))


def launch_cache_gather(run, geometry, dtype, cache_dtype, every: bool):
    cache, table = _pool(geometry, cache_dtype)
    starts = torch.tensor([0], dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32)
    out = torch.zeros(20, geometry.latent_dim, dtype=dtype)
    run(cache, table, *starts, out, max_key_len=20, **_scaled(dtype, cache_dtype))


def launch_merge(run, geometry, dtype, cache_dtype, every: bool):
    out = torch.zeros(2, geometry.num_heads, geometry.v_head_dim, dtype=dtype)
    lse = torch.zeros(2, geometry.num_heads)
    run(out, lse, out.clone(), lse.clone())


def problem_of(geometry, dtype, page_size: int, cache_dtype=None, max_query_len: int = MAX_QUERY_LEN) -> Problem:
    layout = CacheLayout(geometry=geometry, format=format_of(cache_dtype or dtype), page_size=page_size)
    return Problem(layout=layout, dtype=dtype, max_query_len=max_query_len)


def decode_variants():
    from mla_kernels.decode import gluon_sm90

    few_rows, gluon_sm90._FEW_ROWS = gluon_sm90._FEW_ROWS, 0  # what it does with few rows: below
    for heads, query_len, page_size, rope, dtype, *split in GLUON_SM90:
        geometry = MLAGeometry(
            num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128
        )
        case = make_decode(geometry, [70, 4], query_lens=query_len, page_size=page_size, dtype=dtype, needles=False)
        tokens = "ragged" if isinstance(query_len, list) else f"query {query_len}"
        name = f"heads {heads}, {tokens}, page {page_size}, rope {rope}{', fixed splits' * bool(split)}"
        case.options.update({"split_tokens": split[0]} if split else {})
        yield name, problem_of(geometry, dtype, page_size), partial(launch_case, case=case)
    gluon_sm90._FEW_ROWS = few_rows
    for heads, query_len, page_size, rope, dtype, cache_dtype, *split in GLUON_SM90_FEW:
        geometry = MLAGeometry(
            num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=rope, v_head_dim=128
        )
        options = {"page_size": page_size, "dtype": dtype, "cache_dtype": cache_dtype, "needles": False}
        options["cache_scale"] = 0.5 if cache_dtype == FP8 and page_size == 64 else None
        case = make_decode(geometry, [70, 4], query_lens=query_len, **options)
        tokens = "ragged" if isinstance(query_len, list) else f"query {query_len}"
        name = f"heads {heads}, {tokens}, page {page_size}, rope {rope}, cache {format_of(cache_dtype).name}"
        name += ", fixed splits" * bool(split)
        case.options.update({"split_tokens": split[0]} if split else {})
        problem = problem_of(geometry, dtype, page_size, cache_dtype, case.options["query_len"])
        yield name, problem, partial(launch_case, case=case)


def prefill_variants():
    for number, (nope, rope, v, dtype) in enumerate(GLUON_SM90_RAGGED):
        geometry = MLAGeometry(
            num_heads=3, kv_lora_rank=512, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v
        )
        # Of the first geometry every form; of the others, in turn, each form whole or in pieces.
        forms = (
            product(PREFILL_FORMS, PIECES)
            if not number
            else zip(PREFILL_FORMS[::2], PIECES[:: (-1) ** number], strict=True)
        )
        for (causal, accumulate), pieces in forms:
            case = make_prefill(geometry, [70, 4], causal=causal, dtype=dtype, needles=False)
            name = f"nope {nope}, rope {rope}, v {v}, {'causal' if causal else 'every key'}"
            name += f"{', accumulated' * accumulate}{', in pieces' * bool(pieces)}"
            launch = partial(launch_ragged, case=case, accumulate=accumulate, pieces=pieces)
            yield name, problem_of(geometry, dtype, 64), launch


HOPPER_VARIANTS = {"gluon_sm90": decode_variants, "gluon_sm90_ragged": prefill_variants}


def variants(operation: str, kernel: str, device: Device):
    """(name, problem, what launches the kernel for it)."""
    if kernel in HOPPER:
        yield from HOPPER_VARIANTS[kernel]()
        return
    for name, (heads, latent, nope, rope, v) in GEOMETRIES.items():
        if device.arch in COMPILED_FOR_ONE and name != EVERY_VARIANT:
            continue
        geometry = MLAGeometry(
            num_heads=heads, kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v
        )
        launch = partial(globals()[f"launch_{operation}"], geometry=geometry, every=name == EVERY_VARIANT)
        knows_cache = operation in ("decode", "cache_write", "cache_gather")
        for dtype, cache_dtype in dtypes_of(name, device) if knows_cache else plain_dtypes(name):
            problem = problem_of(geometry, dtype, 16, cache_dtype)
            yield name, problem, partial(launch, dtype=dtype, cache_dtype=cache_dtype)


def plain_dtypes(name: str) -> list[tuple]:
    """(dtype of queries, of the cache) of a geometry, where these are the same."""
    return [(one, one) for one in ((BF16, FP16, torch.float32) if name == EVERY_VARIANT else (BF16,))]


def dtypes_of(name: str, device: Device) -> list[tuple]:
    """(dtype of queries, of the cache): of most pairs of a geometry and a GPU one cache format, in turn, so that each
    geometry has every format on some GPUs, and each GPU has it with some geometries."""
    packed = [(BF16, PACKED)] if name in TILE_SCALED else []
    if name != EVERY_VARIANT:
        turn = list(GEOMETRIES).index(name) + list(SMS).index(device.arch)
        return [(BF16, (BF16, FP8)[turn % 2]), *packed]
    queries = (BF16,) if device.arch in COMPILED_FOR_ONE else (BF16, torch.float32)
    queries += (FP16,) if device.arch == LEAST_SHARED else ()
    return [*plain_dtypes(name), *((one, FP8) for one in queries), *packed]


def compile_kernel(operation: str, kernel, device: Device):
    """Rows that say what each variant of a kernel became on `device`."""
    for name, problem, launch in variants(operation, kernel.name, device):
        row = {"operation": operation, "kernel": kernel.name, "variant": name, "dtype": str(problem.dtype)}
        row["cache"] = problem.layout.format.name
        row["page_size"] = problem.layout.page_size
        row["query_rows"] = problem.geometry.num_heads * problem.max_query_len
        if reasons := kernel.unsupported(problem, device):
            yield {**row, "refused": reasons}
            continue
        with compiled_instead_of_launched(device) as compiled:
            launch(kernel.run)
        for function, variant, log in compiled:
            row |= {"function": function, "limit": device.shared_bytes, **resources(variant, device, log)}
            if kernel.name in HOPPER:
                row["instructions"] = instructions(variant) if function in HOPPER[kernel.name] else {}
                row["unordered_arrivals"] = unordered_arrivals(variant)
            yield {**row, "faults": faults(row)}


def main(kind: str, arch: str, *only: str) -> None:
    arch = int(arch) if kind == "cuda" else arch
    device = Device(kind, arch, f"{kind} {arch}", SMS[arch])
    mla_kernels.device.device_of = lambda where: device  # before kernels are imported, which take it by name
    for operation, kernels in OPERATIONS.items():
        for kernel in kernels:
            wanted = not only or operation in only or kernel.name in only
            if wanted and not kernel.name.startswith(("torch_", "flashinfer_")):
                for row in compile_kernel(operation, kernel, device):
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
