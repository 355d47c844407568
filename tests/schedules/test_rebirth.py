"""Patch rebirth: what leaves at each stop, in what order, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import PatchRebirth, Stop
from smi_fast.schedules import bound, check, promised
from tests.helpers.inversions import make

GRID = (5, 6)


def rebirth(order: str = "importance", v: int = 4) -> PatchRebirth:
    return PatchRebirth(v, order=order).bind(10)


def groups(schedule: PatchRebirth, importance: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The groups of a run whose importance [B, N] stays the same."""
    kept = torch.arange(GRID[0] * GRID[1]).expand(len(importance), -1)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for at, count in promised(schedule, kept.shape[1]).items():
        stop = Stop(at, kept, importance.gather(1, kept), GRID, generator)
        selection = check(schedule.select(stop), stop, count)
        found.append(selection.finished)
        kept = selection.kept
    return [*found, kept]


@pytest.mark.parametrize(
    ("v", "iterations", "at"),
    [(2, 4000, (2000,)), (4, 4000, (1000, 2000, 3000)), (7, 100, (14, 28, 42, 56, 70, 84))],
)
def test_stops_are_the_published_ones(v: int, iterations: int, at: tuple[int, ...]) -> None:
    schedule = PatchRebirth(v).bind(iterations)
    assert schedule.at == at == tuple(k * (iterations // v) for k in range(1, v))
    assert schedule.counts(196) == tuple(196 * (v - k) // v for k in range(1, v))
    assert bound(PatchRebirth(v), iterations) == schedule == schedule.bind(iterations)


def test_given_stops_are_taken() -> None:
    schedule = PatchRebirth(3, at=[2, 9])
    assert schedule.bind(10).at == schedule.at == (2, 9)


def test_the_most_important_patches_leave_first() -> None:
    importance = torch.stack([torch.randperm(30), torch.randperm(30)]).double()
    found = groups(rebirth(v=5), importance)
    ranked = importance.argsort(dim=1, descending=True)
    for index, group in enumerate(found):
        assert torch.equal(group, ranked[:, 6 * index : 6 * index + 6].sort(dim=1).values)


def test_of_equal_patches_the_first_leave_first() -> None:
    found = groups(rebirth(v=5), torch.zeros(2, 30))
    assert torch.equal(torch.cat(found, dim=1), torch.arange(30).expand(2, -1))


@pytest.mark.parametrize("order", ["importance", "random", "radial"])
def test_groups_share_no_patch_and_cover_the_grid(order: str) -> None:
    found = torch.cat(groups(rebirth(order, v=3), torch.rand(2, 30)), dim=1)
    assert torch.equal(found.sort(dim=1).values, torch.arange(30).expand(2, -1))


def test_the_last_patches_are_dropped_where_v_does_not_divide_them() -> None:
    importance = torch.stack([torch.randperm(30), torch.randperm(30)]).double()
    found = torch.cat(groups(rebirth(v=4), importance), dim=1)
    assert found.shape == (2, 28)
    for row, scores in zip(found, importance, strict=True):
        assert {*range(30)} - {*row.tolist()} == {*scores.argsort()[:2].tolist()}


def test_a_random_order_is_that_of_the_generator() -> None:
    importance = torch.rand(3, 30)
    first, again, other = (groups(rebirth("random"), importance, seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    assert not torch.equal(first[0][0], first[0][1])
    # Each patch is as likely to leave first as any other.
    many = groups(rebirth("random", v=5), torch.rand(4000, 30))[0]
    share = torch.bincount(many.flatten(), minlength=30) / 4000
    assert (share - 0.2).abs().max() < 5 * (0.2 * 0.8 / 4000) ** 0.5


def test_a_radial_order_goes_from_the_centre_to_the_corners() -> None:
    found = groups(rebirth("radial", v=5), torch.rand(2, 30))
    rows, columns = torch.meshgrid(torch.arange(5) - 2.0, torch.arange(6) - 2.5, indexing="ij")
    distance = torch.hypot(rows, columns).flatten()
    for before, after in pairwise(found):
        assert distance[before].max() <= distance[after].min()
    assert found[0].tolist() == [[8, 9, 14, 15, 20, 21]] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"v": 1}, "expected v, images of a trajectory, from 2, got 1"),
        ({"v": 2.0}, "expected v, images of a trajectory, from 2, got 2.0"),
        ({"order": "size"}, "expected order importance, random, radial, got 'size'"),
        ({"v": 3, "at": (5,)}, r"expected 2 stops for v = 3, got \(5,\)"),
        ({"v": 3, "at": (5, 4)}, r"expected stops that ascend from 1 or later, got \(5, 4\)"),
        ({"v": 3, "at": (0, 4)}, r"expected stops that ascend from 1 or later, got \(0, 4\)"),
        ({"v": 3, "at": 5}, r"expected stops as whole numbers, \(50, 100\), got 5"),
    ],
)
def test_a_bad_schedule_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        PatchRebirth(**given)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (PatchRebirth(25), "expected v of at most 24, the patches, got 25"),
        (PatchRebirth(11), "expected v = 11 or more iterations, got 10"),
        (PatchRebirth(2, at=(10,)), r"stops before the end of 10 iterations, got \(10,\)"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(
    teacher: VisionTransformer, schedule: PatchRebirth, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, schedule=schedule, iterations=30 if schedule.v == 25 else 10)
