"""A function as a CUDA graph: captured once, then replayed at the cost of one launch."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from smi_fast.inversion.inputs import one_of

# Calls before the capture, in which libraries set themselves up and kernels are compiled.
WARM_UP = 3


class NotCapturable(RuntimeError):
    """The function does what a CUDA graph can't hold, such as waiting for the device."""


def graphs_allowed() -> bool:
    """What ``SMI_FAST_GRAPH`` says: 0 or 1, by default 1."""
    return one_of("SMI_FAST_GRAPH", os.environ.get("SMI_FAST_GRAPH", "1"), ("0", "1")) == "1"


class CapturedCall:
    """A function that is called as it is three times, and from then on replayed as a CUDA graph.

    The first calls are calls like any other, so nothing has to be undone after them.

    Args:
        function: does the same work on the same memory in every call, without a read by the host.
        device: a CUDA device.
        generator: of the device, where the function draws from another one than torch's own. Each
            replay draws new numbers from it.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        self._function, self._device, self._generator = function, device, generator
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        """Do the function's work.

        Raises:
            NotCapturable: at the fourth call; what the function has done before stays done.
        """
        self._calls += 1
        with torch.cuda.device(self._device):
            if self._calls <= WARM_UP:
                self._warm_up()
                return
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()

    def _warm_up(self) -> None:
        # On the stream of the capture, for which libraries keep memory of its own.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function()
        current.wait_stream(self._stream)

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._generator is not None:
            graph.register_generator_state(self._generator)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._function()
        except RuntimeError as error:
            raise NotCapturable(
                f"an iteration can't be captured in a CUDA graph ({error}): no objective and no "
                "augment may read a tensor on the host; a plain function as an objective may. "
                "SparseInverter(graph=False), or SMI_FAST_GRAPH=0 in the environment, runs "
                "iterations one by one"
            ) from error
        return graph
