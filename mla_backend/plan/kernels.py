"""Which kernels would serve a model on an architecture that need not be here."""

from dataclasses import replace

import torch

from mla_backend.config import OPERATIONS, MLABackendConfig
from mla_backend.plan.model import Model
from mla_kernels import CacheLayout, Problem, UnsupportedMLA, format_of, select
from mla_kernels.device import device_called

PAGE = 64  # tokens; what vLLM gives us, and what SGLang's --page-size should say


def kernels(model: Model, architecture: str, tensor_parallel: int) -> dict[str, str]:
    """For each operation the kernel for bfloat16 and pages of 64, with reasons against better ones, or why none fits.

    A kernel that is bound to versions of Triton is judged by the one that is installed here.
    Raises ValueError for an architecture that is no name of one, or a kernel that the environment names wrongly.
    """
    geometry = replace(model.geometry, num_heads=model.geometry.num_heads // tensor_parallel)
    layout = CacheLayout(geometry=geometry, format=format_of(torch.bfloat16), page_size=PAGE)
    problem, device = Problem(layout=layout, dtype=torch.bfloat16), device_called(architecture)
    config = MLABackendConfig.from_environment()

    def choice(operation: str) -> str:
        try:
            return str(select(operation, problem, device, kernel=config.kernel_for(operation)))
        except UnsupportedMLA as error:
            return f"none: {' '.join(str(error).splitlines()[1:]).strip()}"

    return {operation.replace("_", " "): choice(operation) for operation in OPERATIONS}
