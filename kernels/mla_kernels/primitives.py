"""What kernels share: constants, dots that a GPU and the interpreter both do right, refusals, outputs, scratch."""

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


def decode_outputs(q_latent_TNL, requests: int, query_len: int, *, ragged: bool, out_TNL=None, lse_TN=None):
    """The out_TNL and lse_TN of a decode: those given, or new ones. ValueError if the queries do not fill the batch.

    Ragged requests may leave rows between them, which nobody writes: in new outputs these hold 0 and -inf.
    """
    tokens, needed = len(q_latent_TNL), requests * query_len
    if not ragged and needed != tokens:
        raise ValueError(f"{requests} requests of {query_len} query tokens need {needed} queries, got {tokens}")
    if out_TNL is None:
        shape = q_latent_TNL.shape
        out_TNL = q_latent_TNL.new_zeros(shape) if ragged else q_latent_TNL.new_empty(shape)
    if lse_TN is None:
        lse_TN = q_latent_TNL.new_empty(q_latent_TNL.shape[:2], dtype=torch.float32)
        if ragged:
            lse_TN.fill_(-torch.inf)
    return out_TNL, lse_TN


def scratch(workspace, shapes, device: torch.device):
    """`workspace`, which must be at least as large as `shapes` ((shape, dtype) each, flat) ask, or new tensors."""
    if workspace is None:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes)
    for tensor, (shape, dtype) in zip(workspace, shapes, strict=True):
        if tensor.numel() < shape[0] or tensor.dtype != dtype:
            raise ValueError(f"scratch of {shape[0]} {dtype} needed, got {tensor.numel()} {tensor.dtype}")
    return workspace


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
