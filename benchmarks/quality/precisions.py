"""Whether images of a bfloat16 teacher are worth as much as those of the same teacher in float32.

Each inversion is run in both precisions, from the same seed. All images are judged alike: the
teacher whose confidence is measured is the float32 one. The yardstick is what another seed changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from statistics import mean
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.fashion_canvas.data import CLASSES, normalise
from benchmarks.harness.environment import record
from benchmarks.quality.class_accuracy import share_reached
from benchmarks.quality.images import Images, Run, images_of, make
from benchmarks.quality.other_teachers import TEACHERS, trained, weights_of
from benchmarks.quality.recognition import CONTENDERS, real_canvases
from benchmarks.quality.verdicts import load_judges, over_seeds, verdict
from smi_fast import SparseViT, load_teacher
from smi_fast.engine.precision import BFLOAT16, FLOAT32

ITERATIONS, QUICK_ITERATIONS = 100, 5
SEEDS, PER_CLASS = (0, 1, 2), 4
QUICK_SEEDS, QUICK_PER_CLASS = (0, 1), 2
PRECISIONS = (FLOAT32, BFLOAT16)
NAMES = ("clear, 30 of 64 patches", "published, 14 of 64 patches")
METHOD = (
    "same_patches is the share of an image's kept patches that the image of the other precision, "
    "or of another float32 seed, keeps too; the image before any iteration is the same in both "
    "precisions, and another one with another seed. difference is the mean over seeds of bfloat16 "
    "less that of float32; spread is the greatest less the least float32 seed."
)


def teachers(quick: bool) -> Iterator[tuple[str, VisionTransformer]]:
    """The teachers, frozen; two of them are trained if the folder doesn't have them."""
    yield "embedded", load_teacher("fashion-canvas")
    for name, training in ({} if quick else TEACHERS).items():
        yield name, trained(training, weights_of(name, training))


@torch.no_grad()
def confidence(teacher: SparseViT, images: Images) -> tuple[float, float]:
    """Mean probability that a teacher gives the wanted classes, and the share that it finds.

    It sees the kept patches alone.
    """
    pixels, kept = normalise(images.pixels), images.masks.flatten(1)
    # All images of a run keep as many patches.
    places = kept.nonzero()[:, 1].view(len(kept), -1)
    logits = teacher(pixels, places).logits
    assert logits is not None
    probability = logits.softmax(1).take_along_dim(images.wanted[:, None], 1)
    return round(probability.mean().item(), 4), share_reached(logits, images.wanted)


def same_patches(one: Tensor, other: Tensor) -> float:
    """The share of the kept patches of masks bool [N, rows, columns] that others keep too."""
    return round(((one & other).sum() / one.sum()).item(), 4)


def compared(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """What bfloat16 changes in each figure, beside what seeds change."""
    rows = {}
    for name in found[FLOAT32][0]:
        in_float32, in_bfloat16 = ([row[name] for row in found[each]] for each in PRECISIONS)
        rows[name] = {
            "difference": round(mean(in_bfloat16) - mean(in_float32), 4),
            "spread": round(max(in_float32) - min(in_float32), 4),
        }
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    iterations, seeds, per_class = (
        (QUICK_ITERATIONS, QUICK_SEEDS, QUICK_PER_CLASS)
        if quick
        else (ITERATIONS, SEEDS, PER_CLASS)
    )
    judges, measured, commits = load_judges(), {}, set()
    right, distances = real_canvases(judges, 500 if quick else None)
    for teacher, model in teachers(quick):
        vits = {each: SparseViT(model, precision=each) for each in PRECISIONS}
        measured[teacher] = {}
        for contender in NAMES:
            found: dict[str, list[dict[str, float]]] = {}
            masks: dict[str, list[Tensor]] = {}
            for each, vit in vits.items():
                name = f"{each}: {teacher}: {contender}"
                runs = [
                    Run(name, CONTENDERS[contender], iterations, seed, per_class) for seed in seeds
                ]
                make(vit, runs)
                for run in runs:
                    images = images_of(vit, run)
                    commits.add(images.commit)
                    sure, reached = confidence(vits[FLOAT32], images)
                    figures = verdict(judges, distances, images) | {
                        "teacher_of_kept_patches": reached,
                        "confidence_of_kept_patches": sure,
                    }
                    found.setdefault(each, []).append(figures)
                    masks.setdefault(each, []).append(images.masks)
            pairs = combinations(masks[FLOAT32], 2)
            measured[teacher][contender] = {
                "kept_patches": int(masks[FLOAT32][0][0].sum()),
                "same_patches": {
                    "in the other precision": round(
                        mean(map(same_patches, masks[FLOAT32], masks[BFLOAT16])), 4
                    ),
                    "with another seed": round(mean(same_patches(*pair) for pair in pairs), 4),
                },
                "bfloat16 against float32": compared(found),
                **{each: over_seeds(rows) for each, rows in found.items()},
            }
    return {
        "method": METHOD,
        "iterations": iterations,
        "seeds": seeds,
        "images_per_seed": len(CLASSES) * per_class,
        "images_made_at": sorted(commits),
        "real_canvases": right,
        "teachers": measured,
    }


def main(quick: bool = False) -> None:
    record("precisions", measure(quick), quick=quick)
