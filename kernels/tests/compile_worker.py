"""Compile every Triton kernel for a GPU that is not there, exactly as `run` would launch it.

    python compile_worker.py cuda 86        one JSON line for each compiled variant

`run` is called for real, with CPU tensors, a made-up Device and a Triton driver that knows a target but launches
nothing. So tile rules, constants and options are the ones that a user's machine would get. Must run without
TRITON_INTERPRET.
"""

import contextlib
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mla_kernels import OPERATIONS, CacheLayout, Device, MLAGeometry, Problem, format_of
from mla_kernels.testing import make_decode, make_pool, make_prefill

GEOMETRIES = {  # num_heads, kv_lora_rank, nope, rope, v
    "DeepSeek-V3 TP8": (16, 512, 128, 64, 128),
    "DeepSeek-V3": (128, 512, 128, 64, 128),
    "GLM-4.7-Flash": (20, 512, 192, 64, 256),
    "MiniCPM3": (40, 256, 64, 32, 64),
    "NoPE": (64, 512, 256, 0, 256),
}
EVERY_VARIANT = "DeepSeek-V3 TP8"  # float16, float32 and every option are compiled for this one alone, to save time
SMS = {80: 108, 86: 84, 89: 142, 90: 132, "gfx942": 304}
MAX_QUERY_LEN = 4


class TargetOnly:
    """A driver without a device: enough for Triton to compile."""

    def __init__(self, device: Device):
        warp = 64 if device.kind == "hip" else 32
        self.target = GPUTarget(device.kind, device.arch, warp)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiled_instead_of_launched(device: Device):
    """Collect what every kernel launch compiles to, and launch nothing."""
    compiled = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel.result() if hasattr(kernel, "result") else kernel))
        return kernel

    driver.set_active(TargetOnly(device))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def launch_decode(run, geometry, dtype, every: bool):
    for query_len in (1, MAX_QUERY_LEN) if every else (1,):
        case = make_decode(geometry, [70, 1], query_lens=query_len, page_size=64, dtype=dtype, needles=False)
        run(*case.arrays, **case.options)


def launch_prefill(run, geometry, dtype, every: bool):
    for causal in (True, False) if every else (True,):
        case = make_prefill(geometry, [5], causal=causal, dtype=dtype, needles=False)
        run(*case.arrays, **case.options)


def _pool(geometry, dtype):
    cache, table = make_pool([torch.zeros(20, geometry.latent_dim)], geometry.latent_dim, page_size=16, generator=None)
    return cache.to(dtype), table


def launch_cache_write(run, geometry, dtype, every: bool):
    cache, _ = _pool(geometry, dtype)
    rows = torch.zeros(3, geometry.latent_dim, dtype=dtype)
    run(*rows.split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1), cache, torch.zeros(3, dtype=torch.int64))


def launch_cache_gather(run, geometry, dtype, every: bool):
    cache, table = _pool(geometry, dtype)
    starts = torch.tensor([0], dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32)
    run(cache, table, *starts, torch.zeros(20, geometry.latent_dim, dtype=dtype), max_key_len=20)


def launch_merge(run, geometry, dtype, every: bool):
    out = torch.zeros(2, geometry.num_heads, geometry.v_head_dim, dtype=dtype)
    lse = torch.zeros(2, geometry.num_heads)
    run(out, lse, out.clone(), lse.clone())


def resources(kernel, device: Device) -> dict:
    """Shared memory, registers and spilled bytes of one compiled kernel."""
    found = {"shared": kernel.metadata.shared}
    if device.kind == "hip":
        text = kernel.asm["amdgcn"]
        found["registers"] = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        found["spilled"] = 4 * max(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        return found
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found["registers"] = int(re.search(r"REG:(\d+)", text)[1])
    found["spilled"] = int(re.search(r"STACK:(\d+)", text)[1])
    return found


def problems():
    """(name of the geometry, problem, whether to compile every option)."""
    for name, (heads, latent, nope, rope, v) in GEOMETRIES.items():
        every = name == EVERY_VARIANT
        geometry = MLAGeometry(
            num_heads=heads, kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v
        )
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if every else (torch.bfloat16,):
            layout = CacheLayout(geometry=geometry, format=format_of(dtype), page_size=16)
            yield name, Problem(layout=layout, dtype=dtype, max_query_len=MAX_QUERY_LEN), every


def compile_operation(operation: str, device: Device):
    """Rows that say what each variant of an operation's Triton kernel became on `device`."""
    kernel = next(k for k in OPERATIONS[operation] if k.name.startswith("triton"))
    kernel.load().device_of = lambda where: device
    for name, problem, every in problems():
        row = {"operation": operation, "geometry": name, "dtype": str(problem.dtype), "limit": device.shared_bytes}
        if reasons := kernel.unsupported(problem, device):
            yield {**row, "refused": reasons}
            continue
        with compiled_instead_of_launched(device) as compiled:
            globals()[f"launch_{operation}"](kernel.run, problem.geometry, problem.dtype, every)
        for function, variant in compiled:
            yield {**row, "function": function, **resources(variant, device)}


def main(kind: str, arch: str, *only: str) -> None:
    arch = int(arch) if kind == "cuda" else arch
    device = Device(kind, arch, f"{kind} {arch}", SMS[arch])
    for operation in only or OPERATIONS:
        for row in compile_operation(operation, device):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
