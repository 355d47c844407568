"""Stops that keep patches together, and the early one."""

from __future__ import annotations

import pytest
import torch

from smi_fast import Stop, StopSchedule

GRID = (5, 6)


def stop(importance: torch.Tensor, kept: torch.Tensor | None = None) -> Stop:
    if kept is None:
        kept = torch.arange(GRID[0] * GRID[1]).expand(len(importance), -1)
    return Stop(3, kept, importance, GRID)


def test_compact_stops_average_over_neighbours() -> None:
    """A lonely peak loses against a block of smaller numbers, which touch each other."""
    importance = torch.zeros(1, 30)
    importance[0, 5] = 1.0  # the upper right corner
    block = [13, 14, 15, 19, 20, 21, 25, 26, 27]
    importance[0, block] = 0.8
    plain = StopSchedule((3,), (0.7,)).select(stop(importance)).kept
    compact = StopSchedule((3,), (0.7,), compact=True).select(stop(importance)).kept
    assert 5 in plain[0] and 5 not in compact[0]
    assert compact.tolist() == [block]


def test_equals_a_convolution_over_kept_patches() -> None:
    kept = torch.stack([torch.randperm(30)[:17].sort().values for _ in range(2)])
    importance = torch.rand(2, 17)
    on_grid = torch.zeros(2, 30).scatter(1, kept, importance).view(2, 1, *GRID)
    mean = torch.nn.functional.conv2d(on_grid, torch.ones(1, 1, 3, 3), padding=1).flatten(1)
    best = mean.gather(1, kept).topk(8, dim=1).indices
    expected = kept.gather(1, best).sort(dim=1).values
    found = StopSchedule((3,), (0.5,), compact=True).select(stop(importance, kept)).kept
    assert torch.equal(found, expected)


def test_once_stops_early() -> None:
    schedule = StopSchedule.once(100)
    assert (schedule.at, schedule.compact) == ((10,), True)
    assert schedule.counts(64) == (30,) and schedule.counts(196) == (92,)
    assert StopSchedule.once(400, keep=0.22, at=0.05) == StopSchedule((20,), (0.78,), compact=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.0}, r"keep in \(0, 1\] and at in \(0, 1\), got 0.0 and 0.1"),
        ({"keep": 1.5}, "got 1.5 and 0.1"),
        ({"at": 1.0}, "got 0.47 and 1.0"),
        ({"at": "early"}, "got 0.47 and 'early'"),
        ({"iterations": 1}, "iterations after the stop at 1, got 1"),
        ({"iterations": "100"}, "iterations as a whole number, got '100'"),
    ],
)
def test_once_refuses(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StopSchedule.once(**{"iterations": 100, **given})


def test_scaled_can_be_compact() -> None:
    assert StopSchedule.scaled(4000, compact=True) == StopSchedule(compact=True)
    with pytest.raises(ValueError, match=r"iterations as a whole number, got 400\.0"):
        StopSchedule.scaled(400.0)
