"""Time absorbed decode beside every peer that is installed: `mla-backend bench decode`.

Every case is first compared with float32 attention on the same inputs; a wrong answer ends the run before anything is
timed. Then each case is timed on input sets that together overflow the L2 cache. The time of a call is that of
`MLAAttention.decode` with a workspace made before, which is what a model pays in every layer.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mla_backend.attention import MLAAttention
from mla_backend.bench import results
from mla_backend.bench.cases import Case, geometry_for
from mla_backend.bench.machine import BenchmarkError, machine, need_gpu
from mla_backend.bench.peers import DECODE, DecodeInputs
from mla_backend.bench.timing import graph_us, input_sets
from mla_backend.config import MLABackendConfig
from mla_backend.steps import DecodeStep
from mla_kernels import CacheLayout, Problem, UnsupportedMLA, device_of, format_of, split_for
from mla_kernels.testing import LSE_TOLERANCE, TOLERANCE, assert_matches

DTYPE = torch.bfloat16
PEER_ERROR = 2e-2  # of the norm; the peers' own errors in bf16 are ten times smaller


def make_inputs(case: Case, *, page_size: int, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> DecodeInputs:
    """Random inputs. Every request has pages for the longest one, shuffled; rows past its end are there and random."""
    geometry = geometry_for(case.heads)
    pages = -(-max(case.lengths) // page_size)
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    shape = (case.batch * pages, page_size, geometry.latent_dim)
    return DecodeInputs(
        cache_AGK=torch.randn(shape, dtype=dtype, **options).mul_(0.3),
        block_table_BM=torch.randperm(case.batch * pages, dtype=torch.int32, **options).view(case.batch, pages),
        q_BQNK=torch.randn(case.batch, case.query_len, case.heads, geometry.latent_dim, dtype=dtype, **options) * 0.3,
        seq_lens_B=torch.tensor(case.lengths, device=device, dtype=torch.int32),
        latent=geometry.kv_lora_rank,
        scale=geometry.softmax_scale,
    )


def config_for(kernel: str | None) -> MLABackendConfig:
    """The environment's settings, with another decode kernel where one is named."""
    config = MLABackendConfig.from_environment()
    if kernel is None:
        return config
    return dataclasses.replace(config, kernels=tuple((dict(config.kernels) | {"decode": kernel}).items()))


def attention_for(data: DecodeInputs, config: MLABackendConfig, *, batch_invariant: bool = False) -> MLAAttention:
    """As the adapter makes it for these inputs. Raises UnsupportedMLA or ValueError when there is no such kernel."""
    _, query_len, heads, _ = data.q_BQNK.shape
    layout = CacheLayout(
        geometry=geometry_for(heads), format=format_of(data.cache_AGK.dtype), page_size=data.cache_AGK.shape[1]
    )
    problem = Problem(layout=layout, dtype=data.q_BQNK.dtype, max_query_len=query_len)
    if batch_invariant:
        longest = data.block_table_BM.shape[1] * layout.page_size
        problem = dataclasses.replace(problem, split_tokens=split_for(layout.geometry), max_seq_len=longest)
    return MLAAttention(problem, device_of(data.cache_AGK), config, scale=data.scale, operations=("decode",))


def ours(attention: MLAAttention, data: DecodeInputs):
    """A function that decodes as the adapter does, with scratch made here and outputs made by each call.

    It returns out_TNL and lse_TN.
    """
    batch, query_len, heads, width = data.q_BQNK.shape
    workspace = attention.decode_workspace(batch)
    scratch = [torch.empty(shape, dtype=dtype, device=data.q_BQNK.device) for shape, dtype in workspace]
    q_latent, q_rope = data.q_BQNK.view(batch * query_len, heads, width).split([data.latent, width - data.latent], -1)
    step = DecodeStep(block_table_BM=data.block_table_BM, seq_lens_B=data.seq_lens_B, query_len=query_len)
    return lambda: attention.decode(q_latent, q_rope, data.cache_AGK, step, workspace=scratch)


def expected(data: DecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 attention of every request: out_TNL and lse_TN.

    Not mla_kernels.reference: that repeats keys for every head, 38 GB for 128 heads and 131072 tokens.
    """
    batch, query_len, heads, _ = data.q_BQNK.shape
    out_BQNL = data.q_BQNK.new_empty(batch, query_len, heads, data.latent, dtype=torch.float32)
    lse_BQN = out_BQNL.new_empty(batch, query_len, heads)
    page_size = data.cache_AGK.shape[1]
    for b, tokens in enumerate(data.seq_lens_B.tolist()):
        pages = data.block_table_BM[b, : -(-tokens // page_size)].long()
        row_SK = data.cache_AGK[pages].flatten(0, 1)[:tokens].float()
        score_NQS = torch.einsum("qnk,sk->nqs", data.q_BQNK[b].float(), row_SK) * data.scale
        position_S = torch.arange(tokens, device=row_SK.device)
        last_Q = tokens - query_len + torch.arange(query_len, device=row_SK.device)
        score_NQS.masked_fill_(position_S > last_Q[:, None], -math.inf)
        out_BQNL[b] = torch.einsum("nqs,sl->qnl", score_NQS.softmax(-1), row_SK[:, : data.latent])
        lse_BQN[b] = score_NQS.logsumexp(-1).T
    return out_BQNL.flatten(0, 1), lse_BQN.flatten(0, 1)


def check(actual, wanted, dtype: torch.dtype) -> None:
    """Compare (out_TNL, lse_TN), both of them whole. Raises AssertionError."""
    assert_matches("out", actual[0], wanted[0], TOLERANCE[dtype])
    assert_matches("lse", actual[1], wanted[1], LSE_TOLERANCE)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (integers: their largest) meanwhile, so that a value which nobody wrote shows."""
    kept = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch, fill = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    switch.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(kept[0], warn_only=kept[1])
        switch.fill_uninitialized_memory = fill


def verify(
    case: Case,
    config: MLABackendConfig,
    *,
    page_size: int,
    dtype: torch.dtype,
    device: str = "cuda",
    batch_invariant: bool = False,
) -> None:
    """Check our kernel, twice in the same scratch: a call may leave there what spoils the next.

    Raises BenchmarkError for a wrong answer, and when no kernel takes the case.
    """
    data = make_inputs(case, page_size=page_size, dtype=dtype, device=device)
    wanted = expected(data)
    try:
        attention = attention_for(data, config, batch_invariant=batch_invariant)
    except (UnsupportedMLA, ValueError) as error:
        raise BenchmarkError(f"case {case}: {error}") from None
    with poisoned_memory():
        call = ours(attention, data)
        answers = call(), call()
    for which, actual in zip(("first", "second"), answers, strict=True):
        try:
            check(actual, wanted, dtype)
        except AssertionError as error:
            name = attention.chosen["decode"].kernel.name
            raise BenchmarkError(f"wrong answer of {name} in case {case}, {which} call: {error}") from None


def peer_error(result, wanted_TNL: torch.Tensor) -> float:
    """Norm of a peer's error over the norm of the right output. `result`: its output, or (output, lse)."""
    out = result[0] if isinstance(result, tuple | list) else result
    return float((out.float().reshape(wanted_TNL.shape) - wanted_TNL).norm() / wanted_TNL.norm())


def peer_us(peer: str, sets: list[DecodeInputs], wanted_TNL: torch.Tensor) -> float:
    """Microseconds of a peer. Raises when it refuses, and when it computes something else than attention."""
    calls = [DECODE[peer](data) for data in sets]
    error = peer_error(calls[0](), wanted_TNL)
    if not error <= PEER_ERROR:  # NaN too
        print(f"warning: {peer} is off by {error:.1e} of the norm of float32 attention in the next case", flush=True)
        raise BenchmarkError(f"its output differs from float32 attention by more than {PEER_ERROR:g} of the norm")
    return round(graph_us(calls), 2)


def why(error: Exception) -> str:
    """A peer's refusal on one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"needs the package {error.name}, which is not installed"
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return first if isinstance(error, BenchmarkError) else f"{type(error).__name__}: {first:.160}"


def measure(case: Case, config: MLABackendConfig, *, page_size: int, dtype: torch.dtype, peers, refused, device="cuda"):
    """One row: microseconds of ours and of each peer. `refused(peer, reason)` hears why a peer has none."""
    cache_dtype = format_of(dtype).name
    count = input_sets(case.cache_bytes(cache_dtype))
    sets = [make_inputs(case, page_size=page_size, dtype=dtype, device=device, seed=seed) for seed in range(count)]
    attention = attention_for(sets[0], config)
    row = {"case": case.name, "batch": case.batch, "tokens": case.tokens, "heads": case.heads, "q_len": case.query_len}
    row |= {"cache_dtype": cache_dtype, "page_size": page_size, "kernel": attention.chosen["decode"].kernel.name}
    row["limit_us"] = round(case.limit_us(cache_dtype), 2)
    row["ours_us"] = round(graph_us([ours(attention, data) for data in sets]), 2)
    wanted = expected(sets[0])[0] if peers else None
    for peer in peers:
        try:
            row[f"{peer}_us"] = peer_us(peer, sets, wanted)
        except Exception as error:  # whatever a peer says to a shape, or that it is not there, is a result
            refused(peer, why(error))
    return row


def run(cases, *, peers, page_size: int = 64, kernel: str | None = None, csv: pathlib.Path | None = None):
    """Check all cases, time them, print a line as each ends.

    Returns the rows, and the cases of each (peer, reason) that left a cell empty. Raises BenchmarkError.
    """
    need_gpu()
    facts, config, rows = machine(), config_for(kernel), []
    for case in cases:
        verify(case, config, page_size=page_size, dtype=DTYPE)
    print(f"{len(cases)} cases agree with float32 attention on {facts['gpu']}; timing them", flush=True)
    refusals: dict[tuple[str, str], list[str]] = {}
    for case in cases:

        def refused(peer: str, reason: str, case=case) -> None:
            refusals.setdefault((peer, reason), []).append(str(case))

        rows.append(facts | measure(case, config, page_size=page_size, dtype=DTYPE, peers=peers, refused=refused))
        print(results.line(rows[-1]), flush=True)
        if csv:
            results.write_csv(rows, csv)
    return rows, refusals
