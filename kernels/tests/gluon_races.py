"""Races of roles in shared memory, found in one execution by gluon_emulator.py, however its threads happened to run.

With vector clocks, as race detectors of programs with locks do it (FastTrack, Flanagan and Freund 2009): each role
counts its own arrivals at barriers and knows how far it has heard of the others'. What ends a phase of a barrier knows
what all who arrived knew, and so does who waits for it then. Two accesses of a byte race if one is a write, they are of
two roles, and the later one has not heard of the earlier. What a role does inside of itself is taken to be in order.
"""

import contextlib
import functools
import math
import sys
import threading

import gluon_emulator
import numpy as np


class _Shadow:
    """Of each byte of a buffer: when each role wrote it last, and read it last."""

    def __init__(self, whole, roles: int):
        self.whole = whole  # kept, or another buffer could get its address
        self.written, self.read = np.zeros((2, roles, whole.nbytes), np.int32)


@functools.cache
def _bytes_of(begin: int, shape: tuple[int, ...], strides: tuple[int, ...]):
    """Numbers of the bytes that a view has: a slice where these are one behind the other."""
    extent = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if min(strides) > 0 and extent == math.prod(shape):
        return slice(begin, begin + extent)
    at = np.array(begin)
    for count, stride in zip(shape, strides, strict=True):
        at = at[..., None] + np.arange(count) * stride
    return at.reshape(-1)


class Races(gluon_emulator.Watch):
    """found: each race as "kind: file:line < file:line", from where the later access was made."""

    def __init__(self):
        self.found: set[str] = set()
        self._lock, self._here = threading.Lock(), threading.local()

    def start(self, roles):
        self.assert_none()  # of an earlier program
        self._roles = roles
        self._clocks = np.eye(roles, dtype=np.int32)
        self._shadows, self._arrived, self._ended = {}, {}, {}

    def assert_none(self):
        assert not self.found, "\n".join(sorted(self.found))

    def role(self, number):
        self._here.role = number

    def _mine(self) -> int | None:
        """None before roles begin: all know of that."""
        return getattr(self._here, "role", None)

    def _bytes(self, memory):
        """(shadow, where a view is in it)."""
        address = memory.whole.__array_interface__["data"][0]
        if address not in self._shadows:
            self._shadows[address] = _Shadow(memory.whole, self._roles)
        begin = memory.array.__array_interface__["data"][0] - address
        shape, strides = (*memory.shape, memory.dtype.itemsize), (*memory.array.strides, 1)
        return self._shadows[address], _bytes_of(begin, shape, strides)

    def read(self, memory):
        if (role := self._mine()) is None:
            return
        with self._lock:
            shadow, at = self._bytes(memory)
            if self._unheard(role, shadow.written[:, at]):
                self._tell("read of what another role may be writing")
            shadow.read[role, at] = self._clocks[role, role]

    def write(self, memory):
        if (role := self._mine()) is None:
            return
        with self._lock:
            shadow, at = self._bytes(memory)
            if self._unheard(role, shadow.written[:, at]):
                self._tell("write where another role may be writing")
            if self._unheard(role, shadow.read[:, at]):
                self._tell("write of what another role may be reading")
            shadow.written[role, at] = self._clocks[role, role]

    def _unheard(self, role, when) -> bool:
        """Whether one of these accesses is news to a role. Its own are not later than its clock."""
        return bool((when.max(1) > self._clocks[role]).any())

    def _tell(self, what: str) -> None:
        frame, lines = sys._getframe(1), []
        while frame and len(lines) < 3:
            path = frame.f_code.co_filename
            if "mla_kernels" in path:
                lines.append(f"{path.rpartition('/')[2]}:{frame.f_lineno}")
            frame = frame.f_back
        self.found.add(f"{what}: {' < '.join(lines)}")

    def arrive(self, barrier):
        if (role := self._mine()) is not None:
            known = self._arrived.get(barrier, np.zeros(self._roles, np.int32))
            self._arrived[barrier] = np.maximum(known, self._clocks[role])
            self._clocks[role, role] += 1

    def phase_ends(self, barrier):
        if barrier in self._arrived:
            self._ended[barrier] = self._arrived.pop(barrier)

    def waited(self, barrier):
        role = self._mine()
        if role is not None and barrier in self._ended:
            self._clocks[role] = np.maximum(self._clocks[role], self._ended[barrier])


@contextlib.contextmanager
def no_races():
    """Fail if roles of a kernel that is emulated meanwhile race."""
    races = gluon_emulator.WATCH = Races()
    try:
        yield
    finally:
        gluon_emulator.WATCH = gluon_emulator.Watch()
    races.assert_none()
