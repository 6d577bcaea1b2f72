"""What both wrappers of FlashInfer share: where it can run, lengths on the host, its objects, rows that see nothing.

FlashInfer divides work among programs on the host. So each call waits until the GPU has told it the lengths, plans, and
launches; a captured CUDA graph would repeat the plan of the batch that it was captured with.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch

from mla_kernels.device import Device

_KEPT: dict[str, tuple[tuple, object]] = {}


def refusals(problem, device: Device) -> list[str]:
    """Reasons against any kernel of FlashInfer. Its Hopper kernels for bfloat16 are what our tests compared."""
    reasons = []
    if find_spec("flashinfer") is None:
        reasons.append("needs the package flashinfer, which is not installed (pip install flashinfer-python)")
    if device.kind != "cuda" or device.arch != 90:
        reasons.append(f"needs sm_90, got {device}")
    if problem.dtype != torch.bfloat16:
        reasons.append(f"queries must be bfloat16, got {problem.dtype}")
    return reasons


def _is_captured(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def on_host(kernel: str, *tensors: torch.Tensor) -> list[list[int]]:
    """The numbers of integer tensors [n], all after one wait for the GPU. Raises RuntimeError in a CUDA graph."""
    if _is_captured(tensors[0]):
        raise RuntimeError(
            f"{kernel} plans on the host from each batch's lengths, and a CUDA graph would repeat this batch's plan: "
            f"capture none, or let another kernel than {kernel} do this"
        )
    numbers = iter(torch.cat(tensors).tolist())
    return [[next(numbers) for _ in range(len(x))] for x in tensors]


def kept(name: str, key, make: Callable):
    """What make() returned when `name` last asked with this key, or returns now.

    Such an object has buffers of its own, pinned ones too, which FlashInfer copies from without PyTorch's knowledge.
    So call this after `on_host`: then no copy of an earlier call is under way that could lose its buffer to somebody.
    Calls that share an object must not run at the same time, as those that share a workspace.
    """
    if name not in _KEPT or _KEPT[name][0] != key:
        _KEPT[name] = key, make()
    return _KEPT[name][1]


def ints(numbers: Sequence[int]) -> torch.Tensor:
    """int32 on the host, where plans are made."""
    return torch.tensor(numbers, dtype=torch.int32)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether all rows [.., n] of a tensor of 16-bit values begin at multiples of 16 bytes: FlashInfer looks at neither
    addresses nor strides."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])


def aligned(x: torch.Tensor) -> torch.Tensor:
    return x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def clear_blind(out, lse, query_starts: Sequence[int], key_lens: Sequence[int], *, causal: bool) -> None:
    """Write 0 and -inf to rows of queries that see no key; FlashInfer writes there what fits its own merging.

    causal: queries are the last tokens of their keys, so that those before the first key see none.
    """
    for (first, last), keys in zip(pairwise(query_starts), key_lens, strict=True):
        blind = max(last - first - keys, 0) if causal else (last - first) * (keys == 0)
        if blind:
            out[first : first + blind] = 0.0
            lse[first : first + blind] = -torch.inf
