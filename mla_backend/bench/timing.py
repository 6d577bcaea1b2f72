"""How a kernel is timed: a CUDA graph of several calls over inputs that together overflow the L2 cache."""

import statistics

import torch

ENOUGH_BYTES = 180_000_000  # three times the 60 MB of an H200's L2


def input_sets(bytes_of_one: int) -> int:
    """Input sets that calls must rotate through, so that none finds its cache in L2."""
    return -(-ENOUGH_BYTES // bytes_of_one)


def graph_us(calls, *, at_least: int = 10, replays: int = 12) -> float:
    """Median microseconds of a call.

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
    times = [_replay_ms(graph, 1) * 1e3 / (rounds * len(calls)) for _ in range(replays + 2)]
    return sorted(times[2:])[replays // 2]


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
