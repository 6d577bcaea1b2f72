"""What is in the code of one compiled kernel: what it takes of a GPU, and the instructions that matter on Hopper."""

import pathlib
import re
import subprocess
import tempfile

import triton
from compile_faults import SERIALISED

from mla_kernels import Device


def resources(kernel, device: Device, log: str) -> dict:
    """Shared memory, registers and spilled bytes of one compiled kernel, and whether its wgmma wait for one another."""
    found = {"shared": kernel.metadata.shared}
    if device.kind == "hip":
        text = kernel.asm["amdgcn"]
        found["registers"] = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
        found["spilled"] = 4 * max(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        return found
    found["registers"] = int(re.search(r"REG:(\d+)", on_cubin(kernel, "cuobjdump", "-res-usage"))[1])
    found["spilled"] = int(re.search(r"(\d+) bytes stack frame", log)[1])
    found["serialised"] = [line for line in log.splitlines() if SERIALISED.search(line)]
    return found


def on_cubin(kernel, tool: str, *options: str) -> str:
    """What a tool that comes with Triton says about a kernel's machine code."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], check=True, capture_output=True, text=True).stdout


def instructions(kernel) -> dict:
    """How often the instructions that matter on Hopper are in the machine code.

    HGMMA and HMMA multiply matrices, a warpgroup's and a warp's. UTMALDG is TMA; ARRIVES tells a barrier of copies that
    threads started. LDL and STL are spills. (Kernels that merge multiply none, and what they spill ptxas says.)
    """
    text = on_cubin(kernel, "nvdisasm", "-c", "-ndf")  # without where branches go, which takes as long again
    names = re.findall(r"^\s*/\*\w+\*/\s+(?:@\S+\s+)?([A-Z]\w*)", text, re.MULTILINE)
    return {name: names.count(name) for name in ("HGMMA", "UTMALDG", "ARRIVES", "HMMA", "LDL", "STL")}


def unordered_arrivals(kernel) -> int:
    """How many arrivals at an mbarrier, made by one thread for its group, are not behind the group's own barrier: reads
    and writes of its other threads could come after those. Lines are read in their order, without branches. (Copies
    announced by expect_tx have one thread alone.)

    Roles stand between barriers of the whole program; one without a barrier of several warps is one warp's.
    """
    count = 0
    for role in re.split(r"\bbarrier(?:\.cta)?\.sync\s+\d+;", kernel.asm["ptx"]):
        several = r"\b(?:bar|barrier)(?:\.cta)?\.sync"
        barrier = several if re.search(several, role) else r"\bbar\.warp\.sync"
        behind = True
        for line in role.splitlines():
            if re.search(barrier, line):
                behind = True
            elif re.search(r"\b(ld|st|ldmatrix|stmatrix|atom|red)\.\S*shared|\bwgmma\.mma", line):
                behind = False
            elif re.search(r"\bmbarrier\.arrive\.(?!expect_tx)", line):
                count += not behind
    return count
