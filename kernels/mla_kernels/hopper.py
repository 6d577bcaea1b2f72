"""Gluon under one name in every Triton from 3.6 to 3.9, and two small tools for kernels on Hopper."""

import inspect

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

from mla_kernels.device import Device

# Triton 3.8 renamed these; 3.9 refuses the old names. Remove the old ones with Triton 3.7.
tma_load = getattr(tma, "async_load", None) or getattr(tma, "async_copy_global_to_shared", None)
cp_async = getattr(async_copy, "async_load", None) or getattr(async_copy, "async_copy_global_to_shared", None)
barrier = getattr(gl, "barrier", None) or getattr(gl, "thread_barrier", None)  # of the warps that run the same role
# Of a buffer in shared memory, as another dtype and shape. Triton 3.9 renamed it.
_buffer = gl.shared_memory_descriptor
reinterpret = getattr(_buffer, "reinterpret", None) or getattr(_buffer, "_reinterpret", None)
# Asked of the language itself: Gluon is experimental, and its shape says more than a version.
KNOWN_GLUON = all((tma_load, cp_async, barrier, reinterpret)) and (
    "functions_and_args" in inspect.signature(gl.warp_specialize).parameters
)


def device_refusals(device: Device) -> list[str]:
    """Why no kernel of ours in Gluon for Hopper can run on `device`."""
    reasons = []
    if not KNOWN_GLUON:
        reasons.append("needs the Gluon of Triton 3.6 or newer, got one whose warp_specialize takes other arguments")
    if device.kind != "cuda" or device.arch != 90:
        reasons.append(f"needs sm_90, got {device}")
    elif device.interpreted:
        reasons.append("needs a GPU: Triton's interpreter does not run Gluon")
    return reasons


SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# Of values of 8 bits, and the same buffers as words of 32: the same bytes.
SWIZZLED_CODES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
SWIZZLED_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
# Of 16 bytes a row, as bytes and as floats: the same bytes again.
NARROW = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2))
NARROW_FLOATS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))


@gluon.jit
def uniform(x):
    """`x`, which all threads of a warp agree on, told to the assembler: it then computes what follows from it, such as
    matrix descriptors, in uniform registers. Without, four moves to those stood between any two matrix instructions."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def ring(position, COUNT: gl.constexpr = 2):
    """(buffer, phase parity, zero) of the position-th use of COUNT buffers.

    The zero is one that the compiler cannot see. Where it indexes a buffer that never changes, descriptors of that
    buffer are computed beside the instruction that takes them, not ahead of the loop, which has no registers for them.
    """
    position = uniform(position)
    if COUNT == 2:
        buffer, turn = position & 1, position >> 1
    else:
        buffer, turn = position % COUNT, position // COUNT
    return buffer, turn & 1, position >> 30
