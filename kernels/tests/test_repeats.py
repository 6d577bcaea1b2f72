"""Launches that are made again: those that the call makes by itself, at the addresses of its own tensors."""

import pytest
import torch
from workers import answer_of

from mla_kernels import repeats
from mla_kernels.launching import Made


def test_the_launches_that_a_call_makes():
    result = answer_of("repeats_worker.py")
    assert result["cases"] > 100
    assert not result["differences"]
    assert result["anew"] == result["anew_rightly"]


@pytest.fixture
def made(monkeypatch):
    """Arguments of launches that are made from what was kept."""
    repeats.forget()
    started = []
    monkeypatch.setattr(repeats, "start", lambda code, grid, args: started.append(args))
    yield started
    repeats.forget()


def calling(monkeypatch, launches_of):
    """A function for `repeat` whose launches are `launches_of(*tensors)`; and how often it was called."""
    calls, launches = [], []

    class Recorded:
        def __enter__(self):
            launches.clear()
            return launches

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(repeats, "recorded", Recorded)

    def function(*tensors):
        calls.append(tensors)
        launches.extend(launches_of(*tensors))

    return function, calls


def launch(*addresses: int) -> Made:
    return Made("code", (1, 1, 1), (*addresses, 7), tuple(range(len(addresses))), ())


@pytest.mark.parametrize(
    "launches_of",
    [
        lambda x, y: [],
        lambda x, y: [launch(x.data_ptr()), None],
        lambda x, y: [launch(x.data_ptr()), launch(x.data_ptr() + 64)],
        lambda x, y: [launch(y.clone().data_ptr())],
    ],
    ids=["none", "by Triton", "the middle of a tensor", "a copy"],
)
def test_what_is_not_known_is_made_anew(monkeypatch, made, launches_of):
    function, calls = calling(monkeypatch, launches_of)
    for _ in range(3):
        repeats.repeat(function, (), (torch.zeros(64), torch.zeros(64)))
    assert len(calls) == 3
    assert not made


def test_two_tensors_at_one_address_are_not_told_apart(monkeypatch, made):
    function, calls = calling(monkeypatch, lambda x, y: [launch(x.data_ptr(), y.data_ptr())])
    x = torch.zeros(64)
    for y in (x, x, x[:32]):
        repeats.repeat(function, (), (x, y))
    assert len(calls) == 3
    assert not made


def test_other_shapes_strides_dtypes_and_numbers_are_other_calls(monkeypatch, made):
    function, calls = calling(monkeypatch, lambda *tensors: [launch(tensors[-1].data_ptr())])

    def numbered(number, x):
        function(x)

    x = torch.zeros(8, 8)
    others = [(1, x), (2, x), (1, x.T[:, :4]), (1, x[:, :4]), (1, x.half()), (1, x.int())]
    for number, y in others:
        repeats.repeat(numbered, (number,), (y,))
    assert len(calls) == len(others)
    for number, y in others:
        repeats.repeat(numbered, (number,), (y,))
    assert len(calls) == len(made) == len(others)


def test_no_call_within_a_call():
    def outer(x):
        repeats.repeat(lambda y: None, (), (x,))

    with pytest.raises(RuntimeError, match="within another call"):
        repeats.repeat(outer, (), (torch.zeros(1),))


def test_the_device_of_each_tensor_counts(monkeypatch, made):
    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    function, calls = calling(monkeypatch, lambda x, y: [launch(x.data_ptr(), y.data_ptr())])
    x, y = torch.zeros(64), torch.zeros(64)
    for given in (y, y, y.as_subclass(Elsewhere)):
        repeats.repeat(function, (), (x, given))
    assert len(calls) == 2


def test_nothing_is_kept_for_good(monkeypatch, made):
    monkeypatch.setattr(repeats, "_MOST", 4)
    function, calls = calling(monkeypatch, lambda x: [launch(x.data_ptr())])
    for length in range(1, 10):
        repeats.repeat(function, (), (torch.zeros(length),))
        assert len(repeats._KEPT) <= 4
    assert len(calls) == 9
