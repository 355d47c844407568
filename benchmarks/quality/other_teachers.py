"""Whether the default recipe, which was chosen on the embedded teacher, serves other teachers.

Two more teachers are trained: one from another seed, and a smaller one. Both have fewer training
steps than the embedded teacher. Teachers and images are kept in the folder of :mod:`images`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from benchmarks.fashion_canvas.data import CLASSES, MEAN, STD, TEST_SEED, canvases
from benchmarks.fashion_canvas.train_teacher import CONFIG, accuracy, train_cnn, train_vit
from benchmarks.harness.environment import record
from benchmarks.quality.images import Run, folder, images_of, make
from benchmarks.quality.recognition import CONTENDERS, real_canvases
from benchmarks.quality.verdicts import load_judges, over_seeds, verdict
from smi_fast import SparseViT
from smi_fast.zoo import small_cnn

ITERATIONS = 100
SEEDS = (0, 1, 2)
PER_CLASS = 4


@dataclass(frozen=True)
class Training:
    """How a teacher is trained.

    Attributes:
        config: of timm's ``VisionTransformer``.
        seed: of the CNN that it learns from; its own seed is one higher.
        steps, cnn_steps: numbers of batches.
    """

    config: dict[str, int]
    seed: int
    steps: int = 2500
    cnn_steps: int = 600

    def run(self) -> VisionTransformer:
        torch.manual_seed(self.seed)
        cnn = train_cnn(small_cnn(len(CLASSES)), self.cnn_steps, self.seed)
        return train_vit(self.steps, cnn, self.seed + 1, self.config)


TEACHERS = {
    "another seed": Training(CONFIG, seed=100),
    "4 blocks of width 96": Training({**CONFIG, "embed_dim": 96, "depth": 4}, seed=200),
}
QUICK = Training({**CONFIG, "embed_dim": 32, "depth": 1}, seed=0, steps=2, cnn_steps=2)


def weights_of(teacher: str, training: Training) -> Path:
    """The file of a teacher's weights."""
    name = teacher.replace(" ", "-")
    return folder() / f"{name}-{training.steps}-{training.seed}.teacher"


def trained(training: Training, weights: Path) -> VisionTransformer:
    """The teacher, frozen; from the file of an earlier run where there is one."""
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        partial = weights.with_suffix(".partial")
        save_file(training.run().state_dict(), partial)
        partial.replace(weights)
    model = VisionTransformer(**training.config)
    model.load_state_dict(load_file(weights), strict=True)
    model.pretrained_cfg = {"mean": MEAN, "std": STD}
    return model.eval().requires_grad_(False)


def runs(teacher: str, iterations: int, seeds: tuple[int, ...], per_class: int) -> list[Run]:
    """The runs of every contender. Those that are dense aren't part of longer runs here."""
    return [
        Run(f"{teacher}: {name}", replace(contender, longest=0), iterations, seed, per_class)
        for name, contender in CONTENDERS.items()
        for seed in seeds
    ]


def main(quick: bool = False) -> None:
    judges = load_judges()
    last = 500 if quick else None
    images, labels, _ = canvases("t10k", seed=TEST_SEED, last=last)
    right, distances = real_canvases(judges, last)
    measured: dict[str, Any] = {}
    commits = set()
    for teacher, training in ({"quick": QUICK} if quick else TEACHERS).items():
        model = trained(training, weights_of(teacher, training))
        sparse_vit = SparseViT(model)
        chosen = runs(teacher, *((5, (0,), 2) if quick else (ITERATIONS, SEEDS, PER_CLASS)))
        make(sparse_vit, chosen)
        verdicts: dict[str, list[dict[str, float]]] = {}
        kept = {}
        for run in chosen:
            made = images_of(sparse_vit, run)
            commits.add(made.commit)
            contender = run.name.removeprefix(f"{teacher}: ")
            verdicts.setdefault(contender, []).append(verdict(judges, distances, made))
            kept[contender] = int(made.masks[0].sum())
        measured[teacher] = {
            "config": training.config,
            "steps": training.steps,
            "test_accuracy": round(accuracy(model, images, labels), 4),
            "contenders": {
                contender: {"kept_patches": kept[contender], **over_seeds(found)}
                for contender, found in verdicts.items()
            },
        }
    record(
        "other_teachers",
        {
            "iterations": 5 if quick else ITERATIONS,
            "real_canvases": right,
            "images_made_at": sorted(commits),
            "teachers": measured,
        },
        quick=quick,
    )
