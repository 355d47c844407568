"""Ragged keeping: the fewest patches that hold a share, what is checked, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import (
    CrossEntropy,
    MassSchedule,
    PatchSimilarity,
    Selection,
    SparseViT,
    Stop,
    WrongSelection,
)
from smi_fast.importance import Attention
from smi_fast.schedules import check
from tests.helpers.inversions import make, run
from tests.helpers.teachers import make_teacher

GRID = (2, 3)
KEPT = torch.arange(6).expand(3, -1)


def chosen(mass: float, stop: Stop) -> list[list[int]]:
    """What stays in each image."""
    found = check(MassSchedule(mass, at=(5, 9)).select(stop), stop, 6)
    return [row[:length] for row, length in zip(found.kept.tolist(), found.lengths, strict=True)]


def test_the_fewest_patches_that_hold_the_share_stay() -> None:
    importance = torch.tensor(
        [[1, 5, 0, 2, 1, 1], [0, 0, 0, 10, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.float32
    )
    stop = Stop(5, KEPT, importance, GRID)
    assert chosen(0.5, stop) == [[1], [3], [0, 1, 2]]
    assert chosen(0.51, stop) == [[1, 3], [3], [0, 1, 2, 3]]
    assert chosen(0.7, stop) == [[1, 3], [3], [0, 1, 2, 3, 4]]
    assert chosen(1, stop) == [[0, 1, 3, 4, 5], [3], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("mass", [0.1, 0.3, 0.6, 0.9])
def test_one_patch_less_holds_less(mass: float) -> None:
    importance = torch.rand(3, 6, dtype=torch.float64)
    for row, scores in zip(chosen(mass, Stop(5, KEPT, importance, GRID)), importance, strict=True):
        share = scores[row].sum() / scores.sum()
        assert share >= mass > share - scores[row].min() / scores.sum()
        assert scores[row].min() >= scores.sort(descending=True).values[len(row) - 1]


def test_a_later_stop_drops_from_what_is_left() -> None:
    kept = torch.tensor([[1, 3, 0, 2], [0, 2, 4, 5], [4, 0, 1, 2]])
    importance = torch.tensor([[1.0, 9, 90, 90], [1, 1, 1, 1], [0, 8, 8, 8]])
    stop = Stop(9, kept, importance, GRID, lengths=torch.tensor([2, 4, 1]))
    assert chosen(0.5, stop) == [[3], [0, 2], [4]]
    assert chosen(1, stop) == [[1, 3], [0, 2, 4, 5], [4]]


def test_importance_without_a_sum_or_below_0() -> None:
    importance = torch.tensor([[0.0] * 6, [-1, 2, -5, 1, 0, 0], [-1, -1, -1, -1, -1, -1]])
    assert [len(row) for row in chosen(1, Stop(5, KEPT, importance, GRID))] == [1, 2, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mass": 0}, r"expected mass in \(0, 1\], got 0"),
        ({"mass": 1.01}, r"expected mass in \(0, 1\], got 1.01"),
        ({"mass": "most"}, r"expected mass in \(0, 1\], got 'most'"),
        ({"mass": float("nan")}, r"expected mass in \(0, 1\], got nan"),
        ({"at": (5, 5)}, r"expected stops that ascend from 1 or later, got \(5, 5\)"),
        ({"at": None}, r"expected stops as whole numbers, \(50, 100\), got None"),
    ],
)
def test_a_bad_schedule_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        MassSchedule(**{"mass": 0.5, "at": (5,), **given})


GOOD = torch.tensor([[0, 3, 1], [2, 1, 0], [0, 1, 2]])
LENGTHS = torch.tensor([2, 1, 3])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(GOOD, lengths=[2, 1, 3]), r"lengths int64 \[3\] on cpu .* at 5, got \[2, 1, 3"),
        (Selection(GOOD, lengths=LENGTHS[:2]), r"lengths int64 \[3\] .*, got torch.int64 \[2\]"),
        (Selection(GOOD, lengths=LENGTHS.float()), r"lengths int64 \[3\] .*, got torch.float32"),
        (Selection(GOOD, lengths=torch.tensor([2, 0, 3])), r"lengths in 1\.\.3 .*, got \[2, 0, 3"),
        (Selection(GOOD, lengths=torch.tensor([2, 4, 3])), r"lengths in 1\.\.3 .*, got \[2, 4, 3"),
        (Selection(GOOD, lengths=torch.tensor([3, 1, 3])), "patches that stay to ascend, among"),
        (Selection(GOOD + 4, lengths=LENGTHS), r"kept in 0\.\.5"),
        (Selection(GOOD * 0, lengths=LENGTHS), "kept distinct"),
        (Selection(KEPT, lengths=LENGTHS), r"kept int64 \[3, 5\]"),
        (Selection(GOOD.tolist(), lengths=LENGTHS), "kept as a tensor .* at 5, got list"),
        (Selection(GOOD[0], lengths=LENGTHS), r"kept int64 \[3, 5\] .*, got torch.int64 \[3\]"),
        (Selection(GOOD.float(), lengths=LENGTHS), r"kept int64 \[3, 3\] .*, got torch.float32"),
        (Selection(GOOD, GOOD[:, :1], lengths=LENGTHS), "lengths alone, the schedule at 5"),
    ],
)
def test_a_wrong_answer_is_refused(selection: Selection, message: str) -> None:
    with pytest.raises(WrongSelection, match=message):
        check(selection, Stop(5, KEPT, torch.rand(3, 6), GRID), 5)


def test_lengths_that_were_not_announced_are_refused(teacher: VisionTransformer) -> None:
    schedule = SimpleNamespace(
        at=(5,), counts=lambda patches: (patches,), select=MassSchedule(0.5, (5,)).select
    )
    with pytest.raises(WrongSelection, match="that has ragged = True only, the one at 5 hasn't"):
        run(teacher, schedule=schedule)
    schedule.ragged = True
    assert run(teacher, schedule=schedule).lengths is not None


def test_a_patch_that_was_dropped_does_not_come_back() -> None:
    stop = Stop(5, GOOD, torch.rand(3, 3), GRID, lengths=LENGTHS)
    assert check(Selection(GOOD, lengths=LENGTHS), stop, 6).lengths is LENGTHS
    with pytest.raises(WrongSelection, match="among those kept so far"):
        check(Selection(GOOD.sort().values, lengths=torch.tensor([2, 1, 3])), stop, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": [CrossEntropy(), PatchSimilarity()]}, "taps with MassSchedule.*got patch_"),
        ({"importance": Attention((0,))}, r"taps with MassSchedule.*got importance Attention\("),
        ({"final_mask": "reranked"}, "says which share of the patches is remaining, MassSchedule"),
        ({"schedule": MassSchedule(0.5, (12,))}, "the stop at 12 is past the end of 10 iterations"),
    ],
)
def test_what_can_not_be_ragged_is_refused(
    teacher: VisionTransformer, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, **{"schedule": MassSchedule(0.5, (3, 6)), **options})


def test_teachers_that_can_not_be_ragged_are_refused(teacher: VisionTransformer) -> None:
    schedule = MassSchedule(0.5, (3,))
    pooled = make_teacher("vit_tiny_patch16_224 average with class token")
    with pytest.raises(ValueError, match="whose head reads its class token with lengths"):
        make(pooled, schedule=schedule)
    with pytest.raises(ValueError, match="expected no narrow together with lengths"):
        make(SparseViT(teacher, narrow={1: 0.5}), schedule=schedule)
    make(teacher, schedule=schedule, importance=Attention((0,)))
