"""A fixed number of images by every schedule: what they cost, and who recognises them.

The embedded teacher makes as many images with each contender, for each seed and each length of a
run. A round is a seed, in which all contenders take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import nn

from benchmarks.fashion_canvas.data import normalise
from benchmarks.harness.environment import IDLE, record, result_file
from benchmarks.harness.timing import rounded
from benchmarks.quality.class_accuracy import share_reached
from benchmarks.quality.images import Images
from benchmarks.quality.recognition import real_canvases
from benchmarks.quality.verdicts import (
    features,
    load_judges,
    over_seeds,
    verdict,
    within_class,
)
from benchmarks.schedules.contenders import CONTENDERS
from benchmarks.schedules.timed import Job, timed
from smi_fast import SparseViT, load_teacher
from smi_fast.background import over

IMAGES, SEEDS = 128, (0, 1, 2)
# Each trajectory of v = 7 has a class, of which there are ten.
QUICK_IMAGES, QUICK_SEEDS, QUICK_LENGTHS = 70, (0,), (14,)
# The share of recognised images whose price is compared.
LEVEL = 0.85
METHOD = (
    "Seconds are wall-clock of the first seed's run, for all trajectories that the images need; a "
    "run that makes a few more images than asked for pays for them. The images of other seeds may "
    "be made on a busy machine. The judges see whole images: of rebirth the trajectory's "
    "canvas, in which every patch is as it was when it left; and the patches of each image over "
    "their mean colour. patch_updates_per_image is what the teacher computes for an image, in "
    "patches times iterations."
)

Entries = dict[str, dict[str, Any]]


def jobs(quick: bool = False) -> Iterator[Job]:
    """All jobs; those of one seed and length follow each other."""
    seeds, images = (QUICK_SEEDS, QUICK_IMAGES) if quick else (SEEDS, IMAGES)
    lengths = sorted({length for c in CONTENDERS.values() for length in c.lengths})
    for seed in seeds:
        for length in QUICK_LENGTHS if quick else lengths:
            for name, contender in CONTENDERS.items():
                if quick or length in contender.lengths:
                    yield Job(name, length, seed, images)


@torch.no_grad()
def entry(
    teacher: SparseViT,
    judges: dict[str, nn.Sequential],
    distances: dict[str, float],
    job: Job,
    images: Images,
) -> dict[str, float]:
    """What the judges and the teacher see in the images of one job."""
    kept = over(images.pixels, images.masks, "mean")
    shown = {"teacher": images.pixels, "teacher_of_kept_patches_over_mean": kept}
    return {
        **verdict(judges, distances, images),
        **{
            name: share_reached(teacher(normalise(pixels)).logits, images.wanted)
            for name, pixels in shown.items()
        },
        **{
            f"diversity_of_kept_patches_in_{name}": round(
                within_class(features(judge, kept), images.wanted) / distances[name], 4
            )
            for name, judge in judges.items()
        },
    }


def measure(quick: bool = False) -> dict[str, Any]:
    """Make the images of all jobs, and judge them."""
    vit, judges = load_teacher("fashion-canvas"), load_judges()
    teacher = SparseViT(vit)
    right, distances = real_canvases(judges, 500 if quick else None)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    facts: Entries = {}
    commits, busy = set(), 0.0
    for job in jobs(quick):
        there = job.path.exists()
        made = timed(vit, job)
        if not there:
            print(f"{job.name}, {job.iterations} iterations, seed {job.seed}: made", flush=True)
        commits.add(made.images.commit)
        figures = entry(teacher, judges, distances, job, made.images)
        found.setdefault((job.name, job.iterations), []).append(figures)
        length = facts.setdefault(job.name, {})
        if str(job.iterations) in length:  # only the first seed is timed
            continue
        busy = max(busy, made.others or 0.0)
        length[str(job.iterations)] = {
            "seconds_per_image": rounded(made.seconds / job.images),
            "images_per_hour": rounded(3600 * job.images / made.seconds),
            "trajectories": job.trajectories,
            "kept_patches": rounded(made.images.masks.sum((1, 2)).double().mean().item()),
            "updates_of_a_shown_patch": rounded(made.updates.double().mean().item()),
            "patch_updates_per_image": rounded(
                made.patch_iterations * job.trajectories / job.images
            ),
        }
    contenders = {
        name: {
            length: {**fact, **over_seeds(found[name, int(length)])}
            for length, fact in sorted(by_length.items(), key=lambda pair: int(pair[0]))
        }
        for name, by_length in facts.items()
    }
    return {
        "method": METHOD,
        "seeds": sorted({job.seed for job in jobs(quick)}),
        "images_per_seed": QUICK_IMAGES if quick else IMAGES,
        "images_made_at": sorted(commits),
        "greatest_cpu_share_of_others": busy,
        "idle": busy < IDLE,
        "real_canvases": right,
        "seconds_per_image_until_recognised": price(contenders, LEVEL),
        "contenders": contenders,
    }


def price(contenders: Entries, level: float) -> dict[str, dict[str, float] | None]:
    """The least seconds per image at which the judge recognises a share of the images."""
    found: dict[str, dict[str, float] | None] = {"level": {"recognised": level}}
    for name, by_length in contenders.items():
        reaching = [
            (entry["seconds_per_image"], int(length))
            for length, entry in by_length.items()
            if entry["judge"]["mean"] >= level
        ]
        least = min(reaching, default=None)
        found[name] = None if least is None else {"seconds": least[0], "iterations": least[1]}
    return found


def draw(contenders: Entries, ceiling: float) -> Figure:
    """The share of images that the judge recognises against the seconds of an image."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    panels = figure.subplots(ncols=2, sharey=True)
    columns = ("judge", "judge_of_kept_patches_over_mean")
    titles = ("whole images", "their patches over the mean colour")
    for axes, column, title in zip(panels, columns, titles, strict=True):
        for index, (name, by_length) in enumerate(contenders.items()):
            entries = by_length.values()
            x = [entry["seconds_per_image"] for entry in entries]
            dashed = "--" if name.startswith("published, ") else "-"
            colour = colormaps["tab20"](index)
            y = [entry[column]["mean"] for entry in entries]
            axes.plot(x, y, dashed, marker="o", markersize=3.5, color=colour, label=name)
        axes.axhline(ceiling, color="#888888", linestyle=":")
        axes.axhline(LEVEL, color="#cccccc", linestyle=":")
        axes.set(xscale="log", ylim=(0, 1.02), xlabel="seconds per image", title=title)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(color="#e4e4e4")
    panels[0].set_ylabel("recognised by the judge")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center",
                  ncols=3)  # fmt: skip
    return figure


def main(quick: bool = False) -> None:
    torch.manual_seed(0)
    measured = measure(quick)
    record("schedules", measured, quick=quick)
    picture = draw(measured["contenders"], measured["real_canvases"]["judge"])
    picture.savefig(result_file("schedules.png", quick=quick), dpi=120)
