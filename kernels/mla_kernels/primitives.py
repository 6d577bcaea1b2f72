"""What Triton kernels share: constants, dot products that a GPU and the interpreter both do right, refusals."""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def refusals(device, **dtypes) -> list[str]:
    """Why plain Triton kernels cannot run on `device` with these dtypes, given by what users call the tensors."""
    reasons = []
    if not device.runs_triton:
        reasons.append(f"needs a GPU (or TRITON_INTERPRET=1), got {device}")
    if device.kind == "cuda" and device.arch < 80:
        reasons.append(f"needs sm_80 or newer, got sm_{device.arch}")
    for what, dtype in dtypes.items():
        if dtype not in FLOATS:
            reasons.append(f"{what} must be float32, float16 or bfloat16, got {dtype}")
    return reasons


def require_adjacent(**tensors) -> None:
    """Raise ValueError unless the values of every row are adjacent: kernels take all strides but the last."""
    wrong = [
        f"{name} has stride {x.stride(-1)}" for name, x in tensors.items() if x.shape[-1] > 1 and x.stride(-1) != 1
    ]
    if wrong:
        raise ValueError(f"the last dimension must be contiguous: {', '.join(wrong)}")


@triton.jit
def dot_operand(x, UPCAST: tl.constexpr):
    """`x` as tl.dot can take it: the interpreter keeps bfloat16 as integers, and multiplies those."""
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")
