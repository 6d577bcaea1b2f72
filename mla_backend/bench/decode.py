"""Time absorbed decode beside every peer that is installed.

    python -m mla_backend.bench.decode --csv kernels/benchmarks/results/h200_decode.csv

Prints a table and writes one CSV row a case. Each case is first compared with float32 attention on the same inputs; a
wrong answer ends the run. `limit` = max(bytes / copy bandwidth, FLOP / matrix rate) as measured on one H200 (4.3 TB/s,
790 TFLOP/s).
"""

import argparse
import csv
import datetime
import math
import pathlib

import torch

from mla_backend.attention import MLAAttention
from mla_backend.bench.peers import DECODE, DecodeInputs
from mla_backend.bench.timing import graph_us, input_sets
from mla_backend.config import MLABackendConfig
from mla_backend.steps import DecodeStep
from mla_kernels import CacheLayout, MLAGeometry, Problem, device_of, format_of
from mla_kernels.testing import TOLERANCE, assert_matches

CASES = (  # batch, tokens, heads, query tokens
    (1, 1024, 16, 1), (1, 4096, 16, 1), (1, 32768, 16, 1), (1, 131072, 16, 1), (1, 262144, 8, 1), (4, 8192, 16, 1),
    (16, 4096, 16, 1), (64, 4096, 16, 1), (128, 1024, 16, 1), (128, 4096, 16, 1), (128, 4096, 8, 1), (128, 4096, 32, 1),
    (128, 4096, 64, 1), (128, 4096, 16, 4), (1, 4096, 128, 1), (1, 131072, 128, 1), (16, 8192, 128, 1),
    (64, 4096, 128, 1), (128, 4096, 128, 1), (32, 32768, 128, 1), (64, 4096, 128, 2), (128, 4096, 64, 2),
)  # fmt: skip
PEER_COLUMNS = ("flashmla", "fa3", "flashinfer", "vllm_triton")
COLUMNS = (
    "date", "gpu", "torch", "triton", "case", "batch", "tokens", "heads", "q_len", "cache_dtype", "page_size",
    "limit_us", "ours_us", *(f"{peer}_us" for peer in PEER_COLUMNS),
)  # fmt: skip
BYTES_PER_US, FLOP_PER_US = 4.3e6, 790e6


def geometry_for(heads: int) -> MLAGeometry:
    """DeepSeek's widths with `heads` heads on this rank."""
    return MLAGeometry(num_heads=heads, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)


def make_inputs(batch: int, tokens: int, heads: int, query_len: int, *, page_size: int, dtype) -> DecodeInputs:
    geometry = geometry_for(heads)
    pages = -(-tokens // page_size)
    cache = torch.randn(batch * pages, page_size, geometry.latent_dim, device="cuda", dtype=dtype) * 0.3
    table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32).view(batch, pages)
    return DecodeInputs(
        q_BQNK=torch.randn(batch, query_len, heads, geometry.latent_dim, device="cuda", dtype=dtype) * 0.3,
        cache_AGK=cache,
        block_table_BM=table,
        seq_lens_B=torch.full((batch,), tokens, device="cuda", dtype=torch.int32),
        latent=geometry.kv_lora_rank,
        scale=geometry.softmax_scale,
    )


def ours(data: DecodeInputs):
    """Our decode as the adapter calls it, scratch included, outputs allocated by the graph's pool."""
    batch, query_len, heads, width = data.q_BQNK.shape
    layout = CacheLayout(
        geometry=geometry_for(heads), format=format_of(data.cache_AGK.dtype), page_size=data.cache_AGK.shape[1]
    )
    problem = Problem(layout=layout, dtype=data.q_BQNK.dtype, max_query_len=query_len)
    config = MLABackendConfig.from_environment()
    attention = MLAAttention(problem, device_of(data.cache_AGK), config, scale=data.scale, operations=("decode",))
    scratch = [torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in attention.decode_workspace(batch)]
    q_latent, q_rope = data.q_BQNK.view(batch * query_len, heads, width).split([data.latent, width - data.latent], -1)
    step = DecodeStep(block_table_BM=data.block_table_BM, seq_lens_B=data.seq_lens_B, query_len=query_len)
    return lambda: attention.decode(q_latent, q_rope, data.cache_AGK, step, workspace=scratch)[0]


def check(data: DecodeInputs, out_TNL: torch.Tensor) -> None:
    """Compare the first and the last request with float32 attention. Raises AssertionError."""
    batch, query_len, heads, _ = data.q_BQNK.shape
    for b in {0, batch - 1}:
        tokens = int(data.seq_lens_B[b])
        rows = data.cache_AGK[data.block_table_BM[b].long()].flatten(0, 1)[:tokens].float()
        score = torch.einsum("qnk,sk->nqs", data.q_BQNK[b].float(), rows) * data.scale
        position = torch.arange(tokens, device=rows.device)
        last = tokens - query_len + torch.arange(query_len, device=rows.device)
        score.masked_fill_(position > last[:, None], -math.inf)
        expected = torch.einsum("nqs,sl->qnl", score.softmax(-1), rows[:, : data.latent])
        actual = out_TNL.view(batch, query_len, heads, -1)[b]
        assert_matches(f"request {b}", actual, expected, TOLERANCE[actual.dtype])


def limit_us(batch: int, tokens: int, heads: int, query_len: int, row_bytes: int) -> float:
    flop = 2 * batch * tokens * heads * query_len * (512 + 64 + 512)
    return max(batch * tokens * row_bytes / BYTES_PER_US, flop / FLOP_PER_US)


def measure(case, *, page_size: int, dtype, peers: list[str]) -> dict:
    """One CSV row: microseconds of ours and of each peer, empty where a peer refuses."""
    batch, tokens, heads, query_len = case
    first = make_inputs(*case, page_size=page_size, dtype=dtype)
    check(first, ours(first)())
    sets = [first] + [
        make_inputs(*case, page_size=page_size, dtype=dtype) for _ in range(input_sets(first.cache_AGK.nbytes) - 1)
    ]
    row_bytes = first.cache_AGK.shape[2] * dtype.itemsize
    row = {"case": "even", "batch": batch, "tokens": tokens, "heads": heads, "q_len": query_len}
    row |= {"cache_dtype": format_of(dtype).name, "page_size": page_size}
    row["limit_us"] = round(limit_us(*case, row_bytes), 1)
    row["ours_us"] = round(graph_us([ours(data) for data in sets]), 1)
    for peer in peers:
        try:
            row[f"{peer}_us"] = round(graph_us([DECODE[peer](data) for data in sets]), 1)
        except Exception as error:  # a peer that refuses a shape, or is not there, is a result
            print(f"  {peer} on {case}: {error!r:.100}", flush=True)
    return row


def print_row(row: dict, peers: list[str]) -> None:
    times = {peer: row.get(f"{peer}_us") for peer in peers}
    peer_text = "  ".join(f"{peer} {t:8.1f} ({t / row['ours_us']:4.2f}x)" for peer, t in times.items() if t)
    print(
        f"b {row['batch']:4} s {row['tokens']:6} h {row['heads']:3} q {row['q_len']:2}  limit {row['limit_us']:7.1f}  "
        f"ours {row['ours_us']:8.1f} us ({row['limit_us'] / row['ours_us']:4.0%} of limit)  {peer_text}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=pathlib.Path)
    parser.add_argument("--peers", nargs="*", default=list(DECODE), choices=list(DECODE))
    parser.add_argument("--page-size", type=int, default=64)
    args = parser.parse_args()
    import triton

    torch.manual_seed(0)
    facts = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    rows = []
    for case in CASES:
        rows.append(facts | measure(case, page_size=args.page_size, dtype=torch.bfloat16, peers=args.peers))
        print_row(rows[-1], args.peers)
        if args.csv:
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="")
                writer.writeheader()
                writer.writerows(rows)
    for peer in args.peers:
        ratios = [row[f"{peer}_us"] / row["ours_us"] for row in rows if row.get(f"{peer}_us")]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{peer}: {len(ratios)} cases, {mean:.2f}x our time in geometric mean, {min(ratios):.2f}x at worst")


if __name__ == "__main__":
    main()
