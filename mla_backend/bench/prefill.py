"""Time prefill attention over expanded heads beside every peer that is installed: `mla-backend bench prefill`.

Every case is first compared with float32 attention on the same inputs; a wrong answer ends the run before anything is
timed. Then each case is timed on input sets that together overflow the L2 cache. The time of a call is that of
`MLAAttention.attend`, outputs allocated by the call. Peers take keys of one piece: those are made before, and what
that costs an engine is in nobody's time.
"""

import math
import pathlib

import torch

from mla_backend.attention import MLAAttention
from mla_backend.bench import compare, prefill_cases
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.peers import PREFILL, PrefillInputs
from mla_backend.bench.prefill_cases import SHAPE, PrefillCase, StepCase
from mla_backend.bench.results import write_csv
from mla_backend.bench.timing import graph_us, input_sets
from mla_backend.config import MLABackendConfig
from mla_kernels import CacheLayout, Problem, device_of, format_of

DTYPE = torch.bfloat16
# Longer sequences are compared in one row of every so many: scores of all would not fit, 68 GB for 32768 tokens and 16
# heads. A tile in bf16 has 32 rows or more, so that one which is wrong or left out has a row here.
WHOLE, SAMPLE = 512, 32
COMPARED_BYTES = 4 << 30  # of float32 keys, values and scores at a time
GRAPH_US = 10_000  # of calls in a graph; at least 2 calls, at most 10


def make_inputs(case: PrefillCase, *, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> PrefillInputs:
    """Random inputs, keys and values as an up-projection leaves them."""
    geometry, total_keys = case.geometry, case.count * case.keys
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def starts(length: int):
        return torch.arange(case.count + 1, dtype=torch.int32, device=device) * length

    nope, v = geometry.qk_nope_head_dim, geometry.v_head_dim
    k_nope_SNP, v_SNV = normal(total_keys, case.heads, nope + v).split([nope, v], -1)
    return PrefillInputs(
        q_TNQ=normal(case.count * case.tokens, case.heads, geometry.qk_head_dim),
        k_nope_SNP=k_nope_SNP,
        k_rope_SNR=normal(total_keys, 1, geometry.qk_rope_head_dim).expand(-1, case.heads, -1),
        v_SNV=v_SNV,
        query_start_B1=starts(case.tokens),
        key_start_B1=starts(case.keys),
        max_query_len=case.tokens,
        max_key_len=case.keys,
        causal=case.causal,
        scale=geometry.softmax_scale,
    )


def attention_for(case: PrefillCase, data: PrefillInputs, config: MLABackendConfig) -> MLAAttention:
    """As the adapter makes it. Raises UnsupportedMLA or ValueError when there is no such kernel."""
    dtype = data.q_TNQ.dtype
    layout = CacheLayout(geometry=case.geometry, format=format_of(dtype), page_size=64)  # prefill reads no cache
    problem = Problem(layout=layout, dtype=dtype)
    return MLAAttention(problem, device_of(data.q_TNQ), config, scale=data.scale, operations=("prefill",))


def ours(attention: MLAAttention, data: PrefillInputs):
    """A function that attends as the adapter does, with outputs made by each call. It returns out_TNV and lse_TN."""
    tokens, heads, _ = data.q_TNQ.shape
    keys = (data.k_nope_SNP, data.k_rope_SNR, data.v_SNV, data.query_start_B1, data.key_start_B1)
    options = {"max_query_len": data.max_query_len, "causal": data.causal}
    dtype, device = data.q_TNQ.dtype, data.q_TNQ.device

    def call():
        out_TNV = torch.empty(tokens, heads, data.v_SNV.shape[-1], dtype=dtype, device=device)
        lse_TN = torch.empty(tokens, heads, dtype=torch.float32, device=device)
        return attention.attend(data.q_TNQ, *keys, **options, out_TNV=out_TNV, lse_TN=lse_TN)

    return call


def sampled_rows(tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of a sequence that are compared, sorted: all, or the first, the last and a random one of every SAMPLE."""
    if tokens <= WHOLE:
        return torch.arange(tokens)
    first = torch.arange(0, tokens, SAMPLE)
    rows = first + torch.randint(SAMPLE, first.shape, generator=generator)
    return torch.cat([torch.tensor([0, tokens - 1]), rows.clamp(max=tokens - 1)]).unique()


def expected(data: PrefillInputs):
    """Float32 attention of some rows of every request: rows_M of the batch, out_MNV, lse_MN, and the magnitude that
    `assert_matches` takes."""
    generator = torch.Generator().manual_seed(0)
    query_start, key_start = data.query_start_B1.tolist(), data.key_start_B1.tolist()
    parts = []
    for b in range(len(query_start) - 1):
        tokens, keys = query_start[b + 1] - query_start[b], slice(*key_start[b : b + 2])
        row_M = sampled_rows(tokens, generator).to(data.q_TNQ.device)
        hidden_from_M = row_M + (keys.stop - keys.start - tokens + 1) if data.causal else None
        parts.append((row_M + query_start[b], *_attend(data, row_M + query_start[b], keys, hidden_from_M)))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _attend(data: PrefillInputs, row_M: torch.Tensor, keys: slice, hidden_from_M: torch.Tensor | None):
    """out_MNV, lse_MN and magnitude_MNV of rows of one request, which see its keys before `hidden_from`, or all; a few
    heads at a time."""
    (_, heads, qk_width), v_width = data.q_TNQ.shape, data.v_SNV.shape[-1]
    bytes_of_one = 4 * (keys.stop - keys.start) * (qk_width + 2 * v_width + 2 * len(row_M))
    each = max(1, COMPARED_BYTES // max(1, bytes_of_one))
    groups = [slice(first, first + each) for first in range(0, heads, each)]
    parts = [_attend_heads(data, row_M, keys, hidden_from_M, group) for group in groups]
    return tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))


def _attend_heads(data: PrefillInputs, row_M, keys: slice, hidden_from_M, heads: slice):
    k_SNQ = torch.cat([data.k_nope_SNP[keys, heads], data.k_rope_SNR[keys, heads]], -1).float()
    v_SNV = data.v_SNV[keys, heads].float()
    score_NMS = torch.einsum("mnq,snq->nms", data.q_TNQ[row_M, heads].float(), k_SNQ).mul_(data.scale)
    if hidden_from_M is not None:
        score_NMS.masked_fill_(torch.arange(len(v_SNV), device=row_M.device) >= hidden_from_M[:, None], -math.inf)
    lse_NM = score_NMS.logsumexp(-1)
    weight_NMS = score_NMS.sub_(lse_NM[..., None]).exp_()
    out_MNV, magnitude_MNV = (torch.einsum("nms,snv->mnv", weight_NMS, v) for v in (v_SNV, v_SNV.abs()))
    return out_MNV, lse_NM.T, magnitude_MNV


def check(actual, wanted, dtype: torch.dtype) -> None:
    """Compare (out_TNV, lse_TN) with what `expected` gave; rows that it does not have must be finite.

    Raises AssertionError.
    """
    row_M, out_MNV, lse_MN, magnitude_MNV = wanted
    for name, values in zip(("out", "lse"), actual, strict=True):
        bad = values.numel() - int(values.isfinite().sum())
        assert not bad, f"{name}: {bad} of {values.numel()} values are not finite"
    compare.check([values[row_M] for values in actual], (out_MNV, lse_MN), dtype, magnitude_MNV)


def verify(case: PrefillCase, config: MLABackendConfig, *, dtype: torch.dtype, device: str = "cuda") -> None:
    """Check our kernel. Raises BenchmarkError for a wrong answer, and when no kernel takes the case."""
    data = make_inputs(case, dtype=dtype, device=device)
    wanted = expected(data)
    compare.check_kernel(
        case,
        lambda: attention_for(case, data, config),
        lambda attention: ours(attention, data),
        lambda actual: check(actual, wanted, dtype),
    )


def effort_of(us: float) -> dict[str, int]:
    """Options of a clock: few calls of what takes long, whose times differ little anyway."""
    calls = min(10, max(2, int(GRAPH_US / us)))
    return {"at_least": calls, "replays": 12 if calls == 10 else 6}


def effort(case: PrefillCase) -> dict[str, int]:
    return effort_of(case.limit_us)


def measure(
    case: PrefillCase,
    config: MLABackendConfig,
    *,
    dtype: torch.dtype,
    peers,
    refused,
    clock=graph_us,
    device: str = "cuda",
):
    """One row: microseconds of ours and of each peer. `refused(peer, reason)` hears why a peer has none.

    clock: a function of timing.py.
    """
    sets = [make_inputs(case, dtype=dtype, device=device, seed=seed) for seed in range(input_sets(case.bytes))]
    attention = attention_for(case, sets[0], config)
    row = {"case": case.name} | {name: getattr(case, name) for name in SHAPE}
    row |= {"kernel": compare.kernel_name(attention), "limit_us": round(case.limit_us, 2)}
    row["ours_us"] = round(clock([ours(attention, data) for data in sets], **effort(case)), 2)
    if not peers:
        return row
    row_M, out_MNV, *_ = expected(sets[0])
    makers = {peer: PREFILL[peer] for peer in peers}
    timing = {"clock": clock, **effort(case)}
    return row | compare.time_peers(
        makers, sets, lambda result: compare.peer_error(result, out_MNV, row_M), refused, **timing
    )


def run(cases, *, peers, kernel: str | None = None, eager: bool = False, csv: pathlib.Path | None = None):
    """Rows and refusals of these cases, as compare.run gives them. Steps come last, and are refused where vLLM is not:
    BenchmarkError if there is nothing else.

    eager: time calls as the host makes them, instead of in a CUDA graph.
    """
    config = compare.config_for("prefill", kernel)
    clock = compare.clock_for("prefill", config, eager=eager)
    alone = [case for case in cases if not isinstance(case, StepCase)]
    rows, refusals = compare.run(
        alone,
        lambda case: verify(case, config, dtype=DTYPE),
        lambda case, refused: measure(case, config, dtype=DTYPE, peers=peers, refused=refused, clock=clock),
        line=prefill_cases.line,
        columns=prefill_cases.COLUMNS,
        csv=csv,
        eager=eager,
    )
    if steps := [case for case in cases if isinstance(case, StepCase)]:
        _run_steps(steps, rows, refusals, peers=peers, kernel=kernel, eager=eager, csv=csv)
    return rows, refusals


def _run_steps(cases: list[StepCase], rows: list[dict], refusals: dict, *, peers, kernel, eager, csv) -> None:
    """Add their rows and refusals to those of other cases."""
    from mla_backend.bench import prefill_steps

    def refused(peer: str, reason: str, case) -> None:
        refusals.setdefault((peer, reason), []).append(str(case))

    if reason := prefill_steps.why_not():
        if not rows:
            raise BenchmarkError(f"case {cases[0]}: {reason}")
        for case in cases:
            refused("step", reason, case)
        return
    facts = compare.facts_of_run(eager=eager)
    for row in prefill_steps.run(cases, peers=peers, refused=refused, kernel=kernel, eager=eager):
        rows.append(facts | row)
        print(prefill_cases.line(rows[-1]), flush=True)
        if csv:
            write_csv(rows, csv, prefill_cases.COLUMNS)
