"""The study of schedules: what is made and timed for a fixed number of images."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.schedules import contenders, deit, speed, study, timed
from benchmarks.schedules.contenders import CONTENDERS, Contender, Made
from benchmarks.schedules.timed import Job
from benchmarks.speed.loops import PhaseSeconds, Workload
from smi_fast import (
    Dense,
    PatchRebirth,
    SparseInverter,
    SparseViT,
    StopSchedule,
    load_teacher,
    recipes,
)

T = 8
STOPS = StopSchedule((2, 4), (0.5, 0.5))
WANTED = torch.tensor([3, 5])


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return load_teacher("fashion-canvas")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUALITY_IMAGES", str(tmp_path / "images"))
    return tmp_path / "images"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(prepare: Any, vit: VisionTransformer) -> Made:
    return prepare(vit, T)(WANTED, seeded())


@pytest.mark.parametrize("reranked", [False, True])
def test_published_images_and_masks_are_those_of_the_faithful_mode(
    vit: VisionTransformer, reranked: bool
) -> None:
    found = run(partial(contenders.published, lambda _: STOPS, reranked), vit)
    options = recipes.smi().options(iterations=T, schedule=STOPS, background="regularized")
    mask = "reranked" if reranked else "kept"
    result = SparseInverter(vit, **options, final_mask=mask).invert(
        WANTED, generator=seeded(), progress=False
    )
    torch.testing.assert_close(found.pixels, result.images, rtol=0, atol=1e-3)
    assert torch.equal(found.masks, result.masks)
    assert found.patch_iterations == 2 * 64 + 2 * 32 + 4 * 16
    assert found.updates.tolist() == [T, T]
    if not reranked:
        torch.testing.assert_close(found.logits, result.logits, rtol=0, atol=1e-2)


def test_rebirth_gives_several_images_of_a_trajectory(vit: VisionTransformer) -> None:
    found = run(CONTENDERS["rebirth, v = 4"].prepare, vit)
    assert found.wanted.tolist() == [3] * 4 + [5] * 4
    assert found.updates.tolist() == [2, 4, 6, 8] * 2
    assert (found.masks.view(2, 4, 8, 8).sum(1) == 1).all()
    assert found.patch_iterations == 2 * (64 + 48 + 32 + 16)


def test_a_ragged_run_counts_what_each_image_keeps(vit: VisionTransformer) -> None:
    found = run(CONTENDERS["mass"].prepare, vit)
    kept = found.masks.sum((1, 2)).double().mean().item()
    assert 0 < kept < 64 and found.wanted.tolist() == [3, 5]
    assert found.patch_iterations == 64 + round(7 * kept) and found.updates.tolist() == [T, T]


def test_logits_of_a_narrowed_run_are_those_of_the_whole_network(vit: VisionTransformer) -> None:
    narrow, whole = (run(CONTENDERS[name].prepare, vit) for name in ("default, narrow", "default"))
    assert not torch.equal(narrow.pixels, whole.pixels)
    teacher = SparseViT(vit)
    images = (narrow.pixels - torch.tensor(vit.pretrained_cfg["mean"])[:, None, None]) / (
        torch.tensor(vit.pretrained_cfg["std"])[:, None, None]
    )
    kept = narrow.masks.flatten(1).nonzero()[:, 1].view(2, -1)
    torch.testing.assert_close(narrow.logits, teacher(images, kept).logits, rtol=0, atol=1e-3)


def test_snapshots_are_dense_images_at_the_times_of_rebirth(vit: VisionTransformer) -> None:
    found = run(CONTENDERS["dense, 4 snapshots"].prepare, vit)
    options = recipes.clear().options(iterations=T, schedule=Dense())
    inverter, frames = SparseInverter(vit, **options), []

    def callback(number: int, images: Tensor, kept: Tensor) -> None:
        frames.append(inverter.settings.space.denormalize(images.clone()))

    result = inverter.invert(WANTED, generator=seeded(), progress=False, callback=callback)
    for image in range(2):
        for index, number in enumerate((2, 4, 6, 8)):
            assert torch.equal(found.pixels[4 * image + index], frames[number - 1][image])
    torch.testing.assert_close(found.logits[3::4], result.logits)
    assert found.masks.all() and found.wanted.tolist() == [3] * 4 + [5] * 4
    assert found.updates.tolist() == [2, 4, 6, 8] * 2 and found.patch_iterations == 64 * T


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A contender of three images of a trajectory; (iterations, trajectories) of its runs."""
    runs: list[tuple[int, int]] = []

    def prepare(vit: VisionTransformer, iterations: int) -> Any:
        def make(targets: Tensor, generator: torch.Generator) -> Made:
            runs.append((iterations, len(targets)))
            count = 3 * len(targets)
            return Made(
                torch.rand(count, 3, 16, 16, generator=generator),
                torch.ones(count, 2, 2, dtype=torch.bool),
                torch.zeros(count, 10),
                targets.repeat_interleave(3),
                torch.full((count,), iterations),
                4 * iterations,
            )

        return make

    monkeypatch.setitem(timed.CONTENDERS, "made up", Contender(prepare=prepare, images=3))
    return runs


def test_a_job_is_timed_once_and_gives_the_images_that_were_asked_for(
    vit: VisionTransformer, made_up: list[tuple[int, int]]
) -> None:
    job = Job("made up", 25, 7, 10)
    first, again = timed.timed(vit, job), timed.timed(vit, job)
    # A short run comes first, which isn't timed.
    assert made_up == [(timed.SHORT, 2), (25, math.ceil(10 / 3))]
    assert len(first.images.pixels) == len(first.updates) == 10
    assert first.images.wanted.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3]
    assert torch.equal(first.images.pixels, again.images.pixels)
    assert 0 < first.seconds == again.seconds and first.patch_iterations == 100
    timed.timed(vit, Job("made up", 25, 8, 10))
    assert len(made_up) == 4


def test_figures_are_those_of_an_image(
    vit: VisionTransformer, made_up: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*CONTENDERS]:
        monkeypatch.delitem(timed.CONTENDERS, name) if name != "made up" else None
    monkeypatch.setattr(study, "real_canvases", lambda *_: ({}, {"judge": 1.0}))
    monkeypatch.setattr(study, "load_judges", dict)
    monkeypatch.setattr(study, "entry", lambda *_: {"judge": 0.5})
    measured = study.measure(quick=True)
    (found,) = measured["contenders"].values()
    assert found["14"]["trajectories"] == 24  # of three images each, for 70
    assert found["14"]["patch_updates_per_image"] == pytest.approx(4 * 14 * 24 / 70, rel=1e-3)
    assert found["14"]["updates_of_a_shown_patch"] == 14
    assert found["14"]["judge"] == {"mean": 0.5, "seeds": [0.5]}
    assert found["14"]["seconds_per_image"] > 0


def test_jobs_have_files_of_their_own_and_take_turns() -> None:
    jobs = [*study.jobs()]
    assert len({job.path for job in jobs}) == len(jobs)
    assert {job.name for job in jobs} == {*CONTENDERS}
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    assert {job.images for job in jobs} == {128}
    assert Job("rebirth, v = 7", 100, 0, 128).trajectories == 19
    assert [job.iterations for job in jobs if job.name == "published, dense"] == [100, 400] * 3


def test_the_price_is_the_least_of_the_lengths_that_reach_the_level() -> None:
    def entry(seconds: float, judge: float) -> dict[str, Any]:
        return {"seconds_per_image": seconds, "judge": {"mean": judge}}

    measured = {
        "a": {"10": entry(1, 0.8), "20": entry(2, 0.9), "40": entry(4, 0.95)},
        "b": {"10": entry(1, 0.7)},
    }
    found = study.price(measured, 0.85)
    assert found["a"] == {"seconds": 2, "iterations": 20} and found["b"] is None


def test_every_contender_has_a_colour_of_its_own() -> None:
    figures = {"judge": 0.5, "judge_of_kept_patches_over_mean": 0.4}
    means = {name: {"mean": value} for name, value in figures.items()}
    entry = {"seconds_per_image": 0.1, **means}
    panels = study.draw({name: {"25": entry} for name in CONTENDERS}, 0.8).axes
    for axes, height in zip(panels, (0.5, 0.4), strict=True):
        lines = axes.lines[: len(CONTENDERS)]
        assert len({line.get_color() for line in lines}) == len(CONTENDERS)
        assert {(*line.get_xdata(), *line.get_ydata()) for line in lines} == {(0.1, height)}


def test_memory_is_a_share_of_our_dense_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"dense": 200_000_000, "rebirth, v = 4": 50_000_000}
    monkeypatch.setattr(speed, "in_new_process", lambda function, name, images: peaks[name])
    found = speed.memory(peaks, 128)
    assert found["rebirth, v = 4"] == {"peak_mb": 50.0, "share_of_dense": 0.25}


def test_phases_of_small_images_have_fewer_patches() -> None:
    schedule = deit.TIMINGS["resolution"].schedule(400)
    assert deit.phases_of(schedule, 400, (224, 224), 16) == [(49, 40), (92, 360)]
    assert deit.phases_of(StopSchedule.once(400), 400, (224, 224), 16) == [(196, 40), (92, 360)]
    assert deit.phases_of(PatchRebirth(2).bind(400), 400, (224, 224), 16) == [(196, 200), (98, 200)]


def test_a_block_of_small_images_runs() -> None:
    vit = VisionTransformer(patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    workload = Workload(vit.eval(), torch.tensor([1, 4]), torch.randn(2, 3, 224, 224))
    schedule, iterations = deit.TIMINGS["resolution"].block(400)
    kept = []
    deit.TIMINGS["resolution"].loop(workload)(
        schedule, iterations, lambda _, images, patches: kept.append(patches.shape[1])
    )
    assert kept == [49] * 16 + [92] * 16


def test_seconds_per_image_are_composed_of_the_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = VisionTransformer(
        img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    ).eval()
    workload = Workload(vit, torch.tensor([1, 4]), torch.randn(2, 3, 32, 48))
    blocks = []

    def time_phases(loop: Any, schedule: Any, iterations: int, early: int) -> Any:
        blocks.append((schedule, iterations))
        counts = (24, *schedule.counts(24))
        return {patches: PhaseSeconds((1.0,) * early, patches / 100) for patches in counts}

    monkeypatch.setattr(deit, "time_phases", time_phases)
    measured = deit.measure(workload, 400, 2, ("published, dense", "dense", "rebirth, v = 2"))
    loops = measured["loops"]
    assert blocks[2] == (PatchRebirth(2, at=(16,)), 32) and blocks[0][1] == 4
    dense = (1 + 399 * 0.24) / 2
    reborn = (26 + 187 * 0.24 + 187 * 0.12) / 4
    assert loops["published, dense"]["seconds_per_image"]["median"] == pytest.approx(dense, 1e-3)
    found = loops["rebirth, v = 2"]
    assert found["seconds_per_image"]["median"] == pytest.approx(reborn, rel=1e-3)
    assert found["times_as_fast"]["median"] == pytest.approx(dense / reborn, rel=1e-3)
    assert found["patch_updates_per_image"] == (200 * 24 + 200 * 12) / 2
