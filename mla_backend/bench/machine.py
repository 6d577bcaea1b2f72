"""Where a benchmark runs, and the error that ends one."""

import datetime


class BenchmarkError(RuntimeError):
    """The benchmark cannot go on. The message is for the user."""


def need_gpu() -> None:
    """Raise BenchmarkError where torch sees no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    built = torch.version.cuda or torch.version.hip
    change = "run it on a machine that has one" if built else "install a build of torch for your GPU"
    raise BenchmarkError(
        f"the benchmark wants an NVIDIA or AMD GPU; torch {torch.__version__} "
        f"{'sees none here' if built else 'is built for CPUs'}: {change}"
    )


def machine() -> dict:
    """What a CSV says of the machine and the day."""
    import torch
    import triton

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
