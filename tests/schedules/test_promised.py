"""What an inversion asks of a schedule before it starts: each lack is one sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from timm.models.vision_transformer import VisionTransformer

from smi_fast import Dense, Selection, StopSchedule, WrongSelection
from smi_fast.schedules import promised
from tests.helpers.inversions import make, run
from tests.helpers.schedules import Rebirth


def answers(**parts: object) -> SimpleNamespace:
    given = {"at": (3, 6), "counts": lambda patches: (9, 4), "select": lambda stop: None}
    return SimpleNamespace(**(given | parts))


def test_promises_are_counts_by_stop() -> None:
    assert promised(answers(), 24) == {3: 9, 6: 4}
    assert promised(answers(at=[3, 6]), 24) == {3: 9, 6: 4}
    assert promised(Dense(), 24) == {}
    assert promised(Rebirth(), 24) == {3: 21, 6: 18}


@pytest.mark.parametrize(
    ("schedule", "kind", "message"),
    [
        ([50, 100], TypeError, r"got \[50, 100\], without at and counts and select"),
        (SimpleNamespace(at=(3,), counts=lambda patches: (2,)), TypeError, "without select$"),
        (StopSchedule, TypeError, "got the class StopSchedule$"),
        (answers(at=(6, 3)), ValueError, r"stops that ascend from 1 or later, got \(6, 3\)"),
        (answers(at=(0, 3)), ValueError, r"stops that ascend from 1 or later, got \(0, 3\)"),
        (answers(at=(3.0, 6)), ValueError, r"whole numbers, .* got \(3.0, 6\)"),
        (answers(counts=lambda patches: (9,)), ValueError, r"for each of 2 stops .* got \(9,\)"),
        (answers(counts=lambda patches: (9, 0)), ValueError, r"one count from 1 .* got \(9, 0\)"),
    ],
)
def test_what_is_no_schedule_is_refused(
    teacher: VisionTransformer, schedule: object, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(teacher, schedule=schedule)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda stop: stop.kept[:, :9], "a Selection from the schedule at 3, got Tensor"),
        (lambda stop: None, "a Selection from the schedule at 3, got NoneType"),
        (lambda stop: Selection([[1]]), "kept as a tensor from the schedule at 3, got list"),
    ],
)
def test_an_answer_that_is_no_selection_is_refused(
    teacher: VisionTransformer, answer: object, message: str
) -> None:
    with pytest.raises(WrongSelection, match=message):
        run(teacher, schedule=answers(select=answer))
