"""Draw the README's speed picture from the recorded results."""

from __future__ import annotations

import json
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.environment import result_file

# Each loop adds techniques to the one before it: (loop, what it adds, colour).
TECHNIQUES = (
    ("published_sparse", "stop patches (SMI)", "#9db4c8"),
    (
        "reference_sparse",
        "freeze weights, gather before embedding,\nlast block for the class row only",
        "#6f93b5",
    ),
    ("our_sparse", "C++ kernels and engine", "#2f6690"),
)
NAMES = {"deit_tiny": "DeiT-T", "deit_small": "DeiT-S", "deit_base": "DeiT-B"}
TEXT, GRID = "#333333", "#e4e4e4"


def draw(results: dict[str, Any]) -> Figure:
    """A waterfall for each model: how many times faster each technique makes a whole inversion.

    The axis is logarithmic: the length of a bar is its factor, and bars add up to the product.

    Args:
        results: the content of ``end_to_end.json``.
    """
    models = results["models"]
    figure = Figure(figsize=(9, 1.0 + 1.35 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), sharex=True, squeeze=False)[:, 0]
    gains = []
    for axes, (model, measured) in zip(panels, models.items(), strict=True):
        ratios = measured["ratios_to_our_sparse"]["whole_schedule"]
        _waterfall(axes, {name: ratio["median"] for name, ratio in ratios.items()})
        gains.append(ratios["published_dense"]["median"])
        ours = measured["variants"]["our_sparse"]["whole_seconds"]["median"]
        axes.set_title(
            f"{NAMES[model]}, batch {measured['batch']}: our sparse loop takes {ours:.0f} s",
            loc="left",
            fontsize=10,
            color=TEXT,
        )
    # The factors stand to the right of the bars.
    panels[-1].set_xlim(1, 1.6 * max(gains))
    panels[-1].set_xlabel("times as fast as a published-style dense loop", color=TEXT)
    machine = results["environment"]
    figure.suptitle(
        f"Whole inversions of {results['iterations']} iterations, 224 px, float32, "
        f"{machine['threads']} cores of {machine['cpu']}",
        x=0.01,
        ha="left",
        fontsize=10.5,
        color=TEXT,
    )
    return figure


def _waterfall(axes: Axes, times: dict[str, float]) -> None:
    """One bar per technique.

    Args:
        axes: to draw in.
        times: the time of each loop, relative to our sparse one.
    """
    before = dense = times["published_dense"]
    for row, (name, _, colour) in enumerate(TECHNIQUES):
        start, end = dense / before, dense / times[name]
        axes.barh(row, end - start, left=start, height=0.72, color=colour)
        last = row == len(TECHNIQUES) - 1
        factor = f" × {end / start:.2f}" + (f" = {end:.1f}×" if last else "")
        weight = "bold" if last else None
        axes.annotate(factor, (end, row), va="center", color=TEXT, fontsize=9.5, fontweight=weight)
        before = times[name]
    axes.set_yticks(range(len(TECHNIQUES)), [technique for _, technique, _ in TECHNIQUES])
    axes.set_ylim(len(TECHNIQUES) - 0.45, -0.55)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=TEXT)
    axes.spines[:].set_visible(False)


def main(quick: bool = False) -> None:
    source = result_file("end_to_end.json", quick=quick)
    if not source.exists():
        command = "python -m benchmarks end-to-end" + (" --quick" if quick else "")
        raise SystemExit(f"expected {source}: run {command} first")
    path = result_file("waterfall.png", quick=quick)
    draw(json.loads(source.read_text())).savefig(path, dpi=150, facecolor="white")
    print(f"figures: {path}")
