"""What decode is timed on, and the least time that a case can take. Imports no torch before it is asked for bytes."""

import re
from dataclasses import dataclass

# What one H200 reaches (measured): a device-to-device copy, and a large bf16 matrix product.
BYTES_PER_US, FLOP_PER_US = 4.3e6, 790e6
LATENT, ROPE = 512, 64


def geometry_for(heads: int, *, nope: int = 128, v: int = 128):
    """DeepSeek's widths with `heads` heads on this rank."""
    from mla_kernels import MLAGeometry

    return MLAGeometry(num_heads=heads, kv_lora_rank=LATENT, qk_nope_head_dim=nope, qk_rope_head_dim=ROPE, v_head_dim=v)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One decode batch: cached tokens of each request, heads of this rank, query tokens of every request.

    name: "even" when all requests have the same length; the CSV's `case`.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    query_len: int

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def total_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def tokens(self) -> int:
        """The CSV's `tokens`: of each request when even, of all together otherwise."""
        return self.lengths[0] if self.name == "even" else self.total_tokens

    @property
    def flop(self) -> int:
        """Multiply-adds of both matrix products, times 2: QK over K = L + R, PV over L. No padded row, no mask."""
        return 2 * self.total_tokens * self.heads * self.query_len * (2 * LATENT + ROPE)

    def cache_bytes(self, cache_dtype: str) -> int:
        """Bytes of the cache rows that must be read once; `cache_dtype` is a name of mla_kernels.FORMATS."""
        from mla_kernels import FORMATS, CacheLayout

        layout = CacheLayout(geometry=geometry_for(self.heads), format=FORMATS[cache_dtype], page_size=1)
        return self.total_tokens * layout.row_bytes

    def limit_us(self, cache_dtype: str) -> float:
        """The larger of bytes / copy bandwidth and FLOP / matrix rate."""
        return max(self.cache_bytes(cache_dtype) / BYTES_PER_US, self.flop / FLOP_PER_US)

    def __str__(self) -> str:
        return f"{self.name} b{self.batch} s{self.tokens} h{self.heads} q{self.query_len}"


def _even(batch: int, tokens: int, heads: int, query_len: int) -> Case:
    return Case(name="even", lengths=(tokens,) * batch, heads=heads, query_len=query_len)


_MIXED = tuple(512 + (i * i * 97) % 30000 for i in range(64))

CASES = (
    *(_even(*shape) for shape in (  # requests, tokens of each, heads, query tokens
        (1, 1024, 16, 1), (1, 4096, 16, 1), (1, 32768, 16, 1), (1, 131072, 16, 1), (1, 262144, 8, 1), (4, 8192, 16, 1),
        (16, 4096, 16, 1), (64, 4096, 16, 1), (128, 1024, 16, 1), (128, 4096, 16, 1), (128, 4096, 8, 1),
        (128, 4096, 32, 1), (128, 4096, 64, 1), (128, 4096, 16, 4), (1, 4096, 128, 1), (1, 131072, 128, 1),
        (16, 8192, 128, 1), (64, 4096, 128, 1), (128, 4096, 128, 1), (32, 32768, 128, 1), (64, 4096, 128, 2),
        (128, 4096, 64, 2),
    )),
    Case(name="four", lengths=(4641, 45118, 1730, 1696), heads=16, query_len=4),
    Case(name="mixed", lengths=_MIXED, heads=16, query_len=1),
    Case(name="mixed_h128", lengths=_MIXED, heads=128, query_len=1),
)  # fmt: skip


def chosen_cases(pattern: str | None, cases: tuple = CASES) -> tuple:
    """Cases whose text (`even b128 s4096 h16 q1`) the regular expression is found in; all without one.

    Raises ValueError when the pattern is no expression or fits no case.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"--cases must be a regular expression, got {pattern!r}: {error}") from None
    found = tuple(case for case in cases if wanted.search(str(case)))
    if not found:
        known = "\n".join(f"  {case}" for case in cases)
        raise ValueError(f"--cases {pattern!r} is found in none of\n{known}")
    return found
