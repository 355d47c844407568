"""A call that is captured after it has warmed up, with stand-ins for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch

from smi_fast.inversion import cuda_graph
from smi_fast.inversion.cuda_graph import (
    LATER_WARM_UP,
    WARM_UP,
    CapturedCall,
    GraphMemory,
    NotCapturable,
)


def test_capture_follows_calls_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA: a capture calls the function without doing its work."""
    capturing = []

    @contextmanager
    def capture(graph: object, pool: object, stream: object) -> Iterator[None]:
        capturing.append(True)
        yield
        capturing.pop()

    work, cuda = MagicMock(side_effect=lambda: capturing or done.append(1)), MagicMock()
    done: list[int] = []
    monkeypatch.setattr(cuda_graph.torch, "cuda", cuda)
    cuda.graph = capture
    cuda.CUDAGraph.return_value.replay = lambda: done.append(1)
    captured = CapturedCall(work, torch.device("cuda"))
    for calls in range(1, 8):
        captured()
        assert len(done) == calls
    assert work.call_count == WARM_UP + 1

    def fails() -> None:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    captured = CapturedCall(fails, torch.device("cuda"))
    for _ in range(WARM_UP):
        captured()
    with pytest.raises(
        NotCapturable, match=r"not permitted .* no objective and no augment may read"
    ) as caught:
        captured()
    assert "SparseInverter(graph=False)" in str(caught.value)
    assert "SMI_FAST_GRAPH=0" in str(caught.value)


def test_a_graph_knows_the_generator_before_it_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, generator = MagicMock(), torch.Generator()
    monkeypatch.setattr(cuda_graph.torch, "cuda", cuda)
    for given in (None, generator):
        captured = CapturedCall(lambda: None, torch.device("cuda"), given)
        for _ in range(WARM_UP + 1):
            captured()
        graph = cuda.CUDAGraph.return_value
        assert graph.register_generator_state.call_count == (given is not None)
    names = [name for name, *_ in cuda.mock_calls]
    registered = names.index("CUDAGraph().register_generator_state")
    assert "graph" in names[registered:], "registered before the last capture begins"


def test_graphs_share_a_stream_and_a_pool_and_later_ones_warm_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, calls = MagicMock(), MagicMock()
    monkeypatch.setattr(cuda_graph.torch, "cuda", cuda)
    memory = GraphMemory()
    for expected in (WARM_UP, LATER_WARM_UP):
        calls.reset_mock()
        captured = CapturedCall(calls, torch.device("cuda"), memory=memory)
        while not captured.captured:
            captured()
        assert calls.call_count == expected + 1
    assert cuda.Stream.call_count == cuda.graph_pool_handle.call_count == 1
    used = {"pool": cuda.graph_pool_handle(), "stream": cuda.Stream()}
    assert [call.kwargs for call in cuda.graph.call_args_list] == [used, used]
    CapturedCall(calls, torch.device("cuda"))()
    assert cuda.Stream.call_count == 3, "by default a graph has memory of its own"
