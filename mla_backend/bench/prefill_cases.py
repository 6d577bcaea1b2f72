"""What prefill is timed on, the least time that a case can take, and the rows of its CSV. Imports no torch."""

from dataclasses import dataclass

from mla_backend.bench.cases import BYTES_PER_US, FLOP_PER_US, ROPE, geometry_for
from mla_backend.bench.results import kernel_of, peer_times

PEERS = ("fa3", "flashinfer")
SHAPE = ("count", "tokens", "context", "heads", "qk_dim", "v_dim")
COLUMNS = (
    *("date", "gpu", "torch", "triton", "case"),
    *SHAPE,
    *("limit_us", "ours_us", *(f"{peer}_us" for peer in PEERS)),
)


@dataclass(frozen=True, kw_only=True)
class PrefillCase:
    """Sequences of equal length: new tokens of each, that attend causally to each other, or to all of `context` cached
    tokens where there are some. Heads of this rank; widths of queries and values.

    name: the CSV's `case`. "kernel" is the attention alone, without the projection that makes keys and values; "step"
    what a layer does (StepCase).
    """

    name: str = "kernel"
    count: int
    tokens: int
    context: int = 0
    heads: int
    qk_dim: int = 192
    v_dim: int = 128

    @property
    def causal(self) -> bool:
        return self.context == 0

    @property
    def keys(self) -> int:
        """Of each sequence."""
        return self.context or self.tokens

    @property
    def geometry(self):
        return geometry_for(self.heads, nope=self.qk_dim - ROPE, v=self.v_dim)

    @property
    def flop(self) -> int:
        """Multiply-adds of both matrix products, times 2; a causal mask hides half of them."""
        whole = 2 * self.count * self.heads * self.tokens * self.keys * (self.qk_dim + self.v_dim)
        return whole // 2 if self.causal else whole

    @property
    def bytes(self) -> int:
        """Of queries, keys, values and output in bf16, each moved once; keys as peers read them, every head's whole."""
        return 2 * self.count * self.heads * (self.tokens + self.keys) * (self.qk_dim + self.v_dim)

    @property
    def limit_us(self) -> float:
        """The larger of bytes / copy bandwidth and FLOP / matrix rate."""
        return max(self.bytes / BYTES_PER_US, self.flop / FLOP_PER_US)

    def __str__(self) -> str:
        cached = f" c{self.context}" if self.context else ""
        return f"n{self.count} s{self.tokens}{cached} h{self.heads} {self.qk_dim}/{self.v_dim}"


@dataclass(frozen=True, kw_only=True)
class StepCase(PrefillCase):
    """What a layer of an engine does with new tokens that it has projected and cached: attends to `context` tokens that
    were cached before, and causally to the new ones."""

    name: str = "step"

    @property
    def flop(self) -> int:
        """Of the way that takes fewer: over expanded heads, up-projection included, or in latent space."""
        geometry, new = self.geometry, self.tokens
        pairs = new * self.context + new * (new + 1) // 2
        project = geometry.kv_lora_rank * (geometry.qk_nope_head_dim + geometry.v_head_dim)
        expanded = pairs * (self.qk_dim + self.v_dim) + (new + self.context) * project
        latent = pairs * (geometry.latent_dim + geometry.kv_lora_rank) + new * project
        return 2 * self.count * self.heads * min(expanded, latent)

    @property
    def bytes(self) -> int:
        """Of queries, latent rows and output in bf16, each moved once."""
        rows = (self.tokens + self.context) * self.geometry.latent_dim
        return 2 * self.count * (rows + self.heads * self.tokens * (self.qk_dim + self.v_dim))

    def __str__(self) -> str:
        return f"step {super().__str__()}"


CASES = (
    *(PrefillCase(count=count, tokens=tokens, heads=heads) for count, tokens, heads in (
        (16, 512, 16), (8, 1024, 16), (4, 4096, 16), (1, 8192, 16), (1, 32768, 16),
        (8, 1024, 128), (4, 4096, 128), (1, 8192, 128), (1, 16384, 128),
    )),
    # GLM-4.7-Flash
    *(PrefillCase(count=count, tokens=tokens, heads=20, qk_dim=256, v_dim=256) for count, tokens in (
        (16, 512), (1, 8192),
    )),
    PrefillCase(count=1, tokens=512, context=16384, heads=16),
    *(StepCase(count=1, tokens=tokens, context=context, heads=heads) for heads in (16, 128) for tokens, context in (
        (8192, 0), (512, 16384), (64, 65536), (1024, 131072),
    )),
)  # fmt: skip


def case_of(row: dict) -> PrefillCase:
    kind = StepCase if row["case"] == "step" else PrefillCase
    return kind(**{name: row[name] for name in SHAPE})


def teraflops(row: dict, us: float) -> float:
    return case_of(row).flop / us / 1e6


def line(row: dict) -> str:
    """A row on one line: our time and rate, and each peer's time and its ratio to ours."""
    ours = row["ours_us"]
    peers = "  ".join(f"{peer} {us:.1f} ({us / ours:.2f}x)" for peer, us in peer_times(row).items())
    return (
        f"{case_of(row)!s:31} limit {row['limit_us']:8.1f}  ours {ours:8.1f} us, {teraflops(row, ours):4.0f} TFLOP/s"
        f" ({kernel_of(row)})  {peers or 'no peer'}{_memory(row)}"
    )


def _memory(row: dict) -> str:
    """What a step allocates, where that was measured; no CSV has a column for it."""
    sizes = {name: row.get(f"{name}_bytes") for name in ("ours", *PEERS)}
    shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in sizes.items() if size is not None)
    return f"  memory {shown}" if shown else ""
