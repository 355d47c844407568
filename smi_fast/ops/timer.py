"""How long a call takes on a GPU when a CUDA graph replays it, without the time of launches."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP, CALLS, REPLAYS = 3, 20, 5


def replayed_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, with a warm L2 cache: of several in one graph, the median replay.

    Args:
        call: does the same work on the same memory each time, and doesn't wait for the device.
        device: a CUDA device.

    Raises:
        RuntimeError: the call can't be captured.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with work of their own.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
        graph.replay()
        times: list[float] = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times) / CALLS
