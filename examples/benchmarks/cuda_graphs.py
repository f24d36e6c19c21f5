"""The time of a call on a GPU, without what it takes to launch it, and that of the launch alone, on the host."""

import time
from collections.abc import Callable

import torch

CALLS, REPLAYS = 50, 50  # calls in the graph, times that it is replayed


def time_calls(call: Callable[[], object]) -> float:
    """Microseconds of one call in a CUDA graph, the median over replays."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1000 * sorted(times)[REPLAYS // 2] / CALLS


def time_launches(call: Callable[[], object]) -> float:
    """Microseconds that a call keeps the host, the median over groups of calls that the GPU works off later."""
    times = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * sorted(times)[REPLAYS // 2] / CALLS
