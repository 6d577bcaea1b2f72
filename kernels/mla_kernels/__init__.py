"""MLA attention kernels. Knows nothing of any inference engine."""

from mla_kernels.cache_layout import (
    FORMATS,
    CacheFormat,
    CacheLayout,
    PackedRow,
    expanded_bytes_per_token,
    format_of,
    tensor_bytes,
)
from mla_kernels.device import Device, device_of
from mla_kernels.dispatch import (
    OPERATIONS,
    Kernel,
    Problem,
    Selection,
    UnsupportedMLA,
    by_name_alone,
    select,
    split_for,
)
from mla_kernels.geometry import MLAGeometry

__all__ = [
    "FORMATS",
    "OPERATIONS",
    "CacheFormat",
    "CacheLayout",
    "Device",
    "Kernel",
    "MLAGeometry",
    "PackedRow",
    "Problem",
    "Selection",
    "UnsupportedMLA",
    "by_name_alone",
    "device_of",
    "expanded_bytes_per_token",
    "format_of",
    "select",
    "split_for",
    "tensor_bytes",
]
