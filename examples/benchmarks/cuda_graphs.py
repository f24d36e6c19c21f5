"""The time of a call on a GPU, without what it takes to launch it: replays of a CUDA graph of many calls."""

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
