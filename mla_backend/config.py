"""Settings of the plugin: the only place that reads environment variables (README has their table)."""

import os
from dataclasses import dataclass

import mla_kernels

OPERATIONS = tuple(mla_kernels.OPERATIONS)


def variable(operation: str) -> str:
    """The environment variable that names an operation's kernel."""
    return f"MLA_BACKEND_{operation.upper()}"


def set_environment(variables: dict[str, str]) -> None:
    """Set what this process, which is one of our own, and an engine in it will read."""
    os.environ.update(variables)


@dataclass(frozen=True, kw_only=True)
class MLABackendConfig:
    """What the user set.

    disabled: register nothing.
    kernels: (operation, kernel name) of every operation; "auto" where the user named none.
    model_types: more model types that an engine shall take for MLA models.
    """

    disabled: bool = False
    kernels: tuple[tuple[str, str], ...] = tuple((operation, "auto") for operation in OPERATIONS)
    model_types: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> "MLABackendConfig":
        """MLA_BACKEND_DISABLE=1 disables; MLA_BACKEND_<OPERATION> names the kernel of an operation;
        MLA_BACKEND_MODEL_TYPES lists model types."""
        kernels = tuple((name, os.environ.get(variable(name), "") or "auto") for name in OPERATIONS)
        types = (name.strip() for name in os.environ.get("MLA_BACKEND_MODEL_TYPES", "").split(","))
        disabled = os.environ.get("MLA_BACKEND_DISABLE", "0") == "1"
        return cls(disabled=disabled, kernels=kernels, model_types=tuple(filter(None, types)))

    def kernel_for(self, operation: str) -> str:
        """Kernel name that the user wants for an operation, or "auto"."""
        return dict(self.kernels)[operation]
