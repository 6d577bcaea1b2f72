"""Pick the kernel for a problem on a device; say why when there is none."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType

import torch

from mla_kernels.cache_layout import CacheLayout
from mla_kernels.device import Device
from mla_kernels.geometry import MLAGeometry

SPLIT_UNIT = 64  # tokens; the largest tile of any decode kernel, so that none crosses a cut


class UnsupportedMLA(NotImplementedError):
    """No kernel can run this problem. The message lists every kernel and its reasons."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The static facts a kernel may depend on. Everything else is per-step data.

    layout: geometry, cache format and page size.
    dtype: of queries, new keys and values, and outputs.
    max_query_len: most query tokens a request brings to decode (1 without speculative decoding).
    split_tokens: cut every request's cache at multiples of so many tokens in decode. Then an answer has the same bits
        whatever else is in the batch and however many query tokens share a call (reference.decode says what that
        promises). None: cut where it is fastest.
    max_seq_len: most cached tokens of a request; with `split_tokens` alone, whose scratch depends on it.
    Raises ValueError for splits that no kernel could take.
    """

    layout: CacheLayout
    dtype: torch.dtype
    max_query_len: int = 1
    split_tokens: int | None = None
    max_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.split_tokens is None:
            return
        if self.split_tokens < 1 or self.split_tokens % SPLIT_UNIT:
            raise ValueError(f"split_tokens must be a positive multiple of {SPLIT_UNIT}, got {self.split_tokens}")
        if not self.max_seq_len or self.max_seq_len < 1:
            raise ValueError(f"split_tokens needs a positive max_seq_len beside it, got {self.max_seq_len}")

    @property
    def geometry(self) -> MLAGeometry:
        return self.layout.geometry

    def __str__(self) -> str:
        return (
            f"{self.geometry}; {self.dtype} queries, {self.layout.format.name} cache, "
            f"pages of {self.layout.page_size}, up to {self.max_query_len} query tokens"
            + (f", splits of {self.split_tokens} tokens" if self.split_tokens else "")
        )


def split_for(geometry: MLAGeometry) -> int:
    """Tokens of a split that suits a model, by its heads alone: the bits of an answer depend on it.

    A request of n tokens occupies n / split programs and leaves that many partial answers, of 4 KiB a head, to write
    and read again. The first wants small splits, the second large ones, the larger the more heads: a square root.
    16 heads take 384 tokens, whose partial answers are 15 % of their cache's bytes; 128 heads 1024.
    """
    return SPLIT_UNIT * max(4, math.isqrt(9 * geometry.num_heads // 4))


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One implementation of an operation: a module that is imported only when somebody asks for it."""

    module: str

    @property
    def name(self) -> str:
        return self.module.rpartition(".")[2]

    def load(self) -> ModuleType:
        return import_module(self.module)

    def unsupported(self, problem: Problem, device: Device) -> list[str]:
        """Reasons this kernel cannot run the problem, each "wanted, got"; empty means it can."""
        try:
            return self.load().unsupported(problem, device)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mla_kernels"):
                raise  # a fault of ours, not a package that the user lacks
            return [f"needs the package {error.name}, which is not installed"]
        except ImportError as error:
            if not (error.name or "").startswith("triton"):
                raise
            return [f"needs another Triton: {error}"]  # Gluon is experimental: names come and go

    @property
    def run(self) -> Callable:
        return self.load().run

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph that captured a call is right for other batches of as many requests."""
        return getattr(self.load(), "CAPTURABLE", True)

    @property
    def takes_counter(self) -> bool:
        """Whether a call takes an integer of 0 as `counter`: who calls often fills many of them at once."""
        return getattr(self.load(), "TAKES_COUNTER", False)


# Best first. These tuples are the whole selection policy. What stands behind torch is taken by its name alone, since
# those before it take all that it takes: FlashInfer's was not found to be faster.
OPERATIONS: dict[str, tuple[Kernel, ...]] = {
    operation: tuple(Kernel(module=f"mla_kernels.{path}") for path in paths)
    for operation, paths in {
        "decode": (
            "decode.gluon_sm90",
            "decode.triton_splitkv",
            "decode.torch_decode",
            "decode.flashinfer_mla",
        ),
        "prefill": (
            "prefill.gluon_sm90_ragged",
            "prefill.triton_ragged",
            "prefill.torch_prefill",
            "prefill.flashinfer_ragged",
        ),
        "cache_write": ("cache.triton_write", "cache.torch_write"),
        "cache_gather": ("cache.triton_gather", "cache.torch_gather"),
        "merge": ("merge.triton_merge", "merge.torch_merge"),
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen for an operation, and why each better candidate was refused."""

    operation: str
    kernel: Kernel
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        refused = "; ".join(f"{name}: {', '.join(why)}" for name, why in self.refused.items())
        return self.kernel.name + (f" (not {refused})" if refused else "")


def select(operation: str, problem: Problem, device: Device, *, kernel: str = "auto") -> Selection:
    """Best kernel for `operation` that can run `problem` on `device`.

    kernel: "auto", or the name of a candidate, which is then used or refused, never replaced.
    Raises ValueError for an unknown operation or name and UnsupportedMLA when nothing fits.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"unknown operation {operation!r}; choose from {', '.join(OPERATIONS)}")
    candidates = OPERATIONS[operation]
    if kernel != "auto":
        candidates = tuple(k for k in candidates if k.name == kernel)
        if not candidates:
            names = ", ".join(["auto", *(k.name for k in OPERATIONS[operation])])
            raise ValueError(f"unknown {operation} kernel {kernel!r}; choose from {names}")
    refused: dict[str, list[str]] = {}
    for candidate in candidates:
        reasons = candidate.unsupported(problem, device)
        if not reasons:
            return Selection(operation=operation, kernel=candidate, refused=refused)
        refused[candidate.name] = reasons
    lines = "\n".join(f"  {name}: {'; '.join(reasons)}" for name, reasons in refused.items())
    raise UnsupportedMLA(f"no MLA {operation} kernel for {problem} on {device}\n{lines}")


def by_name_alone(operation: str, problem: Problem, device: Device) -> dict[str, list[str]]:
    """Kernels that no automatic choice comes to, those behind torch's, and what speaks against each here: no reasons
    where it can be named."""
    kernels = OPERATIONS[operation]
    last = max(i for i, kernel in enumerate(kernels) if kernel.name.startswith("torch_"))
    return {kernel.name: kernel.unsupported(problem, device) for kernel in kernels[last + 1 :]}
