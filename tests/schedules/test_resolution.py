"""Images that grow: sizes, what stays, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import Dense, Parametrization, ResolutionSchedule, Selection, Stop, WrongSelection
from smi_fast.schedules import check, promised, sizes_of
from tests.helpers.inversions import make
from tests.helpers.parametrizations import Linear


def stop(importance: torch.Tensor, at: int = 5) -> Stop:
    kept = torch.arange(importance.shape[1]).expand(len(importance), -1)
    return Stop(at, kept, importance, (2, 3))


def test_sizes_are_those_of_the_phases() -> None:
    assert ResolutionSchedule((8, 16, 24), at=[5, 9]).at == (5, 9)
    schedule = ResolutionSchedule((112, 224), at=(40,))
    assert sizes_of(schedule, (224, 224), 16) == {0: (112, 112), 40: (224, 224)}
    assert promised(schedule, 196) == {40: 196}
    schedule = ResolutionSchedule((24, 36, 48), at=(5, 9), keep=0.3)
    assert sizes_of(schedule, (32, 48), 4) == {0: (16, 24), 5: (24, 36), 9: (32, 48)}
    assert promised(schedule, 96) == {5: 54, 9: 28}
    assert sizes_of(Dense(), (32, 48), 4) == {0: (32, 48)}


def test_every_patch_stays() -> None:
    schedule = ResolutionSchedule((24, 48), at=(5,))
    found = schedule.select(stop(torch.rand(2, 6)))
    assert torch.equal(check(found, stop(torch.rand(2, 6)), 24, (4, 6)).kept[1], torch.arange(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_parts_of_the_most_important_patches_stay(dtype: torch.dtype) -> None:
    schedule = ResolutionSchedule((24, 48), at=(5,), keep=1 / 3)
    importance = torch.tensor([[5, 1, 2, 0, 9, 3], [0, 0, 7, 0, 0, 8]]).to(dtype)
    found = check(schedule.select(stop(importance)), stop(importance), 8, (4, 6))
    # A patch (row, column) becomes four, on a grid of 4 x 6.
    assert found.kept.tolist() == [
        [0, 1, 6, 7, 14, 15, 20, 21],
        [4, 5, 10, 11, 16, 17, 22, 23],
    ]


def test_of_the_parts_of_one_patch_the_first_ones_stay() -> None:
    schedule = ResolutionSchedule((24, 48), at=(5,), keep=1 / 4)
    importance = torch.tensor([[5, 1, 2, 0, 9, 3], [1, 1, 1, 1, 1, 1]])
    kept = schedule.select(stop(importance)).kept
    assert kept.tolist() == [[0, 1, 14, 15, 20, 21], [0, 1, 2, 3, 4, 5]]


def test_a_patch_may_be_a_part_of_two() -> None:
    schedule = ResolutionSchedule((24, 36), at=(5,), keep=0.2)
    importance = torch.rand(1, 24)
    asked = Stop(5, torch.arange(24)[None], importance, (4, 6))
    kept = check(schedule.select(asked), asked, 10, (6, 9)).kept[0]
    parents = [6 * (row * 2 // 3) + column * 2 // 3 for row in range(6) for column in range(9)]
    scores = importance[0, parents]
    assert scores[kept].min() >= scores.sort(descending=True).values[9]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": (224,), "at": ()}, r"two or more sizes in pixels that ascend, .* got \(224,\)"),
        ({"sizes": 224, "at": (5,)}, r"two or more sizes in pixels that ascend, .* got 224"),
        ({"sizes": (224, 112), "at": (5,)}, r"sizes in pixels that ascend, .* got \(224, 112\)"),
        ({"sizes": (112.0, 224), "at": (5,)}, r"sizes in pixels that ascend, .* got \(112.0, 224"),
        ({"sizes": (0, 224), "at": (5,)}, r"sizes in pixels that ascend, .* got \(0, 224\)"),
        ({"at": (5, 9)}, r"expected 1 stops for sizes \(24, 48\), got \(5, 9\)"),
        ({"at": (0,)}, r"expected stops that ascend from 1 or later, got \(0,\)"),
        ({"at": 5}, r"expected stops as whole numbers, \(50, 100\), got 5"),
        ({"at": (5,), "keep": 0}, r"expected keep in \(0, 1\], got 0"),
        ({"at": (5,), "keep": 1.1}, r"expected keep in \(0, 1\], got 1.1"),
    ],
)
def test_a_bad_schedule_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResolutionSchedule(**{"sizes": (24, 48), **given})


def grows(*sizes: tuple[float, float]) -> SimpleNamespace:
    return SimpleNamespace(
        at=(5,),
        counts=lambda patches: (patches,),
        select=lambda stop: None,
        image_sizes=lambda size: sizes,
    )


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ResolutionSchedule((24, 50), (5,)), r"the teacher's \(32, 48\) last, got 16 x 24, 33"),
        (ResolutionSchedule((40, 48), (5,)), "patches of 8 pixels divide, got 26.6667 x 40"),
        (ResolutionSchedule((12, 48), (5,)), "patches of 8 pixels divide, got 8 x 12"),
        (ResolutionSchedule((24, 48), (10,)), "the stop at 10 is past the end of 10 iterations"),
        (grows((32, 48)), r"for 2 phases, the teacher's \(32, 48\) last, got 32 x 48"),
        (grows((0, 8), (32, 48)), "patches of 8 pixels divide, got 0 x 8"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(
    teacher: VisionTransformer, schedule: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, schedule=schedule)


def test_a_parametrization_that_can_not_be_enlarged_is_refused(
    teacher: VisionTransformer,
) -> None:
    class Fixed(Linear):
        parameters_of = Parametrization.parameters_of

    with pytest.raises(ValueError, match="Fixed can't start from given images"):
        make(teacher, schedule=ResolutionSchedule((24, 48), (5,)), parametrization=Fixed())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(torch.tensor([[0, 24], [0, 1]])), r"kept in 0..23 of the larger grid .* at 5"),
        (Selection(torch.tensor([[-1, 2], [0, 1]])), r"kept in 0..23 of the larger grid .* at 5"),
        (Selection(torch.tensor([[3, 3], [0, 1]])), "kept distinct and ascending"),
        (Selection(torch.tensor([[3], [0]])), r"kept int64 \[2, 2\]"),
        (
            Selection(torch.tensor([[3, 4], [0, 1]]), torch.tensor([[1], [2]])),
            "no finished patches where images grow, the schedule at 5",
        ),
    ],
)
def test_a_wrong_answer_is_refused(selection: Selection, message: str) -> None:
    with pytest.raises(WrongSelection, match=message):
        check(selection, stop(torch.rand(2, 6)), 2, (4, 6))
