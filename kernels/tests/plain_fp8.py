"""e4m3 and tile-scaled rows in plain Python, from their definitions: what kernels are compared with, bit by bit.

e4m3: OCP 8-bit floating point specification, revision 1.0, section 5. Rows: mla_kernels.cache_layout.PackedRow.
"""

import bisect
import math
import struct

TILE = 128


def value_of(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return math.copysign(size, -1 if code & 0x80 else 1)


SIZES = [value_of(code) for code in range(0x7F)]


def code_of(x: float) -> int:
    """The nearest code, the even one of two as near, 448 for what is larger; the sign stays, but not of NaN."""
    sign = 0x80 if math.copysign(1, x) < 0 else 0
    if math.isnan(x):
        return 0x7F
    size = min(abs(x), 448.0)
    below = bisect.bisect_right(SIZES, size) - 1
    if SIZES[below] == size:
        return sign | below
    middle = (SIZES[below] + SIZES[below + 1]) / 2
    return sign | (below + 1 if size > middle or (size == middle and below % 2) else below)


def float32_at(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def bits_of(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


LARGEST = float32_at(0x7F7FFFFF)


def scale_of(tile: list[float]) -> float:
    """The smallest power of two, 2^-13 or more, times which 448 is the largest value of a tile or more, but for the
    rounding of that quotient to float32."""
    largest = max([0.0, *(min(abs(x), LARGEST) for x in tile if not math.isnan(x))])
    least, scale = float32_at(bits_of(largest / 448)), 2.0**-13
    while scale < least:
        scale *= 2
    return scale


def bfloat16_of(x: float) -> int:
    """The nearest bfloat16, the even one of two as near."""
    bits = bits_of(x)
    upper, lower = bits >> 16, bits & 0xFFFF
    if math.isnan(x):
        return 0x7FC0
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2))


def row_of(latent: list[float], rope: list[float]) -> bytes:
    """The bytes of a row that holds these float32 values."""
    tiles = [latent[i : i + TILE] for i in range(0, len(latent), TILE)]
    scales = [scale_of(tile) for tile in tiles]
    codes = bytes(code_of(x / scale) for tile, scale in zip(tiles, scales, strict=True) for x in tile)
    return codes + struct.pack(f"<{len(scales)}f", *scales) + struct.pack(f"<{len(rope)}H", *map(bfloat16_of, rope))


def values_of(row: bytes, latent: int) -> list[float]:
    """What the bytes of a row stand for, before any rounding."""
    rope_at = latent + latent // TILE * 4
    scales = struct.unpack(f"<{latent // TILE}f", row[latent:rope_at])
    rope = struct.unpack(f"<{(len(row) - rope_at) // 2}H", row[rope_at:])
    return [value_of(code) * scales[i // TILE] for i, code in enumerate(row[:latent])] + [
        float32_at(bits << 16) for bits in rope
    ]
