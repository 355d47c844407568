"""What a student learns from images alone, by where the images come from.

Students have random weights. They learn the teacher's distribution, at a temperature of 4, on a
fixed number of images in a fixed number of steps, and are tested on 10 000 real canvases that
nobody trained on. Images of all sources are moved by up to a patch, mirrored and recoloured. The
seconds of an image are those of ``schedules.json``, which is recorded on idle cores, so this study
may share its machine. Images and figures stay in the folder of
:mod:`benchmarks.quality.images`, so a run goes on where it was cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer

from benchmarks.fashion_canvas.data import TEST_SEED, canvases
from benchmarks.fashion_canvas.train_teacher import accuracy
from benchmarks.harness.environment import commit, record, result_file
from benchmarks.harness.timing import alternate, clocked, ratios, rounded, spread
from benchmarks.quality.images import figures_of, folder
from benchmarks.quality.verdicts import over_seeds
from benchmarks.transfer import closed_loop
from benchmarks.transfer.sources import ITERATIONS, SOURCES, Pictures
from benchmarks.transfer.students import STUDENTS, Training
from smi_fast import SparseViT, load_teacher

COUNT, SEEDS, STEPS = 400, (0, 1, 2), 600
QUICK_COUNT, QUICK_SEEDS, QUICK_STEPS = 40, (0,), 20
TIMED_STEPS, ROUNDS, QUICK_ROUNDS = 4, 7, 1
FEWER, MORE = (100, 200), 2000
# The sources of which fewer images, and more, are compared too.
CURVES = ("real", "published, dense", "dense", "default", "rebirth, v = 4")
LARGE = ("real", "dense", "default")
# Their images take an hour of a core for a seed, so there is one seed of them.
ONE_SEED = ("published, dense, 4000 iterations", "published, sparse, 4000 iterations")
KEPT_ONLY = ("rebirth, v = 2", "rebirth, v = 4", "rebirth, v = 7")
QUICK_SOURCES = ("real", "1/f noise", "dense", "default")
CLOSED_LOOP = "default, closed loop"


@dataclass(frozen=True)
class Trial:
    """One student that learns from one source.

    Attributes:
        source: a key of SOURCES, or CLOSED_LOOP.
        shown: "whole", or kept patches over "mean" or "black", or "tokens".
        student: a key of STUDENTS.
        count: number of images.
        seed: of the images and of the student.
        steps: of the student.
    """

    source: str
    shown: str
    student: str
    count: int
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return self.source if self.shown == "whole" else f"{self.source}, {SHOWN[self.shown]}"

    @property
    def path(self) -> Path:
        parts = (self.source, self.shown, self.student, self.count, self.steps, self.seed)
        name = re.sub(r"\W+", "-", "-".join(map(str, parts)))
        return folder() / f"transfer-{name}.json"


SHOWN = {"mean": "kept patches over mean", "black": "kept patches over black", "tokens": "tokens"}


def trials(quick: bool = False) -> Iterator[Trial]:
    """All trials; those of all sources and one seed follow each other."""
    count, seeds, steps = (
        (QUICK_COUNT, QUICK_SEEDS, QUICK_STEPS) if quick else (COUNT, SEEDS, STEPS)
    )
    for seed in seeds:
        for source in QUICK_SOURCES if quick else SOURCES:
            if source in ONE_SEED and seed != seeds[0]:
                continue
            for student in ("CNN", "ViT"):
                yield Trial(source, _shown(source), student, count, seed, steps)
        for student in ("CNN", "ViT"):
            for shown in ("mean", "black"):
                yield Trial("default", shown, student, count, seed, steps)
        yield Trial("default", "tokens", "ViT on kept tokens", count, seed, steps)
        yield Trial(CLOSED_LOOP, "whole", "CNN", count, seed, steps)
        if not quick:
            for source in CURVES:
                for fewer in FEWER:
                    yield Trial(source, _shown(source), "CNN", fewer, seed, steps)
            for source in LARGE:
                yield Trial(source, "whole", "CNN", MORE, seed, steps)


def _shown(source: str) -> str:
    return "mean" if source in KEPT_ONLY else "whole"


class Study:
    """Trains the students of trials, and tests them.

    Args:
        count: images that are made of a source; a trial of fewer takes the first ones.
        last: number of canvases to test on; None for all 10 000.
    """

    def __init__(self, count: int, last: int | None = None) -> None:
        self.count = count
        self.vit: VisionTransformer = load_teacher("fashion-canvas")
        self.teacher = SparseViT(self.vit)
        self.images, self.labels, _ = canvases("t10k", seed=TEST_SEED, last=last)
        self.pictures = cache(self._pictures)

    def _pictures(self, source: str, count: int, seed: int) -> Pictures:
        return SOURCES[source](self.vit, count, seed)

    def found(self, trial: Trial) -> dict[str, Any]:
        """The figures of a trial, from the file of an earlier run where there is one."""
        name = f"{trial.student} from {trial.count} of {trial.name}"
        return figures_of(trial.path, name, partial(self._run, trial))

    def _run(self, trial: Trial) -> dict[str, Any]:
        if trial.source == CLOSED_LOOP:
            training, pictures = closed_loop.trained(
                trial.student, self.teacher, trial.count, trial.steps, trial.seed
            )
        else:
            pictures = self.pictures(trial.source, max(trial.count, self.count), trial.seed)
            pictures = pictures.first(trial.count)
            training = Training(STUDENTS[trial.student], self.teacher, trial.steps, trial.seed)
            background = trial.shown if trial.shown in ("mean", "black") else None
            training.learn(pictures, background, trial.steps)
        return {
            "accuracy": accuracy(training.student, self.images, self.labels),
            "commits": sorted({*pictures.commits, commit()}),
        }


def time_on_tokens(study: Study, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of a ViT's steps on kept tokens over those of its steps on whole images, in turn."""
    pictures = study.pictures("default", count, 0)

    def contender(student: str) -> Callable[[], float]:
        steps = (rounds + 1) * TIMED_STEPS
        training = Training(STUDENTS[student], study.teacher, steps, 0)
        return clocked(partial(training.learn, pictures, None, TIMED_STEPS))

    contenders = {student: contender(student) for student in ("ViT", "ViT on kept tokens")}
    alternate(contenders, 1)
    whole, tokens = alternate(contenders, rounds).values()
    return {
        "kept": int(pictures.masks[0].sum()),
        "of": pictures.masks[0].numel(),
        "over_whole": spread(ratios(tokens, whole)),
    }


def measure(quick: bool = False) -> dict[str, Any]:
    """Train and test all students."""
    study = Study(QUICK_COUNT, 500) if quick else Study(COUNT)
    rows: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {}
    sources: dict[str, str] = {}
    commits: set[str] = set()
    for trial in trials(quick):
        said = study.found(trial)
        commits |= set(said.pop("commits"))
        sources[trial.name] = trial.source
        by_count = rows.setdefault(trial.student, {}).setdefault(trial.name, {})
        by_count.setdefault(str(trial.count), []).append(said)
    first = next(trials(quick))
    prices = _prices()
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return {
        "steps": first.steps,
        "seeds": QUICK_SEEDS if quick else SEEDS,
        "teacher": rounded(accuracy(study.vit, study.images, study.labels)),
        "made_at": sorted(commits),
        "time_on_kept_tokens": time_on_tokens(study, first.count, rounds),
        "students": {
            student: {
                name: {
                    count: {
                        "accuracy": over_seeds(found)["accuracy"],
                        "synthesis_seconds": _seconds_of(sources[name], int(count), prices),
                    }
                    for count, found in by_count.items()
                }
                for name, by_count in by_name.items()
            }
            for student, by_name in rows.items()
        },
    }


def draw(by_name: dict[str, Any], teacher: float) -> Figure:
    """The accuracy of CNNs against the seconds that their images took."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.add_subplot()
    timed = {name: found for name, found in by_name.items() if all(_seconds(found))}
    for index, (name, by_count) in enumerate(timed.items()):
        means = [entry["accuracy"]["mean"] for entry in by_count.values()]
        points = sorted(zip(_seconds(by_count), means, strict=True))
        axes.plot(*zip(*points, strict=True), "o-", color=colormaps["tab20"](index), label=name)
    axes.axhline(teacher, color="#888888", linestyle=":")
    axes.set(xscale="log", xlabel="seconds for the images", ylabel="accuracy on real canvases")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(color="#e4e4e4")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _seconds(by_count: dict[str, Any]) -> list[float | None]:
    return [entry["synthesis_seconds"] for entry in by_count.values()]


def _prices() -> dict[str, Any]:
    """The figures of ``schedules.json``, or none before it is recorded."""
    path = result_file("schedules.json")
    return json.loads(path.read_text())["contenders"] if path.exists() else {}


def _seconds_of(source: str, count: int, prices: dict[str, Any]) -> float | None:
    """Seconds that images of a source took, or None where it has no price."""
    if source not in ITERATIONS or not prices:
        return None
    price = prices[source][str(ITERATIONS[source])]["seconds_per_image"]
    return rounded(count * price)


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    measured = measure(quick)
    record("transfer", measured, quick=quick)
    picture = draw(measured["students"]["CNN"], measured["teacher"])
    picture.savefig(result_file("transfer.png", quick=quick), dpi=120)
