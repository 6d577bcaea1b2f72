"""Call kernels whose launches are repeated (repeats.py) for tensors in two places, and say where the second call's
launches are not those that it makes when nothing is kept.

    python repeats_worker.py        one JSON line: how many cases, those with differences, those that were made anew and
                                    not repeated, and those of them for which that is right: rows that no asynchronous
                                    copy can read are copied first, or begin at another part of 16 bytes than before

There is no GPU: as in launching_worker.py, what Triton compiles does nothing. Must run without TRITON_INTERPRET.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial

import torch
from hopper_devices import H200, geometry
from launching_worker import LAUNCHED, Driver, compile_nothing
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mla_kernels import CacheLayout, Device, Problem, format_of, hopper_launch, repeats
from mla_kernels.cache import triton_gather, triton_write
from mla_kernels.decode import gluon_sm90
from mla_kernels.prefill import gluon_sm90_ragged
from mla_kernels.testing import make_decode, make_prefill

PAGE = 64
OFFSETS = ((0, 0), (8, 8), (0, 4), (4, 4))  # of queries in the first and the second place, in values of 2 bytes
# The name of a case, what makes its call with tensors of its own at an offset, and whether calls copy what lies so.
Cases = Iterator[tuple[str, Callable[[int], Callable[[], object]], bool]]


def shifted(x: torch.Tensor, values: int) -> torch.Tensor:
    """A copy that begins so many values behind a multiple of 64 bytes."""
    room = torch.zeros(x.numel() + values, dtype=x.dtype)
    return room[values:].view(x.shape).copy_(x)


def decode(heads, query_lens, cache_dtype, split, values):
    scale = {"cache_scale": 0.5} if cache_dtype == torch.float8_e4m3fn else {}
    case = make_decode(
        geometry(heads), [70, 300, 5], query_lens=query_lens, page_size=PAGE, dtype=torch.bfloat16,
        cache_dtype=cache_dtype, needles=False, **scale,
    )  # fmt: skip
    q_latent, q_rope, *others = case.arrays
    q_latent = shifted(q_latent, values)
    problem = Problem(
        layout=CacheLayout(geometry=case.geometry, format=format_of(cache_dtype), page_size=PAGE),
        dtype=torch.bfloat16,
        max_query_len=case.options["query_len"],
        max_seq_len=512,
        split_tokens=split,
    )
    shapes = gluon_sm90.workspace(problem, H200, max_requests=4)
    options = case.options | {
        "out_TNL": torch.empty_like(q_latent, memory_format=torch.contiguous_format),
        "lse_TN": torch.empty(q_latent.shape[:2]),
        "workspace": [torch.empty(shape, dtype=dtype) for shape, dtype in shapes],
        "split_tokens": split,
    }
    return lambda: gluon_sm90.run(q_latent, q_rope, *others, **options)


def prefill(heads, query_lens, causal, values):
    case = make_prefill(geometry(heads), query_lens, [n + 9 * (not causal) for n in query_lens], dtype=torch.bfloat16)
    q, *others = case.arrays
    if causal:
        others[-1] = others[-2]  # keys begin where queries do: one tensor
    q = shifted(q, values)
    options = case.options | {
        "causal": causal,
        "out_TNV": torch.empty(*q.shape[:2], 128, dtype=torch.bfloat16),
        "lse_TN": torch.empty(q.shape[:2]),
        "counter": torch.zeros(1, dtype=torch.int32),
        "pieces": 1,
    }
    return lambda: gluon_sm90_ragged.run(q, *others, **options)


def traffic(cache_dtype, values):
    """A write and a gather."""
    case = make_decode(geometry(1), [70, 9], page_size=PAGE, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    cache, table = case.arrays[2:4]
    latent, rope = (torch.zeros(7, width, dtype=torch.bfloat16) for width in (512, 64))
    latent = shifted(latent, values)
    slots, scale = torch.arange(7), torch.ones(1)
    starts, ends, rows = torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), torch.empty(79, 576)

    def call():
        triton_write.run(latent, rope, cache, slots, cache_scale=scale)
        triton_gather.run(cache, table, starts, ends, rows, max_key_len=70, cache_scale=scale)

    return call


def cases() -> Cases:
    formats = torch.bfloat16, torch.float8_e4m3fn, torch.uint8
    for given in itertools.product((16, 128), (1, 2, [1, 3, 2]), formats, (None, 128)):
        if given[2] == torch.bfloat16 or given[3] is None:
            yield f"decode {given}", partial(decode, *given), True
    for given in itertools.product((2, 16), ([40], [40, 1, 130]), (True, False)):
        yield f"prefill {given}", partial(prefill, *given), True
    for cache_dtype in formats:
        yield f"traffic {cache_dtype}", partial(traffic, cache_dtype), False


def known(x):
    """Of an argument, what two that mean the same have in common."""
    return (x.base, x.shape, x.strides, x.block_shape) if hasattr(x, "block_shape") else x


def launches_of(call) -> list:
    LAUNCHED.clear()
    call()
    return [(id(code), grid, [known(x) for x in args]) for code, grid, args in LAUNCHED]


def main() -> None:
    driver.set_active(Driver(Device("cuda", 90)))
    JITFunction._do_compile = compile_nothing
    for module in (hopper_launch, gluon_sm90_ragged):
        module.device_of = lambda where: H200
    recorded, calls = repeats.recorded, []
    repeats.recorded = lambda: calls.append(name) or recorded()
    found = {"cases": 0, "differences": [], "anew": [], "anew_rightly": []}
    for (kind, make, copies), (first, second) in itertools.product(cases(), OFFSETS):
        name, here, there = f"{kind} at {first}, {second}", make(first), make(second)
        here()  # compiles
        here()
        calls.clear()
        repeated = launches_of(there)
        found["anew"] += calls[:1]
        if first != second or (copies and second % 8):
            found["anew_rightly"].append(name)
        elif not repeated or repeated != _without_what_is_kept(there):
            found["differences"].append(name)
        found["cases"] += 1
    print(json.dumps(found))


def _without_what_is_kept(call) -> list:
    repeats.forget()
    return launches_of(call)


if __name__ == "__main__":
    main()
