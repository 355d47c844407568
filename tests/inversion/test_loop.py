"""The loop that replays iterations from a CUDA graph, against the loop that takes them one by one.

Capture itself needs a GPU. Here a stand-in calls what it would replay.
"""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import CrossEntropy, InversionResult, NonFiniteLoss, SparseViT
from smi_fast.inversion.loop import Loop
from smi_fast.inversion.progress import Progress
from smi_fast.objectives import LossInputs, Objective
from tests.helpers.inversions import EVERY_PIXEL_OBJECTIVE, TARGETS, denormalized, make, start

CAN_CAPTURE = Loop._can_capture


def test_captured_loop_gives_the_same_bytes(
    teacher: VisionTransformer, request: pytest.FixtureRequest
) -> None:
    seen: list[list[Tensor]] = []

    def inverted() -> object:
        frames: list[Tensor] = []
        seen.append(frames)
        return make(teacher, objectives=EVERY_PIXEL_OBJECTIVE).invert(
            TARGETS,
            generator=torch.Generator().manual_seed(0),
            progress=False,
            callback=lambda number, images, kept: frames.append(images.clone()),
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

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, inputs: LossInputs) -> Tensor:
        self.calls.append(inputs.iteration)
        return inputs.images.square().sum()


def test_captured_loop_evaluates_seldom_objectives_when_they_are_due(
    teacher: VisionTransformer, request: pytest.FixtureRequest
) -> None:
    seldom = Seldom()

    def inverted() -> InversionResult:
        run = make(teacher, objectives=[CrossEntropy(), seldom])
        return run.invert(TARGETS, generator=torch.Generator().manual_seed(0), progress=False)

    checked = inverted()
    assert seldom.calls == [0, 3, 6, 9]
    request.getfixturevalue("replays")
    captured = inverted()
    assert torch.equal(captured.images, checked.images)
    assert captured.history == checked.history
    due = [value > 0 for value in captured.history["seldom"]]
    assert due == [number % 3 == 0 for number in range(10)]


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
            callback=lambda number, images, kept: frames.setdefault(number, images.clone()),
        )
    name = "spoilt" if broken == "value" else "gradient"
    result = caught.value.result
    assert (caught.value.iteration, caught.value.objective, result.iterations) == (at, name, at)
    assert all(len(values) == at for values in result.history.values())
    torch.testing.assert_close(result.images, denormalized(frames[at - 1]).clamp(0, 1))


def test_captured_loop_can_be_interrupted(teacher: VisionTransformer, replays: list[int]) -> None:
    def interrupt(number: int, images: Tensor, kept: Tensor) -> None:
        if number == 4:
            raise KeyboardInterrupt

    result = make(teacher).invert(TARGETS, progress=False, callback=interrupt)
    assert result.interrupted
    assert result.iterations == len(result.history["cross_entropy"]) == 5


def test_captured_loop_checks_what_it_did_before_an_interrupt(
    teacher: VisionTransformer, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(number: int, images: Tensor, kept: Tensor) -> None:
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("smi_fast.inversion.loop.CHECK_EVERY", 50)
    run = make(teacher, objectives=[CrossEntropy(), Spoilt(1, "value")])
    with pytest.raises(NonFiniteLoss) as caught:
        run.invert(TARGETS, progress=False, callback=interrupt)
    assert caught.value.iteration == 1 and caught.value.result.images.isfinite().all()


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


@pytest.mark.parametrize(
    ("graph", "variable", "expected"),
    [(True, None, 3), (True, "1", 3), (False, None, 0), (False, "1", 0), (True, "0", 0)],
)
def test_capture_can_be_switched_off(
    teacher: VisionTransformer,
    replays: list[int],
    monkeypatch: pytest.MonkeyPatch,
    graph: bool,
    variable: str | None,
    expected: int,
) -> None:
    def on_cuda(self: Loop) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(SparseViT, "device", torch.device("cuda"))
            return CAN_CAPTURE(self)

    monkeypatch.setattr(Loop, "_can_capture", on_cuda)
    if variable is not None:
        monkeypatch.setenv("SMI_FAST_GRAPH", variable)
    state = start(make(teacher, graph=graph))
    Loop(state, frozenset(), Progress(10, False), None).run(range(3))
    assert len(replays) == expected and state.done() == 3


def test_variable_that_switches_capture_is_0_or_1(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMI_FAST_GRAPH", "off")
    with pytest.raises(ValueError, match="expected SMI_FAST_GRAPH 0 or 1, got 'off'"):
        make(teacher)
