"""Which kernels would serve a model on an architecture that need not be here."""

from dataclasses import replace

import torch

from mla_backend.config import OPERATIONS, MLABackendConfig
from mla_backend.plan.model import Model
from mla_kernels import FORMATS, CacheLayout, Problem, UnsupportedMLA, select
from mla_kernels.device import device_called

PAGE = 64  # tokens; what vLLM gives us, and what SGLang's --page-size should say


def kernels(model: Model, architecture: str, tensor_parallel: int, cache: str = "bf16") -> dict[str, str]:
    """For each operation the kernel for pages of 64, with reasons against better ones, or why none fits.

    cache: a name of mla_kernels.FORMATS. The model computes in the same dtype, in bfloat16 where nobody computes in it.
    A kernel that is bound to versions of Triton is judged by the one that is installed here.
    Raises ValueError for an architecture or a cache that is no name of one, or a kernel that the environment names
    wrongly.
    """
    if cache not in FORMATS:
        raise ValueError(f"--cache must be one of {', '.join(FORMATS)}, got {cache!r}")
    form = FORMATS[cache]
    geometry = replace(model.geometry, num_heads=model.geometry.num_heads // tensor_parallel)
    layout = CacheLayout(geometry=geometry, format=form, page_size=PAGE)
    problem = Problem(layout=layout, dtype=torch.bfloat16 if form.scaled or form.packed else form.dtype)
    device = device_called(architecture)
    config = MLABackendConfig.from_environment()

    def choice(operation: str) -> str:
        try:
            return str(select(operation, problem, device, kernel=config.kernel_for(operation)))
        except UnsupportedMLA as error:
            return f"none: {' '.join(str(error).splitlines()[1:]).strip()}"

    return {operation.replace("_", " "): choice(operation) for operation in OPERATIONS}
