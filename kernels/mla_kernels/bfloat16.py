"""Products of bfloat16 matrices on a CPU, for the kernels in plain torch.

Where a processor multiplies bfloat16 itself, that takes a fraction of the time of float32; but what PyTorch returns is
bfloat16, 8 bits of mantissa, too few for a score that goes through an exponential.
"""

import functools

import torch


@functools.cache
def multiplies_bfloat16(*dtypes: torch.dtype) -> bool:
    """Whether these are all bfloat16, this processor multiplies it (AVX512-BF16 or AMX), and its products are summed up
    in float32 and rounded once, so that `exact_product` is right. The last is tried."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if set(dtypes) != {torch.bfloat16} or not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    generator = torch.Generator().manual_seed(0)
    a_DXK, b_DKY = (torch.randn(2, *shape, generator=generator).bfloat16() for shape in ((16, 576), (576, 256)))
    wanted = torch.bmm(a_DXK.double(), b_DKY.double())
    answers = exact_product(a_DXK, b_DKY), exact_product(a_DXK[0], b_DKY[0])[None]
    return all(bool((got - wanted[: len(got)]).abs().max() <= wanted.abs().max() * 2**-15) for got in answers)


def rounded_product(a_DXK, b_DKY):
    """In bfloat16, as PyTorch returns it. A matrix by itself, without D, takes it less time than a batch of one."""
    return torch.mm(a_DXK, b_DKY) if a_DXK.dim() == 2 else torch.bmm(a_DXK, b_DKY)


def exact_product(a_DXK, b_DKY):
    """Products of bfloat16 matrices as float32 [D, X, Y]; D may be left out.

    PyTorch's, which are rounded, and what rounding took from them: a second product that starts at their negative.
    That is at most 2^-9 of the first, and so is its own rounding of it. A product beyond float32's range is NaN.
    """
    rounded_DXY = rounded_product(a_DXK, b_DKY)
    add = torch.addmm if a_DXK.dim() == 2 else torch.baddbmm
    return add(rounded_DXY, a_DXK, b_DKY, beta=-1).float().add_(rounded_DXY)
