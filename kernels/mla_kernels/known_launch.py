"""Launching what was compiled before without asking Triton again, which would look at every argument to find it: that
takes longer than the launch."""

COMPILED: dict[tuple, object] = {}


def _kind(x: int) -> tuple:
    """What Triton's code for an integer argument depends on."""
    return x % 16, x == 1, x >= 2**31


def kinds(*tensors) -> tuple:
    """What code for these tensors depends on, beside widths, where no strides count but those of the last two, which
    are the outputs [T, N, V] and their LSE."""
    *_, out, lse = tensors
    strides = (*out.stride()[:2], *lse.stride())
    return (out.device.index, out.data_ptr() % 16, *(x.dtype for x in tensors), *map(_kind, strides))


def launch(kernel, key: tuple, programs: int, *args, options: dict, **constants) -> None:
    """Launch what was compiled of `kernel` for this key, on which all of it depends; it begins with the kernel's name.

    constants: the last arguments of the kernel, in their order.  options: Triton's, such as num_warps.
    """
    compiled = COMPILED.get(key)
    if compiled is None:
        COMPILED[key] = kernel[(programs,)](*args, **constants, **options)
    else:
        compiled[programs, 1, 1](*args, *constants.values())
