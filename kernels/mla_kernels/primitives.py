"""What kernels share: constants, dots that a GPU and the interpreter both do right, refusals, outputs, scratch."""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
PACKED = torch.uint8  # of a cache of tile-scaled rows: see cache_layout.PackedRow


def cdiv(a: int, b: int) -> int:
    """As triton.cdiv, of which every call costs the host a microsecond."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """As triton.next_power_of_2, but 1 of 0."""
    return 1 << max(n - 1, 0).bit_length()


def refusals(device, *, cache: torch.dtype | None = None, **dtypes) -> list[str]:
    """Why plain Triton kernels cannot run on `device` with these dtypes, given by what users call the tensors."""
    reasons = []
    if not device.runs_triton:
        reasons.append(f"needs a GPU (or TRITON_INTERPRET=1), got {device}")
    if device.kind == "cuda" and device.arch < 80:
        reasons.append(f"needs sm_80 or newer, got sm_{device.arch}")
    for what, dtype in dtypes.items():
        if dtype not in FLOATS:
            reasons.append(f"{what} must be float32, float16 or bfloat16, got {dtype}")
    if cache not in (None, E4M3, PACKED, *FLOATS):
        reasons.append(
            f"cache must be float32, float16, bfloat16, float8_e4m3fn or bytes of tile-scaled rows, got {cache}"
        )
    return reasons


def as_codes(cache_AGK):
    """An fp8 cache as bytes, since not every GPU's Triton knows the type; any other as it is."""
    return cache_AGK.view(torch.uint8) if cache_AGK.dtype == E4M3 else cache_AGK


def require_adjacent(**tensors) -> None:
    """Raise ValueError unless the values of every row are adjacent: kernels take all strides but the last."""
    wrong = [
        f"{name} has stride {x.stride(-1)}" for name, x in tensors.items() if x.stride()[-1] != 1 and x.shape[-1] > 1
    ]
    if wrong:
        raise ValueError(f"the last dimension must be contiguous: {', '.join(wrong)}")


def decode_outputs(q_latent_TNL, requests: int, query_len: int, *, ragged: bool, out_TNL=None, lse_TN=None):
    """The out_TNL and lse_TN of a decode: those given, or new ones. ValueError if the queries do not fill the batch.

    Ragged requests may leave rows between them, which nobody writes: in new outputs these hold 0 and -inf.
    """
    tokens, needed = q_latent_TNL.shape[0], requests * query_len
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


def prefill_outputs(q_TNQ, v_width: int, out_TNV=None, lse_TN=None, *, accumulate: bool):
    """The out_TNV and lse_TN of a prefill: those given, or new ones, of 0 and -inf in rows that no request owns.
    ValueError if there is nothing to accumulate in."""
    shape = q_TNQ.shape[:2]
    if accumulate and (out_TNV is None or lse_TN is None):
        raise ValueError("accumulate needs out_TNV and lse_TN with what was seen so far; pass both, or leave it out")
    if out_TNV is None:
        out_TNV = q_TNQ.new_zeros(*shape, v_width)
    if lse_TN is None:
        lse_TN = q_TNQ.new_full(shape, -torch.inf, dtype=torch.float32)
    return out_TNV, lse_TN


def reaching_all(forms, max_requests: int, query_lens) -> list[tuple[int, int]]:
    """(requests, query tokens) of a few calls, small ones first, that between them have every form of all calls.

    forms(requests, query_len): everything about a call of that size that makes Triton compile another kernel.
    """
    seen, chosen = set(), {}
    for query_len in sorted(query_lens):
        for requests in range(1, max_requests + 1):
            of_call = set(forms(requests, query_len))
            if not of_call <= seen:
                seen |= of_call
                chosen[requests, query_len] = of_call
    for call, of_call in list(chosen.items()):  # later calls may have all that an earlier one was taken for
        if of_call <= set().union(*(others for other, others in chosen.items() if other != call)):
            del chosen[call]
    return list(chosen)


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


@triton.jit
def load_scale(scale_ptr):
    """The scale of an fp8 cache, 1 where there is none."""
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    return scale


@triton.jit
def from_cache(x, dtype: tl.constexpr):
    """What a cache holds, as `dtype`: values as they are, or e4m3 codes (uint8), whose scale is the caller's business.

    Integer arithmetic, for GPUs without fp8 and the interpreter alike. Exponent and mantissa of e4m3 are bits 7 to 13
    of a float16 that is 2^-8 as large (their biases are 7 and 15), and float16, bfloat16 and float32 hold all of its
    values.
    """
    if x.dtype == tl.uint8:
        code = x.to(tl.int16)
        magnitude = code & 0x7F
        bits = ((code & 0x80) << 8) | (magnitude << 7)
        bits = tl.where(magnitude == 0x7F, 0x7E00, bits)  # NaN, the only code that is no number
        x = bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return x.to(dtype)


@triton.jit
def load_tile_scales(row_ptr, tile, mask, L: tl.constexpr):
    """Scales [T, tiles] of the tiles `tile` [1, tiles] of tile-scaled rows, whose bytes begin at `row_ptr` [T, 1]."""
    return tl.load((row_ptr + L).to(tl.pointer_type(tl.float32)) + tile, mask=mask, other=0.0)


@triton.jit
def load_packed_rope(row_ptr, r, mask, ROPE_AT: tl.constexpr):
    """Rotary values r [1, R] of such rows, in bfloat16."""
    return tl.load((row_ptr + ROPE_AT).to(tl.pointer_type(tl.bfloat16)) + r, mask=mask, other=0.0)


@triton.jit
def to_cache(x, scale, dtype: tl.constexpr):
    """`x` as a cache of `dtype` holds it; uint8 is e4m3 codes of x / scale: to nearest, ties to even, at most 448.

    Integer arithmetic as in `from_cache`; the interpreter's own conversion is off by one for some values.
    """
    if dtype == tl.uint8:
        bits = tl.div_rn(x.to(tl.float32), scale).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # From 2^-6 on: the upper 7 bits below the sign with another bias, after rounding by those below.
        code = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        code = tl.minimum(code, 0x7E)
        # Below, codes count multiples of 2^-9, which is what the last bit of a float32 from 2^14 on stands for.
        small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
        code = tl.where(magnitude < 0x3C800000, small, code)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return x.to(dtype)
