"""Time absorbed decode beside every peer that is installed: `mla-backend bench decode`.

Every case is first compared with float32 attention on the same inputs; a wrong answer ends the run before anything is
timed. Then each case is timed on input sets that together overflow the L2 cache. The time of a call is that of
`MLAAttention.decode` with a workspace made before, which is what a model pays in every layer; in a CUDA graph, or as
the host makes them (`--eager`), which kernels that plan on the host need.
"""

import functools
import math
import pathlib
from dataclasses import replace

import torch

from mla_backend.attention import MLAAttention
from mla_backend.bench import compare, results
from mla_backend.bench.cases import Case, geometry_for
from mla_backend.bench.peers import DECODE, DecodeInputs
from mla_backend.bench.timing import graph_us, input_sets
from mla_backend.config import MLABackendConfig
from mla_backend.steps import DecodeStep
from mla_kernels import FORMATS, CacheLayout, MLAGeometry, Problem, device_of, format_of, select, split_for
from mla_kernels.packed_rows import unpack

DTYPE = torch.bfloat16


def make_inputs(
    case: Case,
    *,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    device: str = "cuda",
    seed: int = 0,
) -> DecodeInputs:
    """Random inputs. Every request has pages for the longest one, shuffled; rows past its end are there and random.

    cache_dtype: `dtype` without it; torch.uint8 for tile-scaled rows, which our kernel writes.
    """
    geometry = geometry_for(case.heads)
    pages = -(-max(case.lengths) // page_size)
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    shape = (case.batch * pages, page_size, geometry.latent_dim)
    cache_AGK = torch.randn(shape, dtype=dtype, **options).mul_(0.3)
    return DecodeInputs(
        cache_AGK=packed(cache_AGK, geometry) if cache_dtype == torch.uint8 else cache_AGK.to(cache_dtype or dtype),
        block_table_BM=torch.randperm(case.batch * pages, dtype=torch.int32, **options).view(case.batch, pages),
        q_BQNK=torch.randn(case.batch, case.query_len, case.heads, geometry.latent_dim, dtype=dtype, **options) * 0.3,
        seq_lens_B=torch.tensor(case.lengths, device=device, dtype=torch.int32),
        latent=geometry.kv_lora_rank,
        scale=geometry.softmax_scale,
    )


def packed(cache_AGK: torch.Tensor, geometry: MLAGeometry) -> torch.Tensor:
    """Tile-scaled rows of these."""
    pages, page_size, _ = cache_AGK.shape
    layout = CacheLayout(geometry=geometry, format=format_of(torch.uint8), page_size=page_size)
    rows = torch.empty(layout.shape(pages), dtype=torch.uint8, device=cache_AGK.device)
    writer = select("cache_write", Problem(layout=layout, dtype=cache_AGK.dtype), device_of(rows)).kernel
    values = cache_AGK.flatten(0, 1).split([geometry.kv_lora_rank, geometry.qk_rope_head_dim], -1)
    writer.run(*values, rows, torch.arange(pages * page_size, device=rows.device))
    return rows


def attention_for(data: DecodeInputs, config: MLABackendConfig, *, batch_invariant: bool = False) -> MLAAttention:
    """As the adapter makes it for these inputs. Raises UnsupportedMLA or ValueError when there is no such kernel."""
    _, query_len, heads, _ = data.q_BQNK.shape
    layout = CacheLayout(
        geometry=geometry_for(heads), format=format_of(data.cache_AGK.dtype), page_size=data.cache_AGK.shape[1]
    )
    problem = Problem(layout=layout, dtype=data.q_BQNK.dtype, max_query_len=query_len)
    if batch_invariant:
        longest = data.block_table_BM.shape[1] * layout.page_size
        problem = replace(problem, split_tokens=split_for(layout.geometry), max_seq_len=longest)
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
    batch, query_len, heads, width = data.q_BQNK.shape
    out_BQNL = data.q_BQNK.new_empty(batch, query_len, heads, data.latent, dtype=torch.float32)
    lse_BQN = out_BQNL.new_empty(batch, query_len, heads)
    page_size = data.cache_AGK.shape[1]
    for b, tokens in enumerate(data.seq_lens_B.tolist()):
        pages = data.block_table_BM[b, : -(-tokens // page_size)].long()
        rows_AGK = data.cache_AGK[pages]
        rows_AGK = unpack(rows_AGK, width) if rows_AGK.dtype == torch.uint8 else rows_AGK.float()
        row_SK = rows_AGK.flatten(0, 1)[:tokens]
        score_NQS = torch.einsum("qnk,sk->nqs", data.q_BQNK[b].float(), row_SK) * data.scale
        position_S = torch.arange(tokens, device=row_SK.device)
        last_Q = tokens - query_len + torch.arange(query_len, device=row_SK.device)
        score_NQS.masked_fill_(position_S > last_Q[:, None], -math.inf)
        out_BQNL[b] = torch.einsum("nqs,sl->qnl", score_NQS.softmax(-1), row_SK[:, : data.latent])
        lse_BQN[b] = score_NQS.logsumexp(-1).T
    return out_BQNL.flatten(0, 1), lse_BQN.flatten(0, 1)


def verify(
    case: Case,
    config: MLABackendConfig,
    *,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    device: str = "cuda",
    batch_invariant: bool = False,
) -> None:
    """Check our kernel. Raises BenchmarkError for a wrong answer, and when no kernel takes the case."""
    data = make_inputs(case, page_size=page_size, dtype=dtype, cache_dtype=cache_dtype, device=device)
    wanted = expected(data)
    compare.check_kernel(
        case,
        lambda: attention_for(data, config, batch_invariant=batch_invariant),
        lambda attention: ours(attention, data),
        lambda actual: compare.check(actual, wanted, dtype),
    )


def measure(
    case: Case,
    config: MLABackendConfig,
    *,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    peers,
    refused,
    clock=graph_us,
    device="cuda",
):
    """One row: microseconds of ours and of each peer. `refused(peer, reason)` hears why a peer has none.

    clock: a function of timing.py.
    """
    options = {"page_size": page_size, "dtype": dtype, "cache_dtype": cache_dtype, "device": device}
    cache = format_of(cache_dtype or dtype).name
    sets = [make_inputs(case, **options, seed=seed) for seed in range(input_sets(case.cache_bytes(cache)))]
    attention = attention_for(sets[0], config)
    row = {"case": case.name, "batch": case.batch, "tokens": case.tokens, "heads": case.heads, "q_len": case.query_len}
    row |= {"cache_dtype": cache, "page_size": page_size, "kernel": compare.kernel_name(attention)}
    row["limit_us"] = round(case.limit_us(cache), 2)
    row["ours_us"] = round(clock([ours(attention, data) for data in sets]), 2)
    wanted = expected(sets[0])[0] if peers else None
    makers = {peer: DECODE[peer] for peer in peers}
    most = compare.PEER_ERROR_FP8 if sets[0].cache_AGK.itemsize == 1 else compare.PEER_ERROR
    error_of = functools.partial(compare.peer_error, wanted=wanted)
    return row | compare.time_peers(makers, sets, error_of, refused, clock=clock, most_error=most)


def run(
    cases,
    *,
    peers,
    page_size: int = 64,
    cache: str = "bf16",
    kernel: str | None = None,
    eager: bool = False,
    csv: pathlib.Path | None = None,
):
    """Rows and refusals of these cases, as compare.run gives them.

    cache: a name of mla_kernels.FORMATS.   eager: time calls as the host makes them, instead of in a CUDA graph.
    """
    config = compare.config_for("decode", kernel)
    clock = compare.clock_for("decode", config, eager=eager)
    options = {"page_size": page_size, "dtype": DTYPE, "cache_dtype": FORMATS[cache].dtype}
    return compare.run(
        cases,
        lambda case: verify(case, config, **options),
        lambda case, refused: measure(case, config, peers=peers, refused=refused, clock=clock, **options),
        line=results.line,
        columns=results.COLUMNS,
        csv=csv,
        eager=eager,
    )
