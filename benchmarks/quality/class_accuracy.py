"""How often inverted images reach the wanted class, and how confident the teacher is of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.harness.environment import record
from smi_fast import Dense, Schedule, SparseInverter, StopSchedule, load_teacher, recipes

ITERATIONS = 400
PER_CLASS, QUICK_PER_CLASS = 4, 1
SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)


def share_reached(logits: Tensor, wanted: Tensor) -> float:
    """The share of images whose most probable class is the wanted one."""
    return round((logits.argmax(1) == wanted).double().mean().item(), 4)


def measure(
    teacher: nn.Module, schedule: Schedule, per_class: int, seeds: tuple[int, ...]
) -> dict[str, float | int]:
    """Invert some images of each class for each seed, with the published recipe."""
    options = recipes.smi().options(schedule=schedule, iterations=ITERATIONS)
    inverter = SparseInverter(teacher, **options)
    targets = torch.arange(inverter.teacher.num_classes).repeat_interleave(per_class)
    results = [
        inverter.invert(targets, generator=torch.Generator().manual_seed(seed), progress=False)
        for seed in seeds
    ]
    logits = torch.cat([result.logits for result in results])
    confidence = torch.cat([result.confidence for result in results])
    # The whole image shows whether the background, which froze early, contradicts the class.
    normalize = inverter.settings.space.normalize
    with torch.no_grad():
        whole = torch.cat([teacher(normalize(result.images)) for result in results])
    wanted = targets.repeat(len(seeds))
    return {
        "images": len(confidence),
        "kept_patches": results[0].kept.shape[1],
        "reach_the_wanted_class": share_reached(logits, wanted),
        "mean_confidence": round(confidence.mean().item(), 4),
        "whole_images_reach_the_wanted_class": share_reached(whole, wanted),
    }


def main(quick: bool = False) -> None:
    teacher = load_teacher("fashion-canvas")
    per_class, seeds = (QUICK_PER_CLASS, QUICK_SEEDS) if quick else (PER_CLASS, SEEDS)
    schedules = {"dense": Dense(), "smi": StopSchedule()}
    measured = {
        name: measure(teacher, schedule, per_class, seeds) for name, schedule in schedules.items()
    }
    record("class_accuracy", {"iterations": ITERATIONS, "seeds": seeds, **measured}, quick=quick)
