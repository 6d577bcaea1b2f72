"""Make a call's launches again for tensors that lie elsewhere, without putting their arguments together anew.

Layers of a step call with the same shapes, strides and numbers, one after another: what their launches differ in is
addresses alone. The first such call is made as ever and its launches are kept, with which argument is which tensor's
address; for others these are put in. Nothing is guessed: a call with an argument whose address is no tensor's of the
call (a copy, say), or one of two that begin at the same byte, is not kept and made as ever each time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mla_kernels import launching
from mla_kernels.launching import Made, is_recording, recorded, start

_MOST = 1024  # calls that are kept; steps have other numbers of tokens than those before them
_KEPT: dict[tuple, tuple["_Repeat", ...]] = {}


class _Repeat(NamedTuple):
    """A launch of a call.  addresses, descriptors: (argument, tensor of the call)."""

    made: Made
    addresses: tuple[tuple[int, int], ...]
    descriptors: tuple[tuple[int, int], ...]

    def start(self, addresses: Sequence[int | None]) -> None:
        args = [*self.made.args]
        for i, k in self.addresses:
            args[i] = addresses[k]
        for i, k in self.descriptors:
            args[i] = args[i].base.at(addresses[k])
        start(self.made.code, self.made.grid, args)


def forget() -> None:
    """Make the next call of each kind as ever. For tests that pretend to be on another machine."""
    _KEPT.clear()


def repeat(function: Callable, numbers: tuple, tensors: Sequence[torch.Tensor | None]) -> None:
    """`function(*numbers, *tensors)`, which makes launches, or the launches that it would make.

    They must depend on nothing but numbers, and what tensors are beside what they hold. Whatever else the function does
    must end in an argument of theirs that is no tensor's address: a copy, new scratch. It may not call this again.
    """
    if is_recording():
        raise RuntimeError(f"{function.__qualname__} is repeated within another call that is: repeat one of the two")
    if not launching.BY_TABLE:
        function(*numbers, *tensors)
        return
    addresses, form = [], [function, *numbers]
    for x in tensors:
        if x is None:
            addresses.append(None)
            form.append(None)
        else:
            address = x.data_ptr()
            addresses.append(address)
            form += x.dtype, x.shape, x.stride(), x.get_device(), address % 16
    key = tuple(form)
    kept = _KEPT.get(key)
    if kept is not None:
        for one in kept:
            one.start(addresses)
        return
    with recorded() as launches:
        function(*numbers, *tensors)
    kept = _repeats_of(launches, addresses)
    if kept is not None:
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[key] = kept


def _repeats_of(launches: list[Made | None], addresses: list[int | None]) -> tuple[_Repeat, ...] | None:
    """None where there are none, one was not ours, or not all that one was given is known."""
    given = [address for address in addresses if address is not None]
    if not launches or None in launches or len(set(given)) < len(given):
        return None
    tensor_at = {address: k for k, address in enumerate(addresses) if address is not None}
    repeats = []
    for made in launches:
        args = made.args
        pointers = [(i, args[i]) for i in made.tensors]
        bases = [(i, args[i].base.address) for i in made.descriptors]
        if not all(address in tensor_at for _, address in (*pointers, *bases)):
            return None
        repeats.append(_Repeat(made, *(tuple((i, tensor_at[at]) for i, at in of) for of in (pointers, bases))))
    return tuple(repeats)
