"""Seconds per image of schedules on DeiT's shapes, against the published-style dense loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.harness.timing import alternate, ratios, rounded, spread
from benchmarks.speed.end_to_end import agreement, schedule_phases, whole_seconds
from benchmarks.speed.loops import (
    NO_STOPS,
    Loop,
    PhaseSeconds,
    Workload,
    our_loop,
    published_loop,
    time_phases,
)
from smi_fast import PatchRebirth, ResolutionSchedule, StopSchedule, recipes
from smi_fast.schedules import Schedule, bound, images_of_a_trajectory, sizes_of

# Iterations of a timed block: the first ones of each phase, among them the one in which our loop
# packs its weights, and those after them, whose median stands for the rest of the phase.
EARLY, TYPICAL = 13, 3
# Half of the tokens in the second half of the twelve blocks.
NARROW = {6: 0.5}
METHOD = (
    "Each round runs every loop once, for a block of 16 iterations in each phase, the published "
    "dense loop for 4. The seconds of a whole run are composed: a phase takes the seconds of its "
    "first 13 iterations (the first includes the stop and the group that leaves; one packs the "
    "weights), and the median of the later ones for the rest. Seconds per image are those of a run "
    "over the images that its trajectories give. Ratios are taken within a round. All but the "
    "default and resolution, which keep 47 % of the patches, have the published recipe."
)
PUBLISHED_DENSE, OUR_DENSE = "published, dense", "dense"


@dataclass(frozen=True)
class Timing:
    """A loop, its schedule in a whole run, and the first iterations of a phase to time apart."""

    loop: Callable[[Workload], Loop]
    schedule: Callable[[int], Schedule]
    early: int = EARLY

    def block(self, iterations: int) -> tuple[Schedule, int]:
        """The schedule and the iterations of a timed block, with the phases of a whole run."""
        whole = bound(self.schedule(iterations), iterations)
        length = self.early + TYPICAL
        at = tuple(length * number for number in range(1, len(whole.at) + 1))
        return replace(whole, at=at), length * (len(at) + 1)


def _no_stops(iterations: int) -> Schedule:
    return NO_STOPS


def _rebirth(v: int, iterations: int) -> Schedule:
    return PatchRebirth(v)


def _growing(iterations: int) -> Schedule:
    return ResolutionSchedule((112, 224), StopSchedule.once(iterations).at, keep=0.47)


def phases_of(
    schedule: Schedule, iterations: int, size: tuple[int, int], patch_size: int
) -> list[tuple[int, int]]:
    """(kept patches, iterations) of each phase of a run."""
    height, width = sizes_of(schedule, size, patch_size)[0]
    (_, first), *later = schedule_phases(
        schedule, iterations, (size[0] // patch_size) * (size[1] // patch_size)
    )
    return [((height // patch_size) * (width // patch_size), first), *later]


TIMINGS = {
    PUBLISHED_DENSE: Timing(published_loop, _no_stops, early=1),
    OUR_DENSE: Timing(our_loop, _no_stops),
    "published stops": Timing(our_loop, StopSchedule.scaled),
    "default": Timing(partial(our_loop, recipe=recipes.clear()), StopSchedule.once),
    "resolution": Timing(partial(our_loop, recipe=recipes.clear()), _growing),
    "published stops, narrow": Timing(partial(our_loop, narrow=NARROW), StopSchedule.scaled),
    **{f"rebirth, v = {v}": Timing(our_loop, partial(_rebirth, v)) for v in (2, 4, 7)},
}


def measure(
    workload: Workload, iterations: int, rounds: int, names: Sequence[str] = tuple(TIMINGS)
) -> dict[str, Any]:
    """Seconds per image of loops, and how many times as fast as the published dense one they are.

    Raises:
        AssertionError: the two dense loops make different images.
    """
    pixels: dict[str, Tensor] = {}

    def contender(timing: Timing) -> Callable[[], dict[int, PhaseSeconds]]:
        schedule, count = timing.block(iterations)
        return partial(time_phases, timing.loop(workload), schedule, count, timing.early)

    timings = {name: TIMINGS[name] for name in names}
    contenders = {name: contender(timing) for name, timing in timings.items()}
    # The first iterations of a process are slow. They are not timed, but show that images agree.
    for name in (PUBLISHED_DENSE, OUR_DENSE):
        few = TIMINGS[PUBLISHED_DENSE].block(iterations)
        loop = TIMINGS[name].loop(workload)
        loop(*few, lambda _, images, kept, of=name: pixels.update({of: images.clone()}))
    agreeing = agreement(pixels[PUBLISHED_DENSE], pixels[OUR_DENSE])
    blocks = alternate(contenders, rounds)
    batch = len(workload.targets)
    per_image, phases = {}, {}
    for name, timing in timings.items():
        whole = bound(timing.schedule(iterations), iterations)
        embed = workload.vit.patch_embed
        phases[name] = phases_of(whole, iterations, embed.img_size, embed.patch_size[0])
        images = batch * images_of_a_trajectory(whole)
        per_image[name] = [whole_seconds(phases[name], block) / images for block in blocks[name]]
    return {
        "batch": batch,
        "dense_images_agree": agreeing,
        "loops": {
            name: {
                "seconds_per_image": spread(seconds),
                "times_as_fast": spread(ratios(per_image[PUBLISHED_DENSE], seconds)),
                "patch_updates_per_image": rounded(
                    sum(patches * count for patches, count in phases[name])
                    / images_of_a_trajectory(TIMINGS[name].schedule(iterations))
                ),
            }
            for name, seconds in per_image.items()
        },
    }
