"""Batch invariance as statements about bits: one sequence decoded in many ways, and what must come out alike."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mla_kernels import MLAGeometry, reference
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches, make_pool, pack_cache


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Cache rows and queries of every token of one request: row_SK, q_SNK."""

    row_SK: torch.Tensor
    q_SNK: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A kernel's `run` with what is the same in every call. Each call gets a new pool, whose pages lie in another
    order and hold NaN where no request of the call has a row. packed: rows are tile-scaled."""

    run: Callable
    geometry: MLAGeometry
    dtype: torch.dtype
    device: str
    split_tokens: int | None
    page_size: int = 16
    workspace: tuple | None = None
    packed: bool = False

    def sequence(self, tokens: int, seed: int) -> Sequence:
        """Half of the queries look at one key, the others at all."""
        g = torch.Generator().manual_seed(seed)
        heads, width = self.geometry.num_heads, self.geometry.latent_dim
        row_SK = torch.randn(tokens, width, generator=g)
        q_SNK = torch.randn(tokens, heads, width, generator=g)
        q_SNK[:, ::2] += row_SK[torch.randint(tokens, (tokens,), generator=g), None] / 4
        return Sequence(row_SK=row_SK, q_SNK=q_SNK)

    def __call__(self, *members: tuple[Sequence, int, int], ragged: bool = False) -> list:
        """(out_TNL, lse_TN) of each member: a sequence of which tokens first .. end - 1 are the query."""
        first_end = [(first, end) for _, first, end in members]
        g = torch.Generator().manual_seed(len(members) + first_end[0][0])
        rows = [sequence.row_SK[:end] for sequence, _, end in members]
        cache, table = make_pool(rows, self.geometry.latent_dim, page_size=self.page_size, generator=g)
        cache = pack_cache(cache, self.geometry) if self.packed else cache.to(self.dtype)
        q = torch.cat([sequence.q_SNK[first:end] for sequence, first, end in members])
        lens = [end - first for first, end in first_end]
        options = {"scale": self.geometry.softmax_scale, "query_len": max(lens)}
        if ragged or len(set(lens)) > 1:
            options["query_start_B1"] = self._put(torch.tensor([0, *lens]).cumsum(0).int())
        q_parts = self._put(q.to(self.dtype)).split([self.geometry.kv_lora_rank, self.geometry.qk_rope_head_dim], -1)
        seq_lens = self._put(torch.tensor([end for _, end in first_end], dtype=torch.int32))
        arrays = (*q_parts, self._put(cache), self._put(table), seq_lens)
        out, lse = self.run(*arrays, **options, split_tokens=self.split_tokens, workspace=self.workspace)
        return list(zip(out.split(lens), lse.split(lens), strict=True))

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def check(self, sequence: Sequence, first: int, end: int, answer) -> None:
        """Compare an answer with the float64 reference."""
        exact = Decoder(**{**vars(self), "run": _exact, "split_tokens": None, "workspace": None})
        (out, lse), (expected, expected_lse) = answer, exact((sequence, first, end))[0]
        assert_matches("lse", lse, expected_lse, LSE_TOLERANCE)
        assert_matches("out", out, expected, TOLERANCE[self.dtype])


def _exact(q_latent, q_rope, cache, *rest, workspace, **options):
    cache = reference.values_of(cache, q_latent.shape[-1] + q_rope.shape[-1], torch.float64)
    return reference.decode(q_latent.double(), q_rope.double(), cache, *rest, **options)


def ways(decode: Decoder, tokens: int, positions: list[int]) -> Iterator[tuple[str, int, tuple]]:
    """(what was done, first token, the answer) of one sequence of `tokens` tokens, decoded in many ways; all must have
    the bits that `alone` gives for the same tokens. Begins with the sequence in one go."""
    subject, other, long = (decode.sequence(n, seed) for seed, n in enumerate((tokens, 21, 2 * tokens)))
    yield "in one go", 0, decode((subject, 0, tokens))[0]
    for chunk in (16, tokens // 2 + 1):
        for first in range(0, tokens, chunk):
            end = min(first + chunk, tokens)
            yield f"in chunks of {chunk}, from {first}", first, decode((subject, first, end))[0]
    for p in positions:
        mine = (subject, p, p + 1)
        yield f"{p} behind others", p, decode((other, 20, 21), (long, 2 * tokens - 1, 2 * tokens), mine)[2]
        yield f"{p} before others", p, decode(mine, (long, tokens, tokens + 1))[0]
        yield f"{p} among many", p, decode(*[(other, 3, 4)] * 9, mine, *[(other, 5, 6)] * 9)[9]
        yield f"{p} ragged", p, decode((other, 1, 21), mine, (long, 5, 12))[1]
        if p:
            yield f"{p - 1} and {p}", p - 1, decode((long, 30, 32), (subject, p - 1, p + 1))[1]


def alone(decode: Decoder, tokens: int, positions: list[int]) -> dict[int, tuple]:
    """Each token of `positions` decoded by itself, a batch of one: what every other way must agree with."""
    subject = decode.sequence(tokens, 0)
    return {p: decode((subject, p, p + 1))[0] for p in positions}


def differences(decode: Decoder, tokens: int, positions: list[int]) -> list[str]:
    """The ways in which a token of `positions` has other bits than alone."""
    wanted, different = alone(decode, tokens, positions), []
    for what, first, (out, lse) in ways(decode, tokens, positions):
        for p in positions:
            if not first <= p < first + len(out):
                continue
            mine = out[p - first : p - first + 1], lse[p - first : p - first + 1]
            if not all(map(torch.equal, mine, wanted[p])):
                different.append(f"token {p}, {what}")
    return different
