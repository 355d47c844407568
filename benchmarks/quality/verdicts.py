"""What two independent networks see in images, and how much images of one class differ."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fashion_canvas.data import CLASSES, normalise
from benchmarks.fashion_canvas.train_cnns import load_second_judge
from benchmarks.quality.class_accuracy import share_reached
from benchmarks.quality.images import Images
from smi_fast.background import over
from smi_fast.judge import load_judge


def load_judges() -> dict[str, nn.Sequential]:
    return {"judge": load_judge(), "second_judge": load_second_judge()}


@torch.no_grad()
def features(judge: nn.Sequential, pixels: Tensor) -> Tensor:
    """What the judge's last layer reads, [N, D], each of length 1."""
    return nn.functional.normalize(judge[:-1](normalise(pixels)), dim=1)


def within_class(found: Tensor, labels: Tensor) -> float:
    """Mean distance of two images of one class, over all pairs, averaged over the classes.

    Args:
        found: features [N, D].
        labels: int64 [N].
    """
    means = []
    for label in range(len(CLASSES)):
        own = found[labels == label]
        distances = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist")
        means.append((distances.sum() / (len(own) * (len(own) - 1))).item())
    return mean(means)


@torch.no_grad()
def verdict(
    judges: dict[str, nn.Sequential], real_distances: dict[str, float], images: Images
) -> dict[str, float]:
    """What judges and teacher see in the images of one run, and how much those of a class differ.

    Args:
        judges: by name.
        real_distances: of :func:`within_class` on real canvases, for each judge.
        images: of one run.

    Returns:
        shares of the images in which each judge, and the teacher, sees the wanted class; and for
        each judge the distance within a class, as a share of that of real canvases.
    """
    wanted, kept = images.wanted, over(images.pixels, images.masks, "mean")
    found: dict[str, float] = {}
    for name, judge in judges.items():
        found[name] = share_reached(judge(normalise(images.pixels)), wanted)
        found[f"{name}_of_kept_patches_over_mean"] = share_reached(judge(normalise(kept)), wanted)
        distance = within_class(features(judge, images.pixels), wanted)
        found[f"diversity_in_{name}"] = round(distance / real_distances[name], 4)
    found["teacher_of_kept_patches"] = share_reached(images.logits, wanted)
    return found


def over_seeds(verdicts: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The mean and the value of each seed, for each figure."""
    columns = {name: [found[name] for found in verdicts] for name in verdicts[0]}
    return {
        name: {"mean": round(mean(values), 4), "seeds": values} for name, values in columns.items()
    }
