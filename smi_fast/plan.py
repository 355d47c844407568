"""Which batches a pool still needs, and that all processes of a group would make the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from smi_fast.group import Group
from smi_fast.pool import METADATA, Pool, PoolError
from smi_fast.schedules import Schedule, images_of_a_trajectory


class Trajectory(NamedTuple):
    """A trajectory of a pool.

    Attributes:
        number: in the pool.
        start: index of its first image.
        label: class of its images.
        images: how many of its images the pool takes.
    """

    number: int
    start: int
    label: int
    images: int

    @property
    def indices(self) -> range:
        """Places of the images in the pool."""
        return range(self.start, self.start + self.images)


class Plan(NamedTuple):
    """Where a pool stands.

    Attributes:
        held: number of its first images that it has.
        batches: number of batches of these.
        ahead: the images of further batches that it has, by the number of the batch.
    """

    held: int
    batches: int
    ahead: dict[int, range]


def plan_of(pool: Pool, labels: Sequence[int]) -> Plan:
    """Where a pool stands whose image ``i`` has the label ``labels[i]``.

    Raises:
        PoolError: it has other images.
    """
    return Plan(_check_held(pool, labels), pool.batches, pool.ahead)


def agree(group: Group, plan: Plan | None, decisive: dict[str, Any]) -> Plan:
    """The plan of process 0.

    Args:
        group: the processes.
        plan: in process 0.
        decisive: what must be the same in all processes, as JSON values.

    Raises:
        PoolError: it is not.
    """
    given = None
    if plan is not None:
        ahead = [[batch, images.start, images.stop] for batch, images in plan.ahead.items()]
        given = {"held": plan.held, "batches": plan.batches, "ahead": ahead, "decisive": decisive}
    agreed = group.agree(given)
    for key, value in json.loads(json.dumps(decisive)).items():
        if agreed["decisive"].get(key) != value:
            raise PoolError(
                f"process {group.rank} would make other images than process 0: its {key} is "
                f"{value!r}, that of process 0 {agreed['decisive'].get(key)!r}"
            )
    found = {batch: range(start, stop) for batch, start, stop in agreed["ahead"]}
    return Plan(agreed["held"], agreed["batches"], found)


def _check_held(pool: Pool, labels: Sequence[int]) -> int:
    """The number of images in the pool, which must be of the first labels, with fill's entries."""
    records = pool.records
    if len(records) > len(labels):
        raise PoolError(
            f"expected {pool.where} to hold {len(labels)} images or fewer, got {len(records)}"
        )
    for index, (record, label) in enumerate(zip(records, labels, strict=False)):
        confidence = record.get("confidence")
        if (
            record["label"] != label
            or not (isinstance(confidence, float) and 0 <= confidence <= 1)
            or not all(isinstance(record.get(key), int) for key in ("prediction", "iterations"))
            or not isinstance(record.get("kept"), list)
        ):
            raise PoolError(
                f"line {index + 1} of {pool.where}/{METADATA} is not the record of an image of "
                f"class {label}"
            )
    return len(records)


def batches_left(
    labels: Sequence[int], plan: Plan, schedule: Schedule, size: int
) -> list[tuple[int, list[Trajectory]]]:
    """The batches that are left of a pool, with their numbers.

    Args:
        labels: class of each image of the whole pool.
        plan: where the pool stands.
        schedule: takes one image or more out of a trajectory.
        size: number of trajectories in a batch.

    Raises:
        PoolError: the pool ends amid a trajectory, or has batches of another size.
    """
    most = images_of_a_trajectory(schedule)
    found: list[Trajectory] = []
    for start, label in enumerate(labels):
        last = found[-1] if found else None
        if last is not None and last.label == label and last.images < most:
            found[-1] = last._replace(images=last.images + 1)
        else:
            found.append(Trajectory(len(found), start, label, 1))
    left = [trajectory for trajectory in found if trajectory.start >= plan.held]
    if (left[0].start if left else len(labels)) != plan.held:
        raise PoolError(
            f"expected whole trajectories of {most} images in the pool, got {plan.held} images: "
            "make it anew"
        )
    batches = dict(
        enumerate((left[i : i + size] for i in range(0, len(left), size)), start=plan.batches)
    )
    for number, images in plan.ahead.items():
        expected = [each for trajectory in batches.pop(number, []) for each in trajectory.indices]
        if list(images) != expected:
            raise PoolError(
                f"expected batch {number} of {size} trajectories in the pool, got the images "
                f"{images.start} to {images.stop - 1}: make it anew"
            )
    return list(batches.items())
