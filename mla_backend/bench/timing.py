"""How a kernel is timed: several calls over inputs that together overflow the L2 cache, in a CUDA graph or as the host
makes them."""

import statistics
import time

import torch

ENOUGH_BYTES = 180_000_000  # three times the 60 MB of an H200's L2


def input_sets(bytes_of_one: int) -> int:
    """Input sets that calls must rotate through, so that none finds its cache in L2."""
    return -(-ENOUGH_BYTES // bytes_of_one)


def graph_us(calls, *, at_least: int = 10, replays: int = 12) -> float:
    """Median microseconds of a call in a CUDA graph.

    calls: functions that do equal work on different memory; the graph goes round them until it holds `at_least` calls.
    """
    rounds = -(-at_least // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return _median_us(lambda: _replay_ms(graph, 1), rounds * len(calls), replays)


def call_us(calls, *, at_least: int = 50, replays: int = 12) -> float:
    """As `graph_us`, of calls that the host makes one after another: its own work is in their time where the GPU waits
    for it. More calls, since each round begins and ends with an idle GPU."""
    rounds = -(-at_least // len(calls))
    for call in calls:
        call()
    return _median_us(lambda: _calls_ms(calls, rounds), rounds * len(calls), replays)


def peak_bytes(call) -> int:
    """Most bytes that a call has allocated at a time, beside what was there before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def _median_us(round_ms, count: int, times: int) -> float:
    """Of one of the `count` calls of a round; the first two rounds are left out."""
    us = [round_ms() * 1e3 / count for _ in range(times + 2)]
    return sorted(us[2:])[times // 2]


def _calls_ms(calls, rounds: int) -> float:
    """Between two moments at which the GPU has nothing to do."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(rounds):
        for call in calls:
            call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def replay_ms(graph, *, together: int = 20, times: int = 5) -> float:
    """Median milliseconds of a captured graph, as many at a time as `together`."""
    torch.cuda.synchronize()
    _replay_ms(graph, together)
    return statistics.median(_replay_ms(graph, together) for _ in range(times))


def _replay_ms(graph, count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count
