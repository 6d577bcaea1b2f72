"""Merge attention over two sets of keys in Triton: any GPU that Triton supports, and its CPU interpreter.

One program for a few (query, head) rows:
  1. each part's weight is exp(its LSE - the larger LSE), over the sum of both;
  2. a part without weight is not even read;
  3. output and log-sum-exp are replaced by the weighted sum and the merged one.
"""

import triton
import triton.language as tl

from mla_kernels.device import Device
from mla_kernels.launching import launch
from mla_kernels.primitives import cdiv, next_power_of_2, refusals, require_adjacent

# Shape suffixes: T query tokens, N heads, V value. In the kernel: a row is query * N + head.

_ROWS = 8


def unsupported(problem, device: Device) -> list[str]:
    return refusals(device, outputs=problem.dtype)


@triton.jit
def _weighted(ptr, weight, at, mask):
    """Values at `ptr` times their row's weight; 0 where there is none, even if the values are NaN."""
    mask = mask & (weight > 0)[:, None]
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32) * weight[:, None]


@triton.jit(
    do_not_specialize=["rows", "stride_lse_t", "stride_lse_n", "stride_part_lse_t", "stride_part_lse_n"],
    do_not_specialize_on_alignment=["lse_ptr", "part_lse_ptr"],  # of some tokens of a batch
)
def _merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, rows,
    stride_out_t, stride_out_n, stride_lse_t, stride_lse_n,
    stride_part_t, stride_part_n, stride_part_lse_t, stride_part_lse_n,
    N: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t, n, v = row // N, row % N, tl.arange(0, V_PAD)[None, :]
    real = row < rows
    lse_ptr += t * stride_lse_t + n * stride_lse_n
    lse = tl.load(lse_ptr, mask=real, other=-float("inf"))
    part_lse = tl.load(part_lse_ptr + t * stride_part_lse_t + n * stride_part_lse_n, mask=real, other=-float("inf"))

    top = tl.maximum(lse, part_lse)
    nothing = top == -float("inf")  # neither part saw a key: exp(-inf - 0) = 0
    shift = tl.where(nothing, 0.0, top)
    weight, part_weight = tl.exp(lse - shift), tl.exp(part_lse - shift)
    total = tl.where(nothing, 1.0, weight + part_weight)

    mask = real[:, None] & (v < V)
    at = (t * stride_out_t + n * stride_out_n)[:, None] + v
    at_part = (t * stride_part_t + n * stride_part_n)[:, None] + v
    x = _weighted(out_ptr, weight / total, at, mask) + _weighted(part_ptr, part_weight / total, at_part, mask)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)
    tl.debug_barrier()  # every warp has loaded every row's LSE before one replaces it
    tl.store(lse_ptr, top + tl.log(total), mask=real)


def run(out_TNV, lse_TN, part_TNV, part_lse_TN):
    """Same contract as reference.merge. All strides are free but that of V."""
    require_adjacent(out=out_TNV, part=part_TNV)
    T, N, V = out_TNV.shape
    if T == 0:
        return out_TNV, lse_TN
    launch(
        _merge_kernel, (cdiv(T * N, _ROWS),),
        out_TNV, lse_TN, part_TNV, part_lse_TN, T * N,
        *out_TNV.stride()[:2], *lse_TN.stride(), *part_TNV.stride()[:2], *part_lse_TN.stride(),
        N=N, V=V, V_PAD=next_power_of_2(V), BLOCK=_ROWS, num_warps=4,
    )  # fmt: skip
    return out_TNV, lse_TN
