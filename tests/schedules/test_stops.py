"""The schedules of the package: the published stops, and none."""

from __future__ import annotations

import pytest
import torch

from smi_fast import Dense, Stop, StopSchedule


def test_published_counts() -> None:
    assert StopSchedule().at == (50, 100, 200, 300)
    assert StopSchedule().counts(196) == (137, 95, 66, 46)
    assert int(197 * StopSchedule().remaining) == 47


def test_dense_has_no_stops() -> None:
    assert Dense().at == Dense().counts(196) == ()
    assert Dense().remaining == 1


def test_scaled_stops_are_the_published_ones_at_4000() -> None:
    assert StopSchedule.scaled(4000) == StopSchedule()
    assert StopSchedule.scaled(400).at == (5, 10, 20, 30)
    with pytest.raises(ValueError, match=r"expected 60 or more iterations, .* got 10"):
        StopSchedule.scaled(10)
    assert StopSchedule.scaled(60).at == (1, 2, 3, 4)


def test_select_keeps_the_top_in_ascending_order() -> None:
    kept = torch.tensor([[1, 4, 6, 9], [0, 2, 3, 7]])
    importance = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.3, 0.1, 0.2, 0.4]])
    schedule = StopSchedule((5,), (0.5,))
    selection = schedule.select(Stop(5, kept, importance, (2, 5)))
    assert selection.kept.tolist() == [[4, 9], [0, 7]] and selection.finished is None


@pytest.mark.parametrize(
    ("at", "drop", "message"),
    [
        ((100, 50), (0.3, 0.3), r"ascend from 1 or later, got \(100, 50\)"),
        ((50, 50), (0.3, 0.3), r"ascend from 1 or later, got \(50, 50\)"),
        ((0,), (0.3,), r"ascend from 1 or later, got \(0,\)"),
        ((50,), (0.3, 0.3), "a share to drop for each stop, got 1 stops"),
        ((50,), (1.0,), r"shares to drop in \[0, 1\), got \(1.0,\)"),
        ((50,), (-0.1,), r"shares to drop in \[0, 1\)"),
        ((50,), (float("nan"),), r"shares to drop in \[0, 1\)"),
        ((50,), ("a",), r"shares to drop in \[0, 1\), got \('a',\)"),
        ((50,), 0.3, r"shares to drop, \(0.3, 0.3\), got 0.3"),
        ((5.0,), (0.3,), r"stops as whole numbers, \(50, 100\), got \(5.0,\)"),
        (50, (0.3,), r"stops as whole numbers, \(50, 100\), got 50"),
    ],
)
def test_bad_stops_are_refused(at: tuple, drop: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopSchedule(at, drop)


def test_compact_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="compact True or False, got 'no'"):
        StopSchedule(compact="no")


def test_lists_are_taken() -> None:
    assert StopSchedule([50, 100], [0.3, 0.3]) == StopSchedule((50, 100), (0.3, 0.3))


def test_dropping_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="the stop at 2 drops all of 3 patches"):
        StopSchedule((1, 2), (0.5, 0.9)).counts(6)
