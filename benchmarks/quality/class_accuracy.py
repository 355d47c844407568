"""How often inverted images reach the wanted class, and how sure the teacher is of it."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.harness.environment import record
from smi_fast import Dense, SparseInverter, StopSchedule, load_teacher
from smi_fast.schedules import Schedule

ITERATIONS = 400
PER_CLASS = 4
SEEDS = (0, 1, 2)


def measure(teacher: nn.Module, schedule: Schedule) -> dict[str, float | int]:
    """Four images of each class and seed, as ``make demo`` makes them."""
    inverter = SparseInverter(teacher, schedule=schedule, iterations=ITERATIONS)
    targets = torch.arange(inverter.teacher.num_classes).repeat_interleave(PER_CLASS)
    results = [
        inverter.invert(targets, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS
    ]
    logits = torch.cat([result.logits for result in results])
    confidence = torch.cat([result.confidence for result in results])
    # The whole image says whether the background, frozen early, speaks against the class.
    mean, std = inverter.mean[:, None, None], inverter.std[:, None, None]
    with torch.no_grad():
        whole = torch.cat([teacher((result.images - mean) / std) for result in results])
    wanted = targets.repeat(len(SEEDS))
    return {
        "images": len(confidence),
        "kept_patches": results[0].kept.shape[1],
        "reach_the_wanted_class": _share(logits, wanted),
        "mean_confidence": round(confidence.mean().item(), 4),
        "whole_images_reach_the_wanted_class": _share(whole, wanted),
    }


def _share(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return round((logits.argmax(1) == wanted).double().mean().item(), 4)


def main() -> None:
    teacher = load_teacher("fashion-canvas")
    schedules = {"dense": Dense(), "smi": StopSchedule()}
    measured = {name: measure(teacher, schedule) for name, schedule in schedules.items()}
    record("class_accuracy", {"iterations": ITERATIONS, "seeds": SEEDS, **measured})
