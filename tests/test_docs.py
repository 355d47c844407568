"""README.md and docs/ say what the code does and what was recorded."""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import smi_fast
from smi_fast import load_teacher, recipes
from smi_fast.ops import backends, native

ROOT = Path(__file__).parents[1]
PRIORS = ("without_prior", "with_prior")
README = (ROOT / "README.md").read_text()
FROM_PYTHON, OWN_LOOP = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def row(text: str) -> list[str]:
    """The cells of the README's table row that begins with a text."""
    line = next(line for line in README.splitlines() if line.startswith(f"| {text}"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_invert_from_python() -> None:
    names: dict[str, Any] = {}
    exec(FROM_PYTHON.replace("once(100)", "once(30), iterations=30, progress=False"), names)
    result = names["result"]
    assert result.images.shape == (3, 3, 64, 64)
    assert result.kept.shape == (3, 30) and result.confidence.shape == (3,)
    assert (result.logits.argmax(1) == result.targets).all()


def test_own_loop_leaves_stopped_pixels_alone() -> None:
    """With an optimiser that adds 1 to every pixel, a pixel counts its iterations."""
    names: dict[str, Any] = {
        "iterations": 301,
        "images": torch.zeros(1, 3, 64, 64),
        "shift": torch.ones(301, 2, dtype=torch.int64),
        "flip": torch.ones(301, dtype=torch.bool),
        "teacher": load_teacher("fashion-canvas"),
    }
    with torch.no_grad():
        exec(f"import smi_fast, torch\n{OWN_LOOP.replace('...', 'images.data += 1')}", names)
    iterations, pixels = names["images"].unique(return_counts=True)
    assert iterations.tolist() == [50, 100, 200, 300, 301]
    patches = pixels // (3 * 8 * 8)
    assert patches.tolist() == [20, 14, 9, 7, 14]


def test_reference_has_every_public_name() -> None:
    page = (ROOT / "docs/reference.md").read_text()
    entries = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    shown = {name for name in smi_fast.__all__ if isinstance(getattr(smi_fast, name), type)}
    assert {"Fourier", "SparseInverter"} <= shown <= entries
    assert {"invert", "load_cnn", "load_teacher", "by_name", *recipes._BY_NAME} <= entries


def test_table_of_backends_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    # The script takes every backend as installed; these put its changes back afterwards.
    monkeypatch.setattr(native, "WHY_NO_CPU", native.WHY_NO_CPU)
    monkeypatch.setattr(native, "WHY_NO_CUDA", native.WHY_NO_CUDA)
    monkeypatch.setattr(backends, "_HAS_TRITON", backends._HAS_TRITON)
    lines = runpy.run_path(str(ROOT / "docs" / "_backends.py"))["ops"]()
    assert "\n".join(lines) in README


def test_table_of_speed_is_what_was_recorded() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/end_to_end.json").read_text())["models"]
    models = [recorded[f"deit_{size}"] for size in ("tiny", "small", "base")]

    for text, name in (
        ("published-style dense ÷", "published_dense"),
        ("published-style sparse ÷", "published_sparse"),
        ("our dense ÷", "our_dense"),
    ):
        ratios = [m["ratios_to_our_sparse"]["whole_schedule"][name]["median"] for m in models]
        assert row(text) == [f"{ratio:.1f}" for ratio in ratios]
    hours = [
        [model["variants"][name]["images_per_hour"] for name in ("published_dense", "our_sparse")]
        for model in models
    ]
    assert row("images an hour") == [f"{dense:.0f} → {sparse:.0f}" for dense, sparse in hours]
    peaks = [m["variants"]["our_sparse"]["steps"][-1]["share_of_sgemm"]["median"] for m in models]
    assert row("needed FLOPs") == [f"{peak:.0%}".replace("%", " %") for peak in peaks]
    memory = [m["memory"]["share_of_published_dense"]["our_sparse"] for m in models]
    assert row("peak memory") == [f"{share:.2f}" for share in memory]


def test_quality_table_has_the_recorded_numbers() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["contenders"]
    for text, name in (
        ("published recipe, dense", "published, dense"),
        ("published recipe, 14", "published, 14 of 64 patches"),
        ("`recipes.clear()`, dense", "clear, dense"),
        ("`recipes.clear()`, 30", "clear, 30 of 64 patches"),
    ):
        found = recorded[name]["by_length"]
        entries = [found.get(length) for length in row("iterations |")]
        assert row(text) == [percent(e["judge"]["mean"]) if e else "–" for e in entries]


def test_page_of_quality_has_the_recorded_numbers() -> None:
    """Every table whose rows begin with a contender, for the figure that its heading names."""
    recorded = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["contenders"]
    page = (ROOT / "docs/quality.md").read_text()
    tables = re.findall(r"<!-- (\w+) -->\n\n(\|.*?)\n\n", page, re.DOTALL)
    assert [figure for figure, _ in tables] == [
        "judge",
        "second_judge",
        "judge_of_kept_patches_over_mean",
        "diversity_in_judge",
    ]
    for figure, table in tables:
        head, _, *rows = (
            [cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.split("\n")
        )
        assert len(rows) >= 3
        for name, *cells in rows:
            entries = [recorded[name]["by_length"].get(length) for length in head[1:]]
            assert cells == [cell(entry[figure]) if entry else "–" for entry in entries]


def test_page_of_quality_has_the_recorded_times() -> None:
    levels = json.loads((ROOT / "benchmarks/results/time_to_quality.json").read_text())["levels"]
    page = (ROOT / "docs/quality.md").read_text()
    lines = page.partition("<!-- time to quality -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    expected = []
    for judge, by_level in levels.items():
        for which, level in by_level.items():
            ours = level["ours"]["clear, 30 of 64 patches"]
            expected.append(
                f"| {judge.replace('_', ' ')}, its {which}: {percent(level['recognised'])} "
                f"| {level['published_iterations']} | {level['published_seconds']['median']:.3g} "
                f"| {ours['iterations']} | {ours['seconds']['median']:.2f} "
                f"| {float(format(ours['times_as_fast']['median'], '.3g')):g} |"
            )
    assert lines == expected and len(lines) == 4


FACTORS = (
    ("sparse", "judge"),
    ("sparse", "second_judge"),
    ("sparse", "judge_of_kept_patches_over_mean"),
    ("sparse", "diversity_in_judge"),
    ("dense", "judge"),
    ("dense", "second_judge"),
)
JUDGES = ("judge", "second_judge", "judge_of_kept_patches_over_mean")


def test_page_of_quality_has_the_recorded_factors() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/factors.json").read_text())
    rows = table("recorded factors")
    assert [name for name, *_ in rows] == [*recorded["sparse"]]
    for name, *cells in rows:
        entries = [recorded[which].get(name, {}).get(figure) for which, figure in FACTORS]
        assert cells == [percent(entry["mean"]) if entry else "–" for entry in entries]


def test_page_of_quality_has_the_recorded_other_teachers() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/other_teachers.json").read_text())["teachers"]
    rows = table("other teachers")
    expected = [
        [teacher, contender, *(cell(entry[figure]) for figure in JUDGES)]
        for teacher, found in recorded.items()
        for contender, entry in found["contenders"].items()
    ]
    assert rows == expected


def test_page_of_quality_has_the_recorded_precisions() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/precisions.json").read_text())["teachers"]
    figures = (*JUDGES, "teacher_of_kept_patches", "confidence_of_kept_patches")
    expected = []
    for teacher, found in recorded.items():
        for contender, entry in found.items():
            changes = [entry["bfloat16 against float32"][figure] for figure in figures]
            same = [percent(share) for share in entry["same_patches"].values()]
            cells = [points(row["difference"]) + f" ({100 * row['spread']:.1f})" for row in changes]
            expected.append([teacher, contender, *cells, f"{same[0]} ({same[1]})"])
    assert table("recorded precisions") == expected and len(expected) == 6


def points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−") if round(100 * share, 1) else "0.0"


def test_page_of_quality_has_the_recorded_ranks() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/photographs.json").read_text())
    expected = []
    for name, found in recorded.items():
        if isinstance(found, dict) and "whole" in found:
            whole, kept = found["whole"], found["kept_patches_over_mean"]
            ranks = (whole["mean_rank"], whole["median_rank"], kept["mean_rank"])
            expected.append([name, *(f"{rank:.0f}" for rank in ranks)])
    assert table("recorded ranks") == expected and len(expected) == 9


def test_page_of_measuring_has_the_recorded_yardstick() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/yardstick.json").read_text())["models"]
    phases = [recorded[f"deit_{size}"]["phases"] for size in ("tiny", "small", "base")]
    rows = table("recorded yardstick", "measuring")
    assert [name for name, *_ in rows] == [name for name in phases[0] if name != "196 patches"]
    for name, *cells in rows:
        assert cells == [f"{phase[name]['ratio']['median']:.2f}" for phase in phases]


def test_page_of_measuring_has_the_recorded_threads() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/scaling.json").read_text())["models"]
    models = [recorded[f"deit_{size}"] for size in ("tiny", "small", "base")]
    expected = []
    for precision in ("float32", "bfloat16"):
        found = [model[precision] for model in models]
        two = [entry["speedup"]["2"]["whole"]["median"] for entry in found]
        expected.append([f"{precision}, 2 threads, measured", *(f"{each:.2f}" for each in two)])
        for threads in ("8", "16"):
            on_paper = [f"{entry['on_paper'][threads]:.1f}" for entry in found]
            expected.append([f"{precision}, {threads} threads, on paper", *on_paper])
    assert table("recorded threads", "measuring") == expected


def test_page_of_calibration_has_the_recorded_accuracies() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/quantise.json").read_text())["quantised"]
    expected = [
        [source, *(around_mean(by_source[source]) for by_source in recorded.values())]
        for source in recorded["W2, GPTQ"]
    ]
    assert table("quantise", "calibration") == expected and len(expected) == 10


def test_page_of_results_has_the_recorded_shares() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/independent_judge.json").read_text())
    rows = {
        "judge": (
            ("dense", "dense", "judge"),
            ("sparse, whole image", "sparse", "judge"),
            ("sparse, the 14 kept patches only", "sparse", "judge_of_kept_patches"),
        ),
        "teacher": (
            ("dense", "dense", "teacher"),
            ("sparse, the 14 kept patches only", "sparse", "teacher"),
        ),
    }
    for name, lines in rows.items():
        expected = [
            [line, *(percent(recorded[kind][prior][key]) for prior in PRIORS)]
            for line, kind, key in lines
        ]
        assert table(name, "results") == expected


def test_page_of_schedules_has_the_recorded_speed() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/schedule_speed.json").read_text())
    tiny, small = (recorded["models"][name]["loops"] for name in ("deit_tiny", "deit_small"))
    expected = []
    for name in tiny:
        cells = []
        for loops in (tiny, small):
            found = loops[name]
            cells += [f"{found['seconds_per_image']['median']:g}"]
            cells += [f"{found['times_as_fast']['median']:.1f}"]
        share = recorded["memory"].get(name)
        expected.append(
            [name, *cells, f"{share['share_of_dense']:.2f}" if share else "not measured"]
        )
    assert table("schedule speed", "schedules") == expected and len(expected) == 9


def test_page_of_schedules_has_the_recorded_shares() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/schedules.json").read_text())
    expected = []
    for name, by_length in recorded["contenders"].items():
        cells = []
        for length in ("100", "400"):
            found = by_length[length]
            cells.append(f"{found['seconds_per_image']:.3g}")
            cells += [
                percent(found[key]["mean"]) for key in ("judge", "judge_of_kept_patches_over_mean")
            ]
        least = recorded["seconds_per_image_until_recognised"][name]
        until = f"{least['seconds']:.3g} ({least['iterations']} iterations)" if least else None
        expected.append([name, *cells, until or "not reached"])
    assert table("schedules", "schedules") == expected and len(expected) == 16
    assert recorded["idle"] and len(recorded["seeds"]) == 3


def test_page_of_schedules_has_the_recorded_uneven_batches() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/uneven_batches.json").read_text())
    expected = [
        [f"ragged, {model}, {recipe} recipe", with_quartiles(found["over_fixed"])]
        for model, by_recipe in recorded["ragged"].items()
        for recipe, found in by_recipe.items()
    ]
    expected += [
        [f"refilled, {model}, {found['places']} places", with_quartiles(found["over_full"])]
        for model, found in recorded["refilled"].items()
    ]
    assert table("uneven", "schedules") == expected and len(expected) == 6


def with_quartiles(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['median']:.2f} ({low:.2f} to {high:.2f})"


def around_mean(found: dict[str, Any]) -> str:
    """The mean in percent, and of several seeds how far they go from it."""
    mean, seeds = found["mean"], found["seeds"]
    far = max(abs(seed - mean) for seed in seeds)
    return f"{100 * mean:.1f}" + (f" ± {100 * far:.1f}" if len(seeds) > 1 else "")


def table(name: str, page: str = "quality") -> list[list[str]]:
    """The cells of a table on a page, without its head."""
    text = (ROOT / f"docs/{page}.md").read_text()
    lines = text.partition(f"<!-- {name} -->\n\n")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def cell(found: dict[str, Any]) -> str:
    return percent(found["mean"]) + around(found["seeds"])


def percent(share: float) -> str:
    return f"{math.floor(100 * share + 0.5)} %"


def around(shares: list[float]) -> str:
    """The least and the greatest of the seeds, where they differ."""
    low, high = (math.floor(100 * edge(shares) + 0.5) for edge in (min, max))
    return f" ({low}–{high})" if low < high else ""


def test_pages_can_be_built(tmp_path: Path) -> None:
    """With every link, every table, and every name of the reference."""
    pytest.importorskip("mkdocs", reason="needs the extra smi-fast[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    reference = (tmp_path / "reference" / "index.html").read_text()
    assert "SparseInverter" in reference and not re.search(r":(class|func|mod):|::</p>", reference)
    assert "bf16" in (tmp_path / "backends" / "index.html").read_text()
