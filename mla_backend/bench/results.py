"""Rows of a decode benchmark: the CSV that keeps them and the numbers that follow from them.

A row is a dict of COLUMNS (numbers as numbers, times in microseconds, absent or None where a peer has none); rows of
a run have `kernel` too, the name of our kernel, and `eager` if times have the host's work.
"""

import csv
import math
import pathlib
from dataclasses import dataclass

from mla_backend.bench.cases import Case

PEERS = ("flashmla", "fa3", "flashinfer", "vllm_triton")
CPU_PEERS = ("cpu_mla", "amx_mla")
BEST = "best peer"
TIMES = ("limit_us", "ours_us", *(f"{peer}_us" for peer in PEERS))
COLUMNS = (
    *("date", "gpu", "torch", "triton", "case", "batch", "tokens", "heads", "q_len", "cache_dtype", "page_size"),
    *TIMES,
)


def write_csv(rows: list[dict], path: pathlib.Path, columns=COLUMNS) -> None:
    """Write all rows anew; called after every case, so that a run which is killed keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: pathlib.Path) -> list[dict]:
    """Rows of a file that `write_csv` wrote. Raises ValueError for another one."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}; got {reader.fieldnames}")
        rows = [_parsed(row) for row in reader]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _parsed(row: dict) -> dict:
    integers = {name: int(row[name]) for name in ("batch", "tokens", "heads", "q_len", "page_size")}
    return row | integers | {name: float(row[name]) if row[name] else None for name in TIMES}


def case_of(row: dict) -> Case:
    """A case with the row's name, requests, tokens and shape. Only the sum of uneven lengths is known: they are given
    out evenly, which changes no number that this module computes."""
    batch, tokens = row["batch"], row["tokens"]
    total = tokens * batch if row["case"] == "even" else tokens
    lengths = tuple(total // batch + (b < total % batch) for b in range(batch))
    return Case(name=row["case"], lengths=lengths, heads=row["heads"], query_len=row["q_len"])


def peer_times(row: dict) -> dict[str, float]:
    """Microseconds of the peers that have a time."""
    return {peer: row[f"{peer}_us"] for peer in PEERS if row.get(f"{peer}_us")}


def gigabytes_per_s(row: dict, us: float) -> float:
    """Cache bytes, each counted once, in `us`."""
    return case_of(row).cache_bytes(row["cache_dtype"]) / us / 1e3


def teraflops(row: dict, us: float) -> float:
    return case_of(row).flop / us / 1e6


def intensity(row: dict) -> float:
    """FLOP for each byte of cache."""
    return case_of(row).flop / case_of(row).cache_bytes(row["cache_dtype"])


def fraction_of_limit(row: dict) -> float:
    return case_of(row).limit_us(row["cache_dtype"]) / row["ours_us"]


def best_ratio(row: dict) -> float | None:
    """Time of the fastest peer over ours: more than 1 is a win. None without peers."""
    times = peer_times(row)
    return min(times.values()) / row["ours_us"] if times else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A peer's times over ours in the cases that it has a time for: more than 1 is a win for us."""

    peer: str
    count: int
    mean: float
    worst: float
    worst_case: str


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def summaries(rows: list[dict], case_of=case_of) -> list[Summary]:
    """One for each peer that has a time, then one for the best peer of each case.   case_of: row to its case."""
    made = []
    for peer in (*PEERS, BEST):
        pairs = [(_ratio(row, peer), str(case_of(row))) for row in rows if _ratio(row, peer)]
        if pairs:
            mean = geometric_mean([ratio for ratio, _ in pairs])
            worst, case = min(pairs)
            made.append(Summary(peer=peer, count=len(pairs), mean=mean, worst=worst, worst_case=case))
    return made


def _ratio(row: dict, peer: str) -> float | None:
    if peer == BEST:
        return best_ratio(row)
    us = peer_times(row).get(peer)
    return us / row["ours_us"] if us else None


def kernel_of(row: dict) -> str:
    """Ours, and what else a line must say of a time."""
    return row.get("kernel", "kernel unknown") + (", host included" if row.get("eager") else "")


def line(row: dict) -> str:
    """A row on one line: our time, the part of the limit, and each peer's time and its ratio to ours."""
    ours = row["ours_us"]
    peers = "  ".join(f"{peer} {us:.1f} ({us / ours:.2f}x)" for peer, us in peer_times(row).items())
    return (
        f"{case_of(row)!s:28} limit {row['limit_us']:7.1f}  ours {ours:8.1f} us, {fraction_of_limit(row):4.0%} of limit"
        f" ({kernel_of(row)})  {peers or 'no peer'}"
    )
