"""Where attending in latent space stops being cheaper than over expanded heads: `mla-backend bench crossover`.

A request's new tokens behind a long cached context go one way or the other (steps.py, `expanding_is_cheaper`). Here
both are timed on the same inputs, each with all that a layer does for it: absorption into latent space and back out of
it, or gathering, up-projection and attention chunk by chunk. First they must agree with each other. What the rule's one
constant, `LATENT_COST`, would have to be stands beside each measured crossover.
"""

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby, pairwise

import torch

from mla_backend.attention import MLAAttention
from mla_backend.bench.machine import BenchmarkError, machine, need_gpu
from mla_backend.bench.prefill import effort
from mla_backend.bench.prefill_cases import StepCase
from mla_backend.bench.results import write_csv
from mla_backend.bench.timing import graph_us, input_sets
from mla_backend.config import MLABackendConfig
from mla_backend.memory import CONTEXT_ROWS
from mla_backend.steps import PrefillStep, expanding_is_cheaper, plan_context, tile_queries, tile_tokens
from mla_kernels import CacheLayout, MLAGeometry, Problem, UnsupportedMLA, device_of, format_of, tensor_bytes

DTYPE, PAGE = torch.bfloat16, 64
COLUMNS = ("date", "gpu", "torch", "triton", "heads", "context", "tokens", "latent_us", "expanded_us")
# Of the norm of a row of one head. In bfloat16 either way rounds about four times, each by 0.1 %: 0.5 % is expected.
MOST_APART = 2e-2

CASES = tuple(
    StepCase(count=1, tokens=tokens, context=context, heads=heads)
    for heads in (16, 128)
    for context in (4096, 16384, 65536)
    for tokens in (16, 32, 64, 96, 128, 160, 192, 256, 384, 512)
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """A request whose new tokens are cached already, behind `context` others, and a layer's up-projection.

    up_XL: weight [heads x (P + V), L], of which w_k_NPL and w_v_NLV are views, as in vLLM.
    """

    context: int
    q_TNQ: torch.Tensor
    latent_TL: torch.Tensor
    rope_TR: torch.Tensor
    cache_AGK: torch.Tensor
    block_table_BM: torch.Tensor
    up_XL: torch.Tensor
    w_k_NPL: torch.Tensor
    w_v_NLV: torch.Tensor

    @property
    def tokens(self) -> int:
        return len(self.q_TNQ)

    def ints(self, *numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.q_TNQ.device)


def make_inputs(case: StepCase, *, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Random ones: scores have a variance of about 1, pages are shuffled."""
    geometry, length = case.geometry, case.context + case.tokens
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    pages = -(-length // PAGE)
    cache_AGK = normal(pages, PAGE, geometry.latent_dim)
    table_M = torch.randperm(pages, dtype=torch.int32, device=device, generator=generator)
    new_TK = cache_AGK[table_M.long()].flatten(0, 1)[case.context : length]
    latent, nope, v = geometry.kv_lora_rank, geometry.qk_nope_head_dim, geometry.v_head_dim
    up_XL = normal(case.heads * (nope + v), latent) * latent**-0.5
    w_k_NPL, w_v_NVL = up_XL.view(case.heads, nope + v, latent).split([nope, v], 1)
    return Inputs(
        context=case.context,
        q_TNQ=normal(case.tokens, case.heads, geometry.qk_head_dim),
        latent_TL=new_TK[:, :latent].contiguous(),
        rope_TR=new_TK[:, latent:].contiguous(),
        cache_AGK=cache_AGK,
        block_table_BM=table_M[None],
        up_XL=up_XL,
        w_k_NPL=w_k_NPL,
        w_v_NLV=w_v_NVL.transpose(1, 2),
    )


def attention_for(geometry: MLAGeometry, config: MLABackendConfig, *, dtype: torch.dtype, device: str) -> MLAAttention:
    """As an adapter makes it. Raises BenchmarkError for kernels that cannot be timed."""
    layout = CacheLayout(geometry=geometry, format=format_of(dtype), page_size=PAGE)
    problem = Problem(layout=layout, dtype=dtype, max_query_len=tile_tokens(geometry.num_heads))
    operations = ("decode", "prefill", "cache_gather")
    where = device_of(torch.empty(0, device=device))
    try:
        attention = MLAAttention(problem, where, config, scale=geometry.softmax_scale, operations=operations)
    except (UnsupportedMLA, ValueError) as error:
        raise BenchmarkError(str(error)) from None
    if waiting := [one.kernel.name for one in attention.chosen.values() if not one.kernel.capturable]:
        raise BenchmarkError(f"{', '.join(waiting)} plans on the host, so that no CUDA graph can time it: name another")
    return attention


def latent_way(attention: MLAAttention, sets: list[Inputs]) -> list:
    """Functions that attend in latent space, each for one of `sets`, all in the same scratch; they return out_TNV."""
    geometry, device = attention.problem.geometry, sets[0].q_TNQ.device
    scratch = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in attention.decode_workspace(1)]
    size = tile_tokens(geometry.num_heads)

    def call_for(data: Inputs):
        seq_lens_B = data.ints(data.context + data.tokens)
        step = tile_queries([data.tokens], data.block_table_BM, seq_lens_B, tokens_of_tile=size)
        weights = {"w_k_NPL": data.w_k_NPL, "w_v_NLV": data.w_v_NLV}

        def call():
            out_TNV = data.q_TNQ.new_empty(*data.q_TNQ.shape[:2], geometry.v_head_dim)
            return attention.extend(data.q_TNQ, data.cache_AGK, step, **weights, out_TNV=out_TNV, workspace=scratch)

        return call

    return [call_for(data) for data in sets]


def expanded_way(attention: MLAAttention, sets: list[Inputs]) -> list:
    """As `latent_way`, over expanded heads, with the same room for gathered rows."""
    geometry, first = attention.problem.geometry, sets[0].q_TNQ
    gather_buffer_SK = first.new_empty(CONTEXT_ROWS, geometry.latent_dim)

    def call_for(data: Inputs):
        step = PrefillStep(
            query_start_B1=data.ints(0, data.tokens),
            max_query_len=data.tokens,
            block_table_BM=data.block_table_BM,
            chunks=plan_context([data.tokens], [data.context], most_keys=CONTEXT_ROWS, device=first.device),
            gather_buffer_SK=gather_buffer_SK,
        )

        def up_project(latent_SL):
            return torch.nn.functional.linear(latent_SL, data.up_XL).view(len(latent_SL), geometry.num_heads, -1)

        def call():
            out_TNV = data.q_TNQ.new_empty(*data.q_TNQ.shape[:2], geometry.v_head_dim)
            new = data.q_TNQ, data.latent_TL, data.rope_TR
            return attention.prefill(*new, data.cache_AGK, step, up_project=up_project, out_TNV=out_TNV)

        return call

    return [call_for(data) for data in sets]


def apart(one_TNV: torch.Tensor, other_TNV: torch.Tensor) -> float:
    """Norm of the difference over the norm, in the row of a head where that is largest."""
    one, other = one_TNV.float(), other_TNV.float()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


def measure(case: StepCase, config: MLABackendConfig, *, dtype=DTYPE, device: str = "cuda", clock=graph_us) -> dict:
    """A row, once both ways agree. Raises BenchmarkError where they do not.

    Calls rotate through inputs, weights too, as a model's layers do: none finds its own in the L2 cache.
    """
    geometry = case.geometry
    weights = (case.heads * (geometry.qk_nope_head_dim + geometry.v_head_dim), geometry.kv_lora_rank)
    each = tensor_bytes((case.context, geometry.latent_dim), dtype) + tensor_bytes(weights, dtype)
    sets = [make_inputs(case, dtype=dtype, device=device, seed=seed) for seed in range(input_sets(each))]
    attention = attention_for(geometry, config, dtype=dtype, device=device)
    latent, expanded = latent_way(attention, sets), expanded_way(attention, sets)
    error = apart(latent[0](), expanded[0]())
    if not error <= MOST_APART:  # NaN too
        raise BenchmarkError(f"case {case}: the two ways differ by {error:.1e} of the norm in a row")
    row = {name: getattr(case, name) for name in ("heads", "context", "tokens")}
    row["kernel"] = ", ".join(attention.chosen[name].kernel.name for name in ("decode", "prefill"))
    times = {"latent_us": latent, "expanded_us": expanded}
    return row | {name: round(clock(calls, **effort(case)), 2) for name, calls in times.items()}


def measured_crossover(rows: list[dict]) -> float | None:
    """New tokens at which both ways take as long, between those of `rows`, which ascend; None if one always wins."""
    lead = [(row["tokens"], row["latent_us"] - row["expanded_us"]) for row in rows]
    for (few, before), (more, after) in pairwise(lead):
        if before < 0 <= after:
            return few + (more - few) * before / (before - after)
    return None


def rule_crossover(geometry: MLAGeometry, context: int) -> int:
    """Fewest new tokens that `expanding_is_cheaper` expands."""
    return next(tokens for tokens in count(1) if expanding_is_cheaper(geometry, [tokens], [context]))


def cost_for(geometry: MLAGeometry, context: int, tokens: float) -> float:
    """`LATENT_COST` with which the rule would change sides at so many tokens."""
    latent = geometry.kv_lora_rank
    pairs = tokens * context + tokens * (tokens + 1) / 2
    up_projection = context * latent * (geometry.qk_nope_head_dim + geometry.v_head_dim)
    expanded = geometry.qk_head_dim + geometry.v_head_dim
    return (up_projection / pairs + expanded) / (geometry.latent_dim + latent)


def findings(rows: list[dict]) -> Iterator[str]:
    """What rows of the same heads and context say of the crossover, beside the rule's."""
    for (heads, context), group in groupby(rows, lambda row: (row["heads"], row["context"])):
        mine = list(group)
        geometry = StepCase(count=1, tokens=1, context=context, heads=heads).geometry
        rule = rule_crossover(geometry, context)
        yield f"h{heads} c{context}: crossover {_where(mine, geometry, context)}; the rule's is {rule} tokens"


def _where(rows: list[dict], geometry: MLAGeometry, context: int) -> str:
    found, first, last = measured_crossover(rows), rows[0], rows[-1]
    if found is not None:
        cost = cost_for(geometry, context, found)
        return f"at {found:.0f} tokens, for which LATENT_COST would be {cost:.2f}"
    always = last["latent_us"] < last["expanded_us"]
    return f"above {last['tokens']} tokens" if always else f"at {first['tokens']} tokens or below"


def line(row: dict) -> str:
    latent, expanded = row["latent_us"], row["expanded_us"]
    return (
        f"h{row['heads']} c{row['context']} s{row['tokens']}  latent {latent:.1f} us, expanded {expanded:.1f} us"
        f" ({expanded / latent:.2f}x)  ({row['kernel']})"
    )


def run(cases, *, csv: pathlib.Path | None = None) -> list[dict]:
    """Rows of the cases, a line as each ends. Raises BenchmarkError where the two ways differ."""
    need_gpu()
    facts, rows, config = machine(), [], MLABackendConfig.from_environment()
    for case in cases:
        rows.append(facts | measure(case, config))
        print(line(rows[-1]), flush=True)
        if csv:
            write_csv(rows, csv, COLUMNS)
    return rows
