"""A function as a CUDA graph: captured once, then replayed at the cost of one launch."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from smi_fast.inversion.inputs import one_of

# Calls before the first capture, in which libraries set themselves up and kernels are compiled. For
# later ones on the same stream one is enough, which compiles kernels.
WARM_UP, LATER_WARM_UP = 3, 1


class NotCapturable(RuntimeError):
    """The function does what a CUDA graph can't hold, such as waiting for the device."""


def graphs_allowed() -> bool:
    """What ``SMI_FAST_GRAPH`` says: 0 or 1, by default 1."""
    return one_of("SMI_FAST_GRAPH", os.environ.get("SMI_FAST_GRAPH", "1"), ("0", "1")) == "1"


class GraphMemory:
    """The stream and the pool of memory of graphs that never run at the same time.

    Libraries keep memory for each stream, and what one graph needs only while it runs is free for
    the others.

    Attributes:
        warm: whether something was captured here before.
    """

    def __init__(self) -> None:
        self.warm = False

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """A stream of the current device, which is that of the first graph."""
        return torch.cuda.Stream()

    @cached_property
    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


class CapturedCall:
    """A function that is called as it is a few times, and from then on replayed as a CUDA graph.

    The first calls are calls like any other, so nothing has to be undone after them.

    Args:
        function: does the same work on the same memory in every call, without a read by the host.
        device: a CUDA device.
        generator: of the device, where the function draws from another one than torch's own. Each
            replay draws new numbers from it.
        memory: that this graph shares with others; by default its own.

    Attributes:
        captured: whether there is a graph already.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        generator: torch.Generator | None = None,
        memory: GraphMemory | None = None,
    ) -> None:
        self._function, self._device, self._generator = function, device, generator
        self._memory = GraphMemory() if memory is None else memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self._left = LATER_WARM_UP if self._memory.warm else WARM_UP

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        """Do the function's work.

        Raises:
            NotCapturable: at the first call after those that warm up; what the function has done
                before stays done.
        """
        with torch.cuda.device(self._device):
            if self._left:
                self._left -= 1
                self._warm_up()
                return
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()

    def _warm_up(self) -> None:
        # On the stream of the capture, for which libraries keep memory of its own.
        current, stream = torch.cuda.current_stream(), self._memory.stream
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self._function()
        current.wait_stream(stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        try:
            memory = self._memory
            with torch.cuda.graph(graph, pool=memory.pool, stream=memory.stream):
                self._function()
        except RuntimeError as error:
            raise NotCapturable(
                f"an iteration can't be captured in a CUDA graph ({error}): no objective and no "
                "augment may read a tensor on the host; a plain function as an objective may. "
                "SparseInverter(graph=False), or SMI_FAST_GRAPH=0 in the environment, runs "
                "iterations one by one"
            ) from error
        self._memory.warm = True
        return graph
