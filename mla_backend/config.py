"""Settings of the plugin: every environment variable it reads, in one table."""

import os
from dataclasses import dataclass

OPERATIONS = ("decode", "prefill", "cache_write", "cache_gather", "merge")

# name -> what it does (README shows this table)
ENVIRONMENT = {
    "MLA_BACKEND_DISABLE": "1: register nothing, as if the package were not installed",
    **{
        f"MLA_BACKEND_{operation.upper()}": f"name of the {operation} kernel; `auto` (default) takes the best that fits"
        for operation in OPERATIONS
    },
}


@dataclass(frozen=True, kw_only=True)
class MLABackendConfig:
    """What the user set.

    disabled: register nothing.
    kernels: (operation, kernel name) of every operation; "auto" where the user named none.
    """

    disabled: bool = False
    kernels: tuple[tuple[str, str], ...] = tuple((operation, "auto") for operation in OPERATIONS)

    @classmethod
    def from_environment(cls) -> "MLABackendConfig":
        kernels = tuple((name, os.environ.get(f"MLA_BACKEND_{name.upper()}", "") or "auto") for name in OPERATIONS)
        return cls(disabled=os.environ.get("MLA_BACKEND_DISABLE", "0") == "1", kernels=kernels)

    def kernel_for(self, operation: str) -> str:
        """Kernel name that the user wants for an operation, or "auto"."""
        return dict(self.kernels)[operation]
