"""Triton's interpreter without what it does again and again for nothing: a third of the time of its tests.

Values are the same. Where Triton's own code is another than that of 3.8, what is not found stays as it is.
"""

import functools
import math
from dataclasses import replace

import numpy as np
from triton import language as tl
from triton.language import semantic
from triton.runtime import interpreter

PLAIN_LOAD = {lang: lang.load for lang in (tl, tl.core)}  # before anything is interpreted


def make_quick() -> None:
    if hasattr(interpreter, "_LangPatchScope"):
        _patch_the_language_once()
    if hasattr(interpreter, "_get_np_dtype"):
        _remember_dtypes()
    if hasattr(tl.core, "tuple"):
        _remember_types()
        _compare_less()
    if hasattr(interpreter, "interpreter_builder"):
        _say_nothing_of_overflow(interpreter.interpreter_builder)


def _say_nothing_of_overflow(builder) -> None:
    """Each sum and product of integers is computed once more, in int64, and compared, which is half of all work; but
    what comes of it is an assertion on the device, and those are left out where nobody debugs."""
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _patch_the_language_once() -> None:
    """Every call of a jit function from another one looks at all names of the language for those to replace, which the
    launch has replaced already."""
    patch = interpreter._patch_lang

    @functools.cache
    def languages(function):
        return [lang for lang in PLAIN_LOAD if any(value is lang for value in function.__globals__.values())]

    def patch_lang(function):
        if all(lang.load is not PLAIN_LOAD[lang] for lang in languages(function)):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_lang


def _remember_dtypes() -> None:
    """Every result makes a table of all dtypes to look its own up."""
    look_up, found = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def _remember_types() -> None:
    """Every type of a block, and every result, looks through its shape and wraps each number of it in several objects,
    which are never changed."""
    look_through, known = tl.core.block_type.__init__, {}

    @functools.cache
    def wrapped(*shape):
        return tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    def init_type(self, element_ty, shape):
        numbers = tuple(getattr(n, "value", n) for n in getattr(shape, "values", shape))
        key = (element_ty.name, *numbers)
        if key not in known:
            look_through(self, element_ty, [*numbers])
            known[key] = {**vars(self), "numbers": numbers, "of_values": wrapped(*numbers)}
        vars(self).update(known[key], element_ty=element_ty)

    def init_value(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_values if type.is_block() else wrapped()

    tl.core.block_type.__init__, tl.tensor.__init__ = init_type, init_value


def _compare_less() -> None:
    """Types are compared by their names, and shapes as objects of Triton's, number by number."""
    equal, broadcast = tl.dtype.__eq__, semantic.TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if len(lhs.shape) != len(rhs.shape):
            return broadcast(self, lhs, rhs)
        shapes = [x.type.numbers for x in (lhs, rhs)]
        shape = np.broadcast_shapes(*shapes)

        def widened(x):
            return self.tensor(self.builder.create_broadcast(x.handle, shape), tl.block_type(x.dtype, shape))

        return tuple(x if old == shape else widened(x) for x, old in zip((lhs, rhs), shapes, strict=True))

    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value
