"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast.inversion import graphs, loop
from smi_fast.ops import backends
from tests.helpers.host_guard import HostGuard
from tests.helpers.teachers import tiny_vit


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a plot takes far longer than a batch of a test."""
    for module in ("fill", "workers"):
        monkeypatch.setattr(f"smi_fast.{module}.draw_loss", lambda *_: None)


@pytest.fixture(params=["cpp", "reference"])
def each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with each backend of the CPU as the automatic choice."""
    reason = backends.report(torch.device("cpu"))[request.param]
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(backends, "DEFAULT", request.param)
    return request.param


@pytest.fixture(scope="session")
def teacher() -> VisionTransformer:
    """The tiny ViT in float64, which no test may change."""
    torch.manual_seed(1)
    return tiny_vit().double()


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The captured loop, whose graph is called under the guard; one entry for each replay."""
    calls: list[int] = []

    class Graph:
        def __init__(
            self,
            function: Callable[[], object],
            device: torch.device,
            generator: torch.Generator | None,
            memory: object,
        ) -> None:
            self.function = function
            self.captured = False

        def __call__(self) -> None:
            calls.append(1)
            with HostGuard():
                self.function()

    monkeypatch.setattr(graphs, "CapturedCall", Graph)
    monkeypatch.setattr(graphs, "WORTH", 0)
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    monkeypatch.setattr(loop.Loop, "_can_capture", lambda self: True)
    return calls
