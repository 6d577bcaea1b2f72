"""What an engine does for the first time while it serves: kernels of ours that Triton compiles, memory that it takes.

MLA_TEST_STAND_IN=H200 makes the engine believe that its tensors live on that GPU (gpu_stand_in.py): then it shows what
would be compiled there. MLA_TEST_FORGET=decode leaves that operation out of the warm-up.
"""

import os
from collections.abc import Callable

STAND_IN, FORGET = "MLA_TEST_STAND_IN", "MLA_TEST_FORGET"


class Watch:
    """Follows one process.   note: called with [kernel, what it is compiled for] of each kernel that is compiled."""

    def __init__(self, note: Callable[[list], None] | None = None):
        self._compiled, self._early = [], 0
        self._note = note or self._compiled.append

    def follow(self) -> None:
        """Call before an engine is made."""
        import torch

        if STAND_IN in os.environ:
            import gpu_stand_in

            gpu_stand_in.pretend(gpu_stand_in.DEVICES[os.environ[STAND_IN]], self._note)
        elif torch.cuda.is_available():
            self._follow_triton()
        if FORGET in os.environ:
            from mla_backend import warmup

            listed = warmup.calls
            warmup.calls = lambda *args: [one for one in listed(*args) if one[0] != os.environ[FORGET]]

    def _follow_triton(self) -> None:
        """Triton says this of each kernel that a process has not had yet, from its cache on disk too. vLLM's own
        monitor hands on to it."""
        from triton import knobs

        def noted(*, fn, repr, **_):
            if fn.module.startswith("mla_kernels"):
                self._note([fn.name, repr])

        knobs.runtime.jit_post_compile_hook = noted

    def ready(self) -> None:
        """Call when the engine is."""
        import torch

        self._early = len(self._compiled)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()

    def seen(self) -> dict:
        """early, late: kernels compiled before the engine was ready (their number) and after.
        peak, kept: bytes of the GPU's memory that serving took for a while, and those that it still has."""
        import torch

        seen = {"early": self._early, "late": self._compiled[self._early :]}
        if torch.cuda.is_available():
            seen["peak"] = torch.cuda.max_memory_allocated() - self._held
            seen["kept"] = torch.cuda.memory_allocated() - self._held
        return seen
