"""Values of a Gluon kernel that gluon_emulator.py runs: numbers and numpy arrays with the methods that Gluon's have,
and what inline assembly makes of them."""

from types import SimpleNamespace

import numpy as np
import torch

BFLOAT16 = np.uint16  # of which kernels have none


def floats(x):
    """float32 of float16, or of bfloat16's bits."""
    x = np.asarray(x)
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == BFLOAT16 else x.astype(np.float32)


class Int(int):
    """A scalar: an int with the methods of a Gluon one."""

    def to(self, dtype):
        return self


class Tensor(np.ndarray):
    type = SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        if dtype == BFLOAT16:
            rounded = torch.from_numpy(np.array(self, np.float32)).bfloat16()
            return tensor_of(rounded.view(torch.uint16).numpy())
        return self.view(dtype) if bitcast else self.astype(dtype)

    def permute(self, order):
        return self.transpose(order)


def tensor_of(x):
    x = np.asarray(x)
    if x.ndim == 0 and x.dtype.kind in "iub":
        return Int(x)
    return x.view(Tensor)


class _ConstInt(int):
    value = property(int)


class _ConstFloat(float):
    value = property(float)


def constexpr(x):
    return _ConstInt(x) if isinstance(x, int) else _ConstFloat(x) if isinstance(x, float) else SimpleNamespace(value=x)


def elementwise(function):
    """Numbers stay numbers: as arrays of float64 they would make everything float64."""
    return lambda *args: tensor_of(function(*(np.asarray(x) if isinstance(x, np.ndarray) else x for x in args)))


def inline_asm(asm, constraints, args, **_):
    """Texts are told apart by what is in them alone."""
    asm = getattr(asm, "value", asm)
    if "shfl" in asm:
        return args[0]
    if "prefetch" in asm:
        args[0].reach(None)
        return None
    words, factor = (torch.from_numpy(np.ascontiguousarray(x)) for x in (args[0], args[-1]))
    if "max." in asm:
        halves = (x.view(torch.float16 if "max.f16x2" in asm else torch.bfloat16) for x in (words, factor))
        return tensor_of(
            torch.maximum(*(x.abs().nan_to_num(0.0, posinf=torch.inf) for x in halves)).view(torch.int32).numpy()
        )
    if "e4m3" in asm and words.dtype == torch.int8:
        return tensor_of(words.view(torch.float8_e4m3fn).half().numpy())
    if "prmt" in asm:
        values = words.view(torch.float8_e4m3fn).half().view(*words.shape, 4)
        first = 0 if "0x5140" in asm else 2
        return tuple(tensor_of(values[..., first + i].numpy().copy()) for i in range(2))
    if "e4m3" in asm:
        values = words.view(torch.float8_e4m3fn).float()
        values = values * factor if "mul.f32" in asm else values
        values = values.bfloat16() if "bf16x2" in asm else values.half()
        pairs = values.view(*words.shape, 2, 2).view(torch.int32)[..., 0]
        return tuple(tensor_of(pairs[..., i].numpy().copy()) for i in range(2))
    if "sub.f32" in asm:  # two float16 as bfloat16, and what is missing then
        values = words.view(torch.float16).float()
        parts = values.bfloat16(), (values - values.bfloat16().float()).bfloat16()
        return tuple(tensor_of(x.view(torch.int32).numpy()) for x in parts)
    values = words.view(torch.bfloat16 if "0xffff0000" in asm else torch.float16).float()
    if constraints == "=f,=f,r":
        pairs = values.view(*words.shape, 2).numpy()
        return tuple(tensor_of(pairs[..., i].copy()) for i in range(2))
    values = values * factor if "mul.f32" in asm else values
    return tensor_of(values.half().view(torch.int32).numpy())
