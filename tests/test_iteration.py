"""One iteration without a read by the host, and the loop that replays it from a CUDA graph.

Capture itself needs a GPU. Here a stand-in calls what it would replay, and a guard refuses what a
graph can't hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import pytest
import torch
from host_guard import HostAccessError, HostGuard
from test_inverter import SPACE, TARGETS, VisionTransformer, make, teacher
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    L2Norm,
    NonFiniteLoss,
    Selection,
    SparseInverter,
    SparseViT,
    TotalVariation,
)
from smi_fast.inversion import InversionState, cuda_graph, loop
from smi_fast.inversion.cuda_graph import WARM_UP, CapturedCall, NotCapturable
from smi_fast.inversion.loop import Loop
from smi_fast.inversion.progress import Progress
from smi_fast.inversion.result import InversionResult
from smi_fast.objectives import LossInputs, Objective

__all__ = ["teacher"]
TERMS = (CrossEntropy(), TotalVariation(), TotalVariation(1e-3, "l1"), L2Norm())


class Planted(Objective):
    """A term that does something before it returns nothing of weight."""

    name, weight = "planted", 1.0

    def __init__(self, fault: Callable[[LossInputs], object]) -> None:
        self.fault = fault

    def __call__(self, inputs: LossInputs) -> Tensor:
        self.fault(inputs)
        return inputs.images.sum() * 0


def start(inverter: SparseInverter) -> InversionState:
    return inverter.start(TARGETS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("background", ["frozen", "regularized"])
@pytest.mark.parametrize("kept", [24, 12])
def test_reads_nothing_on_the_host(
    each_backend: str, teacher: VisionTransformer, background: str, kept: int
) -> None:
    state = start(make(teacher, objectives=TERMS, background=background))
    state.keep(Selection(state.kept[:, :kept].contiguous()))
    before = state.images().clone()
    with HostGuard():
        state.step()
        importance = state.step(score=True)
    assert importance is not None and importance.shape == (2, kept)
    assert state.done() == 2 and not torch.equal(state.images(), before)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda inputs: inputs.logits.sum().item(), "_local_scalar_dense.default waits"),
        (lambda inputs: bool(inputs.images.any()), "waits for the device"),
        (lambda inputs: torch.equal(inputs.logits, inputs.logits), "equal.default waits"),
        (
            lambda inputs: inputs.logits[inputs.logits > 0],
            "with a mask has a shape that depends on data",
        ),
        (lambda inputs: inputs.targets.unique(), "waits for the device"),
        (lambda inputs: torch.tensor([1.0, 2.0]), "numbers of the host is copied"),
        (lambda inputs: inputs.logits.detach().to("meta"), "copies from"),
    ],
)
def test_guard_catches(
    teacher: VisionTransformer, fault: Callable[[LossInputs], object], message: str
) -> None:
    state = start(make(teacher, objectives=[CrossEntropy(), Planted(fault)]))
    with pytest.raises(HostAccessError, match=message), HostGuard():
        state.step()


def test_compiles_into_one_graph(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    plain, traced = (start(make(teacher, objectives=TERMS)) for _ in range(2))
    compiled = torch.compile(lambda: traced.step(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        plain.step()
        compiled()
    torch.testing.assert_close(traced.images(), plain.images())
    torch.testing.assert_close(traced.record, plain.record)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The captured loop, whose graph is called under the guard; how often it has been replayed."""
    calls: list[int] = []

    class Graph:
        def __init__(self, function: Callable[[], object], device: torch.device) -> None:
            self.function = function

        def __call__(self) -> None:
            calls.append(1)
            with HostGuard():
                self.function()

    monkeypatch.setattr(loop, "CapturedCall", Graph)
    monkeypatch.setattr(loop, "CHECK_EVERY", 2)
    monkeypatch.setattr(Loop, "_can_capture", lambda self: True)
    return calls


def test_captured_loop_gives_the_same_bytes(
    teacher: VisionTransformer, request: pytest.FixtureRequest
) -> None:
    seen: list[list[Tensor]] = []

    def inverted() -> object:
        frames: list[Tensor] = []
        seen.append(frames)
        return make(teacher, objectives=TERMS).invert(
            TARGETS,
            generator=torch.Generator().manual_seed(0),
            progress=False,
            callback=lambda step, images, kept: frames.append(images.clone()),
        )

    checked = inverted()
    replays = request.getfixturevalue("replays")
    captured = inverted()
    assert len(replays) == 8  # of ten, for two are scored
    for name in ("images", "kept", "logits"):
        assert torch.equal(getattr(captured, name), getattr(checked, name))
    assert captured.history == checked.history
    assert [p.iterations for p in captured.timing] == [p.iterations for p in checked.timing]
    assert all(map(torch.equal, *seen))


class Seldom(Objective):
    """An objective of every third iteration."""

    name, weight, every = "seldom", 1e-3, 3

    def __call__(self, inputs: LossInputs) -> Tensor:
        if inputs.iteration % self.every:
            return inputs.images.new_zeros(())
        return inputs.images.square().sum()


def test_captured_loop_evaluates_seldom_objectives_when_they_are_due(
    teacher: VisionTransformer, request: pytest.FixtureRequest
) -> None:
    def inverted() -> InversionResult:
        run = make(teacher, objectives=[CrossEntropy(), Seldom()])
        return run.invert(TARGETS, generator=torch.Generator().manual_seed(0), progress=False)

    checked = inverted()
    request.getfixturevalue("replays")
    captured = inverted()
    assert torch.equal(captured.images, checked.images)
    assert captured.history == checked.history
    due = [value > 0 for value in captured.history["seldom"]]
    assert due == [step % 3 == 0 for step in range(10)]


class Spoilt(Objective):
    """Not finite where the images have been changed a number of times."""

    name, weight = "spoilt", 1.0

    def __init__(self, at: int, broken: str) -> None:
        self.at, self.broken = at, broken

    def __call__(self, inputs: LossInputs) -> Tensor:
        late = inputs.iteration_tensor >= self.at
        if self.broken == "value":
            return inputs.images.sum() * torch.where(late, torch.nan, 0.0)
        # The slope of a root is infinite at zero.
        return (inputs.images * 0 + torch.where(late, 0.0, 1.0)).sqrt().sum()


@pytest.mark.parametrize("broken", ["value", "gradient"])
@pytest.mark.parametrize("at", [3, 5, 6, 9])
def test_captured_loop_stops_with_the_last_finite_images(
    teacher: VisionTransformer, replays: list[int], at: int, broken: str
) -> None:
    run = make(teacher, objectives=[CrossEntropy(), Spoilt(at, broken)])
    frames: dict[int, Tensor] = {}
    with pytest.raises(NonFiniteLoss) as caught:
        run.invert(
            TARGETS,
            progress=False,
            callback=lambda step, images, kept: frames.setdefault(step, images.clone()),
        )
    name = "spoilt" if broken == "value" else "gradient"
    result = caught.value.result
    assert (caught.value.iteration, caught.value.objective, result.iterations) == (at, name, at)
    assert all(len(values) == at for values in result.history.values())
    mean, std = (torch.tensor(SPACE[k], dtype=torch.float64)[:, None, None] for k in SPACE)
    torch.testing.assert_close(result.images, (frames[at - 1] * std + mean).clamp(0, 1))


def test_captured_loop_can_be_interrupted(teacher: VisionTransformer, replays: list[int]) -> None:
    def interrupt(step: int, images: Tensor, kept: Tensor) -> None:
        if step == 4:
            raise KeyboardInterrupt

    result = make(teacher).invert(TARGETS, progress=False, callback=interrupt)
    assert result.interrupted
    assert result.iterations == len(result.history["cross_entropy"]) == 5


def test_what_is_captured(teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(images: Tensor, logits: Tensor) -> Tensor:
        return images.sum() * logits.sum().item()

    plain, function = make(teacher), make(teacher, objectives=[CrossEntropy(), reads])
    loops = [
        Loop(start(inverter), frozenset(), Progress(10, False), None)
        for inverter in (plain, function)
    ]
    assert not loops[0]._can_capture()
    monkeypatch.setattr(SparseViT, "device", torch.device("cuda"))
    assert [each._can_capture() for each in loops] == [True, False]


def test_capture_follows_calls_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA: a capture calls the function without doing its work."""
    capturing = []

    @contextmanager
    def capture(graph: object, stream: object) -> Iterator[None]:
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
    with pytest.raises(NotCapturable, match=r"not permitted .* no objective may read"):
        captured()
