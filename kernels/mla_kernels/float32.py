"""Products of float32 matrices on a CPU, for the kernels in plain torch.

PyTorch's own ask BLAS, which takes 1.5 to 2.5 times as long as oneDNN for few rows on processors that its makers do not
sell. oneDNN is asked for float32 through an operator of compiled models, which nothing documents: so it is tried.
"""

import functools

import torch

_LITTLE = 3 << 19  # multiply-adds up to which asking oneDNN takes longer than BLAS


@functools.cache
def _linear():
    """The operator, if there is one and it is right."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        a_XK, b_YK = (torch.randn(rows, 96, generator=torch.Generator().manual_seed(rows)) for rows in (16, 128))
        wrong = (linear(a_XK, b_YK, None, "none", [], "") - a_XK.double() @ b_YK.double().T).abs().max()
    except (AttributeError, RuntimeError):  # no such operator, or another one
        return None
    return linear if wrong < 1e-4 else None


def product(a_XK, b_YK):
    """a times b transposed [X, Y]. `b` is a matrix whose rows or columns lie side by side without gaps: others take
    oneDNN a hundred times as long."""
    little = len(a_XK) * b_YK.numel() <= _LITTLE
    linear = None if little or a_XK.dtype != torch.float32 else _linear()
    return torch.mm(a_XK, b_YK.T) if linear is None else linear(a_XK, b_YK, None, "none", [], "")
