"""Run a Gluon kernel for Hopper on a CPU, roles as threads: what it computes and where it would hang, not how fast.

Triton's interpreter does not take Gluon. But a Gluon kernel is Python text, and what it calls is little: this gives
those names meanings in numpy and executes the text itself. Layouts mean nothing here (they change no value), nor do
fences. Timing is chosen against the kernel: copies arrive at once, matrix instructions read their operands only when
they are waited for, shared memory begins as NaN, reads and writes outside of a tensor raise, and a barrier that nobody
completes is a test failure. numpy has no bfloat16: here it is the bits of one, which copies and matrix instructions
take, and outputs are rounded to.
"""

import ctypes
import functools
import importlib.util
import itertools
import pathlib
import sys
import threading
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from gluon_values import BFLOAT16, Int, constexpr, elementwise, floats, inline_asm, tensor_of

PATIENCE = 20  # seconds that a role waits at a barrier before it is called a deadlock


class Watch:
    """Who is told what roles do: nobody. gluon_races.py has one that looks for races."""

    def start(self, roles: int): ...
    def role(self, number: int): ...
    def read(self, memory): ...
    def write(self, memory): ...
    def arrive(self, barrier): ...
    def phase_ends(self, barrier): ...
    def waited(self, barrier): ...


WATCH = Watch()


class Pointer:
    """Addresses into the memory of one torch tensor."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def of(cls, tensor: torch.Tensor):
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.view(torch.uint16)
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        return cls(tensor.detach().as_strided((size,), (1,), 0).numpy(), tensor.storage_offset())

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + np.asarray(offset, dtype=np.int64))

    def __getitem__(self, key):
        return Pointer(self.memory, self.offset[key])

    def reach(self, mask):
        offset = np.asarray(self.offset)
        mask = np.broadcast_to(True if mask is None else mask, offset.shape)
        wrong = mask & ((offset < 0) | (offset >= len(self.memory)))
        assert not wrong.any(), f"{int(wrong.sum())} addresses outside of a tensor"
        return np.where(mask, offset, 0), mask


class Memory:
    """A buffer in shared memory, or a view of one, which knows the whole."""

    def __init__(self, array, whole=None):
        self.array, self.dtype, self.shape = array, array.dtype, array.shape
        self.whole = array if whole is None else whole

    def index(self, i):
        return Memory(self.array[i], self.whole)

    def slice(self, start, length, dim=0):
        return Memory(self.array[(slice(None),) * dim + (slice(start, start + length),)], self.whole)

    def permute(self, order):
        return Memory(self.array.transpose(order), self.whole)

    def reinterpret(self, dtype, shape, layout):
        return Memory(self.array.view(dtype).reshape(shape), self.whole)

    def load(self, layout):
        WATCH.read(self)
        return tensor_of(self.array.copy())

    def store(self, value):
        assert np.shape(value) == self.array.shape
        WATCH.write(self)
        self.array[...] = value


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced bytes have come."""

    changed = threading.Condition()

    def __init__(self):
        self.count = self.pending = self.bytes = self.phase = 0

    def _change(self, arrivals=0, num_bytes=0):
        with Barrier.changed:
            self.pending -= arrivals
            self.bytes += num_bytes
            assert self.pending >= 0, "more arrivals than a phase has"
            WATCH.arrive(self)
            if self.pending == 0 and self.bytes == 0:
                WATCH.phase_ends(self)
                self.phase, self.pending = self.phase + 1, self.count
                Barrier.changed.notify_all()


class Barriers(list):
    index = list.__getitem__


def _one(barrier) -> Barrier:
    return barrier[0] if isinstance(barrier, Barriers) else barrier


def _init(barrier, count):
    _one(barrier).count = _one(barrier).pending = count


def _wait(barrier, parity):
    barrier = _one(barrier)
    with Barrier.changed:
        assert Barrier.changed.wait_for(lambda: barrier.phase & 1 != parity, PATIENCE), "a role waits for ever"
        WATCH.waited(barrier)


mbarrier = SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=_init,
    wait=_wait,
    arrive=lambda barrier, count=1: _one(barrier)._change(count),
    expect=lambda barrier, num_bytes: _one(barrier)._change(1, num_bytes),
)


class Product:
    """A matrix instruction on its way: it reads when it is waited for, or at any time before."""

    type = SimpleNamespace(layout=None)

    def __init__(self, a, b, acc, use_acc):
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self._read()

    def _read(self):
        for operand in (self.a, self.b):
            if isinstance(operand, Memory):
                WATCH.read(operand)

    def result(self):
        self._read()
        a, b = (x.array if isinstance(x, Memory) else x for x in (self.a, self.b))
        assert a.dtype == b.dtype
        assert a.dtype in (np.float16, BFLOAT16)
        # Each element by itself, as a matrix instruction does: BLAS gives one other bits at another place in a matrix.
        a, b = (np.ascontiguousarray(floats(x)) for x in (a, b.T))
        product = np.einsum("ik,jk->ij", a, b)
        acc = self.acc.result() if isinstance(self.acc, Product) else self.acc
        return tensor_of(product + acc if self.use_acc else product)


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    assert is_async
    return Product(a, b, acc, use_acc)


def warpgroup_mma_wait(num_outstanding, deps):
    done = tuple(dep.result() if isinstance(dep, Product) else dep for dep in deps)
    return done[0] if len(done) == 1 else done


class TensorDescriptor:
    def __init__(self, base, shape, strides, box, layout):
        (rows, columns), (row_stride, _) = shape, strides
        dtype = np.dtype(np.int8 if base.dtype == torch.int8 else np.float16)
        memory = (ctypes.c_uint8 * (((rows - 1) * row_stride + columns) * dtype.itemsize)).from_address(base.data_ptr())
        whole = np.frombuffer(memory, dtype)
        strides = (row_stride * dtype.itemsize, dtype.itemsize)
        self.array = np.lib.stride_tricks.as_strided(whole, shape, strides)
        self.box, self.dtype = box, whole.dtype

    @classmethod
    def from_tensor(cls, tensor, box, layout):
        return cls(tensor, tensor.shape, tensor.stride(), box, layout)


def _tma_load(desc, at, barrier, target):
    """Elements outside of the tensor are zeros; a box right behind it is allowed, one far away is a mistake."""
    (row, column), (rows, columns) = at, desc.box
    assert 0 <= row < desc.array.shape[0] + rows
    box = np.zeros((rows, columns), desc.array.dtype)
    inside = desc.array[row : row + rows, column : column + columns]
    box[: inside.shape[0], : inside.shape[1]] = inside
    target.store(box)
    _one(barrier)._change(0, -box.nbytes)


def _cp_async(target, pointer, mask=None):
    offset, mask = pointer.reach(mask)
    target.store(np.where(mask, pointer.memory[offset], 0))


def _load(pointer, mask=None, other=0):
    offset, mask = pointer.reach(mask)
    return tensor_of(np.where(mask, pointer.memory[offset], other).astype(pointer.memory.dtype))


def _store(pointer, value, mask=None):
    offset, mask = pointer.reach(mask)
    value = np.broadcast_to(value, offset.shape)
    pointer.memory[offset[mask]] = value[mask].astype(pointer.memory.dtype)


def _atomic_add(pointer, value, sem=None):
    old = _load(pointer)
    pointer.memory[pointer.offset] += value
    return old


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(Barrier() for _ in range(shape[0]))
    nothing = np.nan if np.dtype(dtype).kind == "f" else 0xFFFF if dtype == BFLOAT16 else -1
    return Memory(np.full(shape, nothing, dtype))


def _reduce(tensors, axis, combine):
    assert axis == 0
    rows = zip(*(np.asarray(t).tolist() for t in tensors), strict=True)
    return tuple(Int(x) for x in functools.reduce(lambda a, b: combine(*a, *b), rows))


PROGRAM, GRID = [0, 0], [1, 1]


def _warp_specialize(roles, num_warps, num_regs):
    failures = []
    WATCH.start(len(roles))

    def play(number, role, args):
        WATCH.role(number)
        try:
            with np.errstate(all="ignore"):
                role(*args)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=play, args=(number, *role)) for number, role in enumerate(roles)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


gl = SimpleNamespace(
    constexpr=constexpr, static_range=range, float16=np.float16, float32=np.float32, int8=np.int8, int32=np.int32,
    int64=np.int64,
    NVMMASharedLayout=lambda **_: "shared", SwizzledSharedLayout=lambda *_: "shared", BlockedLayout=lambda *_: None,
    NVMMADistributedLayout=lambda *_: None, DistributedLinearLayout=lambda **_: None, SliceLayout=lambda *_: None,
    DotOperandLayout=lambda *_: None,
    arange=lambda begin, end, layout: tensor_of(np.arange(begin, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout: tensor_of(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, layout: tensor_of(np.full(shape, value, dtype)),
    load=_load, store=_store, where=elementwise(np.where), maximum=elementwise(np.fmax),
    minimum=elementwise(np.fmin), exp2=elementwise(np.exp2), log2=elementwise(np.log2),
    fma=elementwise(lambda x, y, z: x * y + z), sqrt=elementwise(np.sqrt), floor=elementwise(np.floor),
    sum=lambda x, axis: tensor_of(np.sum(np.asarray(x), axis, dtype=x.dtype)),
    max=lambda x, axis: tensor_of(np.fmax.reduce(np.asarray(x), axis)),  # as on the GPU NaN is no maximum
    min=lambda x, axis: tensor_of(np.fmin.reduce(np.asarray(x), axis)),
    reduce=_reduce, convert_layout=lambda x, layout: x, program_id=lambda axis: Int(PROGRAM[axis]),
    num_programs=lambda axis: Int(GRID[axis]), atomic_add=_atomic_add,
    associative_scan=lambda x, axis, combine: tensor_of(
        np.array([*itertools.accumulate(x.tolist(), combine)], x.dtype)
    ),
    allocate_shared_memory=_allocate, warp_specialize=_warp_specialize, thread_barrier=lambda: None,
    bfloat16=BFLOAT16, shared_memory_descriptor=Memory, inline_asm_elementwise=inline_asm,
    join=lambda x, y: tensor_of(np.stack([np.asarray(x), np.asarray(y)], -1)),
    split=lambda x: (tensor_of(x[..., 0].copy()), tensor_of(x[..., 1].copy())),
)  # fmt: skip


class Kernel:
    """What @gluon.jit makes of a function."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, num_warps, maxnreg=None, launch_pdl=False, **constants):
            args = [Pointer.of(x) if isinstance(x, torch.Tensor) else Int(x) if type(x) is int else x for x in args]
            GRID[:] = *grid, *[1] * (2 - len(grid))
            for PROGRAM[1], PROGRAM[0] in itertools.product(range(GRID[1]), range(GRID[0])):
                with np.errstate(all="ignore"):
                    self.function(*args, **constants)

        return launch


def jit(function=None, **options):
    return Kernel(function) if function else Kernel


def _modules():
    tools = {
        "async_copy": SimpleNamespace(
            async_load=_cp_async,
            commit_group=lambda: None,
            wait_group=lambda n: None,
            mbarrier_arrive=lambda barrier, increment_count: barrier._change(128),
        ),
        "fence_async_shared": lambda: None,
        "mbarrier": mbarrier,
        "tma": SimpleNamespace(async_load=_tma_load),
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
    }
    yield "triton.experimental", {"gluon": SimpleNamespace(jit=jit, constexpr_function=lambda function: function)}
    yield "triton.experimental.gluon", {"language": gl}
    yield "triton.experimental.gluon.language.nvidia.hopper", tools
    yield "triton.experimental.gluon.nvidia.hopper", {"TensorDescriptor": TensorDescriptor}
    yield "triton.language.extra.cuda", {"gdc_launch_dependents": lambda: None, "gdc_wait": lambda: None}


def emulated(*names: str, edits: dict[str, str] | None = None) -> list[ModuleType]:
    """Modules with the emulator in Gluon's place. Nobody else will find these, or the emulator.

    edits: text to replace in their sources, each exactly once: for tests of the tests.
    """
    before, edits, modules = dict(sys.modules), dict(edits or {}), []
    for name, content in _modules():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(content)
    try:
        for name in names:
            path = pathlib.Path(importlib.util.find_spec(name).origin)
            source = path.read_text()
            for old in [old for old in edits if old in source]:
                assert source.count(old) == 1, f"{old!r} stands in {path.name} {source.count(old)} times"
                source = source.replace(old, edits.pop(old))
            module = ModuleType(name)
            module.range = lambda *bounds: map(Int, range(*bounds))
            sys.modules[name] = module
            exec(compile(source, path, "exec"), module.__dict__)
            modules.append(module)
    finally:
        sys.modules.clear()
        sys.modules.update(before)
    assert not edits, f"nothing to replace: {list(edits)}"
    return modules
