"""How many inverted images an independent network recognises, by what the optimiser moves.

The embedded teacher is inverted with the published recipe (pixels) and with ``recipes.clear``
(Fourier), dense and sparse. The judge (see ``fashion_canvas/train_cnns.py``) took no part. It sees
the whole images, and the kept patches over their own mean colour. It is no judge of diversity.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.fashion_canvas.data import CLASSES, normalise
from benchmarks.fashion_canvas.train_cnns import load_judge
from benchmarks.harness.environment import record, result_file
from benchmarks.quality.class_accuracy import share_reached
from smi_fast import (
    Dense,
    InversionResult,
    Schedule,
    SparseInverter,
    SparseViT,
    StopSchedule,
    load_teacher,
    recipes,
)

SEEDS = (0, 1, 2)
LENGTHS = (25, 50, 100, 200)
PER_CLASS = 4


@dataclass(frozen=True)
class Contender:
    """A recipe and the share of the patches that its schedule keeps; None for all of them."""

    recipe: recipes.Recipe
    keep: float | None

    def schedule(self, iterations: int) -> Schedule:
        if self.keep is None:
            return Dense()
        if self.recipe.name == "smi":
            # The published stops at the same shares of the run, at least an iteration apart.
            shares = enumerate((1, 2, 4, 6), start=1)
            at = tuple(max(iterations * eightieths // 80, i) for i, eightieths in shares)
            return StopSchedule(at, (0.3,) * 4)
        return StopSchedule.once(iterations, keep=self.keep, at=0.1 if self.keep > 0.3 else 0.05)


CONTENDERS = {
    "published, dense": Contender(recipes.smi(), None),
    "published, 14 of 64 patches": Contender(recipes.smi(), 0.24),
    "clear, dense": Contender(recipes.clear(), None),
    "clear, 30 of 64 patches": Contender(recipes.clear(), 0.47),
    "clear, 14 of 64 patches": Contender(recipes.clear(), 0.22),
}
COLOURS = ("#9db4c8", "#c8b49d", "#2f6690", "#3a9a5b", "#8fcf9f")


def invert(
    teacher: SparseViT, contender: Contender, iterations: int, seed: int, targets: Tensor
) -> InversionResult:
    inverter = SparseInverter(
        teacher,
        **contender.recipe.options(iterations=iterations, schedule=contender.schedule(iterations)),
    )
    generator = torch.Generator().manual_seed(seed)
    return inverter.invert(targets, generator=generator, progress=False)


@torch.no_grad()
def verdict(judge: nn.Module, result: InversionResult) -> dict[str, float]:
    """Shares of the images in which judge and teacher see the wanted class."""
    wanted = result.targets
    size = result.images.shape[-1] // result.masks.shape[-1]
    shown = result.masks.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
    means = (result.images * shown).sum((2, 3), keepdim=True) / shown.sum((2, 3), keepdim=True)
    over_mean = torch.where(shown, result.images, means)
    return {
        "judge": share_reached(judge(normalise(result.images)), wanted),
        "judge_of_kept_patches_over_mean": share_reached(judge(normalise(over_mean)), wanted),
        "teacher_of_kept_patches": share_reached(result.logits, wanted),
    }


def measure(
    judge: nn.Module, lengths: tuple[int, ...], seeds: tuple[int, ...], per_class: int
) -> dict[str, Any]:
    teacher = SparseViT(load_teacher("fashion-canvas"))
    targets = torch.arange(len(CLASSES)).repeat_interleave(per_class)
    measured: dict[str, Any] = {}
    for name, contender in CONTENDERS.items():
        for iterations in lengths:
            verdicts = []
            for seed in seeds:
                result = invert(teacher, contender, iterations, seed, targets)
                verdicts.append(verdict(judge, result))
            spread = {
                key: {"mean": round(mean(values), 4), "seeds": values}
                for key in verdicts[0]
                for values in [[found[key] for found in verdicts]]
            }
            entry = {"kept_patches": result.kept.shape[1], **spread}
            measured.setdefault(name, {})[str(iterations)] = entry
            print(f"{name}, {iterations} iterations: {entry}", flush=True)
    return measured


def draw(measured: dict[str, Any], ceiling: float) -> Figure:
    """The judge's accuracy on whole images against the iterations of a run."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, by_length), colour in zip(measured.items(), COLOURS, strict=True):
        lengths = [int(length) for length in by_length]
        values = [entry["judge"]["mean"] for entry in by_length.values()]
        seeds = [entry["judge"]["seeds"] for entry in by_length.values()]
        axes.plot(lengths, values, marker="o", color=colour, label=name)
        axes.fill_between(
            lengths,
            *map(list, zip(*((min(s), max(s)) for s in seeds), strict=True)),
            color=colour,
            alpha=0.15,
        )
    axes.axhline(ceiling, color="#888888", linestyle=":", label="real canvases")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="iterations", ylabel="recognised by the judge")
    axes.set_xticks([int(length) for length in next(iter(measured.values()))])
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.get_xaxis().set_minor_formatter("")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(color="#e4e4e4")
    return figure


def main(quick: bool = False) -> None:
    judge = load_judge()
    lengths, seeds, per_class = ((25,), (0,), 1) if quick else (LENGTHS, SEEDS, PER_CLASS)
    measured = measure(judge, lengths, seeds, per_class)
    setting = {"seeds": seeds, "images_per_seed": per_class * len(CLASSES)}
    record("quality", {**setting, "contenders": measured}, quick=quick)
    real = json.loads(result_file("independent_judge.json").read_text())["judge_test_accuracy"]
    draw(measured, real).savefig(result_file("quality.png", quick=quick), dpi=120)
