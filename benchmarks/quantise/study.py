"""What quantisation leaves of the teacher, by where the images that calibrate it come from.

Ranges of activations, or the rounding of weights, are found on 64 images of a source. The quantised
teacher is tested on 10 000 real canvases that took no part in its training. Images and figures stay
in the folder of :mod:`benchmarks.quality.images`, so a run goes on where it was cut off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.fashion_canvas.data import TEST_SEED, canvases, normalise
from benchmarks.fashion_canvas.train_teacher import accuracy
from benchmarks.harness.environment import commit, record
from benchmarks.harness.timing import rounded
from benchmarks.quality.images import figures_of, folder
from benchmarks.quality.verdicts import over_seeds
from benchmarks.quantise.gptq import Gptq
from benchmarks.quantise.quantiser import Network, Simulated, Widths
from benchmarks.transfer.sources import SOURCES, Pictures
from smi_fast import load_teacher
from smi_fast.background import over

COUNT, SEEDS = 64, (0, 1, 2)
# Ranges of activations are found once. At 8 bits they tell no images apart.
SEEDS_OF_RANGES = SEEDS[:1]
QUICK_COUNT, QUICK_SEEDS, QUICK_CANVASES = 16, (0,), 500
SETTINGS: tuple[Widths | Gptq, ...] = (
    Widths(8, 8),
    Widths(4, 8),
    Widths(4, 4),
    Widths(4, 4, "least squares"),
    Widths(3, 3),
    Widths(3, 3, "least squares"),
    Gptq(2),
)
QUICK_SETTINGS: tuple[Widths | Gptq, ...] = (
    Widths(8, 8),
    Widths(3, 3, "least squares"),
    Gptq(2),
)
QUICK_SOURCES = ("real", "Gaussian noise", "default")


@dataclass(frozen=True)
class Shown:
    """Images of a source, whole or only their kept patches, over a background."""

    source: str
    background: str | None = None

    def __str__(self) -> str:
        kept = f", kept patches over {self.background}"
        return self.source + (kept if self.background else "")


SHOWN = (
    Shown("real"),
    Shown("Gaussian noise"),
    Shown("1/f noise"),
    Shown("published, dense"),
    Shown("published, sparse"),
    Shown("dense"),
    Shown("default"),
    Shown("default", "mean"),
    Shown("default", "black"),
    Shown("rebirth, v = 4", "mean"),
)


@dataclass(frozen=True)
class Trial:
    """One calibration of one quantiser."""

    setting: Widths | Gptq
    shown: Shown
    count: int
    seed: int

    @property
    def path(self) -> Path:
        parts = (self.setting, self.shown, self.count, self.seed)
        name = re.sub(r"\W+", "-", "-".join(map(str, parts)))
        return folder() / f"quantise-{name}.json"


def trials(quick: bool = False) -> Iterator[Trial]:
    """All trials; those of one seed follow each other."""
    settings = QUICK_SETTINGS if quick else SETTINGS
    shown = [one for one in SHOWN if one.source in QUICK_SOURCES] if quick else SHOWN
    for seed in QUICK_SEEDS if quick else SEEDS:
        for setting in settings:
            if seed in SEEDS_OF_RANGES or isinstance(setting, Gptq):
                for one in shown:
                    yield Trial(setting, one, QUICK_COUNT if quick else COUNT, seed)


class Study:
    """Calibrates and tests the quantised teachers of trials.

    Args:
        last: number of canvases to test on; None for all 10 000.
    """

    def __init__(self, last: int | None = None) -> None:
        self.vit = load_teacher("fashion-canvas")
        self.images, self.labels, _ = canvases("t10k", seed=TEST_SEED, last=last)
        self.pictures, self.simulated = cache(self._pictures), cache(self._simulated)

    def _pictures(self, source: str, count: int, seed: int) -> Pictures:
        return SOURCES[source](self.vit, count, seed)

    def _simulated(self, widths: Widths) -> Simulated:
        return Simulated(self.vit, widths)

    def calibration(self, trial: Trial) -> Tensor:
        """The images of a trial, [N, 3, H, W], normalised."""
        made = self.pictures(trial.shown.source, trial.count, trial.seed)
        background = trial.shown.background
        return normalise(over(made.pixels, made.masks, background) if background else made.pixels)

    def found(self, trial: Trial) -> dict[str, Any]:
        """The figures of a trial, from the file of an earlier run where there is one."""
        name = f"{trial.setting}, {trial.shown}"
        return figures_of(trial.path, name, partial(self._run, trial))

    def _run(self, trial: Trial) -> dict[str, Any]:
        network = self.network(trial.setting, self.calibration(trial))
        return {"accuracy": accuracy(network, self.images, self.labels), "commit": commit()}

    def network(self, setting: Widths | Gptq, images: Tensor) -> Network:
        """The teacher, quantised on normalised images."""
        if isinstance(setting, Gptq):
            return setting.network(self.vit, images)
        return self.simulated(setting).calibrate(images)


def measure(quick: bool = False) -> dict[str, Any]:
    """Calibrate and test all quantised teachers."""
    study = Study(QUICK_CANVASES if quick else None)
    rows: dict[str, dict[str, list[dict[str, float]]]] = {}
    commits: set[str] = set()
    for trial in trials(quick):
        said = study.found(trial)
        commits.add(said.pop("commit"))
        by_shown = rows.setdefault(str(trial.setting), {})
        by_shown.setdefault(str(trial.shown), []).append(said)
    return {
        "count": QUICK_COUNT if quick else COUNT,
        "seeds": {
            "ranges": SEEDS_OF_RANGES,
            "GPTQ": QUICK_SEEDS if quick else SEEDS,
        },
        "teacher": rounded(accuracy(study.vit, study.images, study.labels)),
        "made_at": sorted(commits),
        "quantised": {
            setting: {shown: over_seeds(found)["accuracy"] for shown, found in by_shown.items()}
            for setting, by_shown in rows.items()
        },
    }


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    record("quantise", measure(quick), quick=quick)
