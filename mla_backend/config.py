"""Settings of the plugin: every environment variable it reads, in one table."""

import os
from dataclasses import dataclass, field

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
    kernels: kernel name for each operation, "auto" where the user named none.
    """

    disabled: bool = False
    kernels: dict[str, str] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, "auto"))

    @classmethod
    def from_environment(cls) -> "MLABackendConfig":
        kernels = {name: os.environ.get(f"MLA_BACKEND_{name.upper()}", "") or "auto" for name in OPERATIONS}
        return cls(disabled=os.environ.get("MLA_BACKEND_DISABLE", "0") == "1", kernels=kernels)
