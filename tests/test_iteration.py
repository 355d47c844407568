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
    SparseInverter,
    SparseViT,
    TotalVariation,
    graph,
    inverter,
)
from smi_fast.inversion.cuda_graph import WARM_UP, Captured, NotCapturable
from smi_fast.inversion.result import InversionResult
from smi_fast.inversion.state import Iteration
from smi_fast.objectives import Objective, Step

__all__ = ["teacher"]
TERMS = (CrossEntropy(), TotalVariation(), TotalVariation(1e-3, "l1"), L2Norm())


class Planted(Objective):
    """A term that does something before it returns nothing of weight."""

    name, weight = "planted", 1.0

    def __init__(self, fault: Callable[[Step], object]) -> None:
        self.fault = fault

    def __call__(self, step: Step) -> Tensor:
        self.fault(step)
        return step.images.sum() * 0


def iteration(inverter: SparseInverter) -> Iteration:
    return inverter.start(TARGETS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("background", ["frozen", "regularized"])
@pytest.mark.parametrize("kept", [24, 12])
def test_reads_nothing_on_the_host(
    each_backend: str, teacher: VisionTransformer, background: str, kept: int
) -> None:
    step = iteration(make(teacher, objectives=TERMS, background=background))
    step.kept = step.kept[:, :kept].contiguous()
    before = step.images.clone()
    with HostGuard():
        step()
        importance = step(score=True)
    assert importance is not None and importance.shape == (2, kept)
    assert step.taken() == 2 and not torch.equal(step.images, before)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda step: step.logits.sum().item(), "_local_scalar_dense.default waits"),
        (lambda step: bool(step.images.any()), "waits for the device"),
        (lambda step: torch.equal(step.logits, step.logits), "equal.default waits"),
        (lambda step: step.logits[step.logits > 0], "with a mask has a shape that depends on data"),
        (lambda step: step.targets.unique(), "waits for the device"),
        (lambda step: torch.tensor([1.0, 2.0]), "numbers of the host is copied"),
        (lambda step: step.logits.detach().to("meta"), "copies from"),
    ],
)
def test_guard_catches(
    teacher: VisionTransformer, fault: Callable[[Step], object], message: str
) -> None:
    step = iteration(make(teacher, objectives=[CrossEntropy(), Planted(fault)]))
    with pytest.raises(HostAccessError, match=message), HostGuard():
        step()


def test_compiles_into_one_graph(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo.config, "trace_autograd_ops", True)
    plain, traced = (iteration(make(teacher, objectives=TERMS)) for _ in range(2))
    compiled = torch.compile(lambda: traced(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        plain()
        compiled()
    torch.testing.assert_close(traced.images, plain.images)
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

    monkeypatch.setattr(inverter, "Captured", Graph)
    monkeypatch.setattr(inverter, "CHECK_EVERY", 2)
    monkeypatch.setattr(SparseInverter, "_is_captured", lambda self: True)
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
    """A term of every third step."""

    name, weight, every = "seldom", 1e-3, 3

    def __call__(self, step: Step) -> Tensor:
        if step.iteration % self.every:
            return step.images.new_zeros(())
        return step.images.square().sum()


def test_captured_loop_takes_seldom_terms_when_they_are_due(
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

    def __init__(self, step: int, broken: str) -> None:
        self.step, self.broken, self.iteration = step, broken, None

    def __call__(self, step: Step) -> Tensor:
        late = self.iteration.done[0] >= self.step
        if self.broken == "value":
            return step.images.sum() * torch.where(late, torch.nan, 0.0)
        # The slope of a root is infinite at zero.
        return (step.images * 0 + torch.where(late, 0.0, 1.0)).sqrt().sum()


@pytest.mark.parametrize("broken", ["value", "gradient"])
@pytest.mark.parametrize("at", [3, 5, 6, 9])
def test_captured_loop_stops_with_the_last_finite_images(
    teacher: VisionTransformer,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    broken: str,
) -> None:
    term = Spoilt(at, broken)
    run = make(teacher, objectives=[CrossEntropy(), term])
    begin = run.start
    frames: dict[int, Tensor] = {}

    def noted(*arguments: object) -> Iteration:
        term.iteration = begin(*arguments)
        return term.iteration

    monkeypatch.setattr(run, "start", noted)
    with pytest.raises(NonFiniteLoss) as caught:
        run.invert(
            TARGETS,
            progress=False,
            callback=lambda step, images, kept: frames.setdefault(step, images.clone()),
        )
    name = "spoilt" if broken == "value" else "gradient"
    result = caught.value.result
    assert (caught.value.iteration, caught.value.term, result.iterations) == (at, name, at)
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
    assert not plain._is_captured()
    monkeypatch.setattr(SparseViT, "device", torch.device("cuda"))
    assert plain._is_captured() and not function._is_captured()


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
    monkeypatch.setattr(graph.torch, "cuda", cuda)
    cuda.graph = capture
    cuda.CUDAGraph.return_value.replay = lambda: done.append(1)
    captured = Captured(work, torch.device("cuda"))
    for calls in range(1, 8):
        captured()
        assert len(done) == calls
    assert work.call_count == WARM_UP + 1

    def fails() -> None:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    captured = Captured(fails, torch.device("cuda"))
    for _ in range(WARM_UP):
        captured()
    with pytest.raises(NotCapturable, match=r"not permitted .* no term of the loss may read"):
        captured()
