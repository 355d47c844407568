"""Seconds until images are as recognisable as those of the published-style dense loop.

``quality.json`` has how often the judges recognise images after a number of iterations. Here the
iterations are timed, those of the published recipe in the published-style loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.fashion_canvas.data import CLASSES
from benchmarks.harness.environment import record, result_file
from benchmarks.harness.timing import alternate, clocked, ratios, spread
from benchmarks.quality.recognition import CONTENDERS, PER_CLASS, published_stops
from benchmarks.speed.end_to_end import schedule_phases, whole_seconds
from benchmarks.speed.loops import (
    NO_STOPS,
    PhaseSeconds,
    Workload,
    published_loop,
    time_phases,
)
from smi_fast import SparseInverter, SparseViT, StopSchedule, load_teacher

ROUNDS, QUICK_ROUNDS = 5, 1
# Iterations of each phase of a block of the published-style loops, and of a run of ours.
BLOCK, OUR_BLOCK = 4, 50
OURS = tuple(name for name in CONTENDERS if name.startswith("clear"))
DENSE, SPARSE = (name for name in CONTENDERS if name not in OURS)
JUDGES = ("judge", "second_judge")
COLOURS = ("#9db4c8", "#c8b49d", "#2f6690", "#3a9a5b", "#8fcf9f")
METHOD = (
    "Seconds of a published-style run are composed of the phases of a timed block. Our runs that "
    "reach a level are timed whole. A level is reached at the shortest measured length whose mean "
    "over the seeds is at least as high: nothing is interpolated. Each round times every contender "
    "once; ratios are taken within a round, and their median and quartiles are over the rounds."
)

Recognised = dict[str, dict[str, Any]]


def levels(contenders: Recognised, judge: str) -> dict[str, dict[str, Any]]:
    """What the published dense loop reaches at its best and at its end, and how soon ours does.

    Args:
        contenders: those of ``quality.json``.
        judge: name of a share in them.
    """
    dense = {int(length): entry[judge]["mean"] for length, entry in contenders[DENSE].items()}
    best = max(dense, key=lambda length: (dense[length], -length))
    return {
        which: {
            "published_iterations": length,
            "recognised": dense[length],
            "our_iterations": {
                name: shortest(contenders[name], judge, dense[length]) for name in OURS
            },
        }
        for which, length in (("best", best), ("last", max(dense)))
    }


def shortest(by_length: dict[str, Any], judge: str, level: float) -> int | None:
    """The fewest measured iterations that reach a level, None where none do."""
    reaching = [int(length) for length, entry in by_length.items() if entry[judge]["mean"] >= level]
    return min(reaching, default=None)


def published_block(stops: StopSchedule) -> Callable[[], dict[int, PhaseSeconds]]:
    """Times some iterations of each phase of the published-style loop."""
    vit, targets = load_teacher("fashion-canvas"), wanted()
    run = published_loop(
        Workload(vit, targets, torch.randn(len(targets), 3, *vit.patch_embed.img_size))
    )
    at = tuple(BLOCK * number for number in range(1, len(stops.at) + 1))
    block = StopSchedule(at, stops.drop)
    return partial(time_phases, run, block, BLOCK * (len(at) + 1))


def wanted() -> torch.Tensor:
    return torch.arange(len(CLASSES)).repeat_interleave(PER_CLASS)


def our_run(teacher: SparseViT, name: str, iterations: int) -> Callable[[], object]:
    inverter = SparseInverter(teacher, **CONTENDERS[name].options(iterations))
    return partial(inverter.invert, wanted(), progress=False)


def our_phases(run: Callable[[], Any]) -> dict[int, PhaseSeconds]:
    return {
        phase.patches: PhaseSeconds((), phase.seconds / phase.iterations) for phase in run().timing
    }


def measure(contenders: Recognised, rounds: int) -> dict[str, Any]:
    """Time all contenders of ``quality.json``, and compare how soon they reach a level."""
    teacher = SparseViT(load_teacher("fashion-canvas"))
    found = {judge: levels(contenders, judge) for judge in JUDGES}
    reaching = {
        (name, length)
        for by_level in found.values()
        for level in by_level.values()
        for name, length in level["our_iterations"].items()
        if length is not None
    }
    timed: dict[Any, Callable[[], Any]] = {
        DENSE: published_block(NO_STOPS),
        SPARSE: published_block(published_stops(80)),
        **{name: partial(our_phases, our_run(teacher, name, OUR_BLOCK)) for name in OURS},
        **{pair: clocked(our_run(teacher, *pair)) for pair in sorted(reaching)},
    }
    for name in (DENSE, OURS[0]):
        timed[name]()  # The first iterations of a process are slow.
    seconds = alternate(timed, rounds)
    for by_level in found.values():
        for level in by_level.values():
            phases = [(teacher.num_patches, level["published_iterations"])]
            published = [whole_seconds(phases, block) for block in seconds[DENSE]]
            level["published_seconds"] = spread(published)
            level["ours"] = {
                name: {
                    "iterations": length,
                    "seconds": spread(seconds[name, length]),
                    "times_as_fast": spread(ratios(published, seconds[name, length])),
                }
                for name, length in level.pop("our_iterations").items()
                if length is not None
            }
    return {
        "method": METHOD,
        "images": len(wanted()),
        "rounds": rounds,
        "levels": found,
        "seconds_of_a_run": {
            name: {
                length: spread(
                    [whole_seconds(phases_of(name, int(length)), b) for b in seconds[name]]
                )
                for length in by_length
            }
            for name, by_length in contenders.items()
        },
    }


def phases_of(name: str, iterations: int) -> list[tuple[int, int]]:
    """(kept patches, iterations) of each phase of a run."""
    schedule = CONTENDERS[name].options(iterations)["schedule"]
    if not schedule.at:
        return [(64, iterations)]
    return schedule_phases(schedule, iterations, 64)


def draw(contenders: Recognised, seconds: Recognised, ceiling: float) -> Figure:
    """The share of images that the judge recognises against the seconds of a run."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for (name, by_length), colour in zip(contenders.items(), COLOURS, strict=True):
        x = [seconds[name][length]["median"] for length in by_length]
        entries = [entry["judge"] for entry in by_length.values()]
        low, high = ([edge(entry["seeds"]) for entry in entries] for edge in (min, max))
        axes.plot(x, [entry["mean"] for entry in entries], marker="o", color=colour, label=name)
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
    axes.axhline(ceiling, color="#888888", linestyle=":", label="real canvases")
    axes.set(xscale="log", ylim=(0, 1.02), ylabel="recognised by the judge")
    axes.set_xlabel("seconds for 40 images; published: in the published-style loop")
    axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    axes.grid(color="#e4e4e4")
    return figure


def main(quick: bool = False) -> None:
    quality = json.loads(result_file("quality.json").read_text())
    contenders = {name: found["by_length"] for name, found in quality["contenders"].items()}
    measured = measure(contenders, QUICK_ROUNDS if quick else ROUNDS)
    record("time_to_quality", measured, quick=quick)
    picture = draw(contenders, measured["seconds_of_a_run"], quality["real_canvases"]["judge"])
    picture.savefig(result_file("quality.png", quick=quick), dpi=120)
