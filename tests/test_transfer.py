"""The transfer benchmark: its sources, its students, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fashion_canvas.train_teacher import GRID
from benchmarks.transfer import closed_loop, sources, study
from benchmarks.transfer.sources import Pictures
from benchmarks.transfer.students import PATCH, STUDENTS, Training, batches, moved
from benchmarks.transfer.study import Trial, trials
from smi_fast import SparseViT, load_teacher
from smi_fast.background import over


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUALITY_IMAGES", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def teacher() -> SparseViT:
    return SparseViT(load_teacher("fashion-canvas"))


def pictures(count: int, kept: int = GRID**2) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    side = GRID * PATCH
    order = torch.rand(count, GRID**2, generator=generator).argsort(1)
    pixels = torch.rand(count, 3, side, side, generator=generator)
    return Pictures(pixels, (order < kept).view(count, GRID, GRID))


def test_masks_move_with_their_images() -> None:
    made = pictures(4, kept=20)
    black = over(made.pixels, made.masks, "black")
    seen = set()
    for seed in range(20):
        images, masks = moved(black, made.masks, torch.Generator().manual_seed(seed))
        assert torch.equal(images, over(images, masks, "black"))
        assert not images.isclose(over(images, ~masks, "black")).all()
        seen.add(tuple(masks.flatten().tolist()))
    assert len(seen) > 9  # of eighteen ways


def test_batches_take_each_image_once_before_one_comes_again() -> None:
    taken = torch.cat([*batches(128, 4, torch.Generator().manual_seed(0))])
    assert [part.unique().numel() for part in taken.split(128)] == [128, 128]
    assert [len(batch) for batch in batches(5, 3, torch.Generator())] == [5, 5, 5]


def test_fewer_images_are_the_first_ones() -> None:
    made = pictures(4)
    assert torch.equal(made.first(1).pixels, made.pixels[:1]) and len(made.first(1).masks) == 1


def test_images_cost_what_their_schedule_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "result_file", lambda name: tmp_path / name)
    assert study._seconds_of("default", 400, study._prices()) is None
    found = {"default": {"100": {"seconds_per_image": 0.05}}, "rebirth, v = 4": {"200": {}}}
    (tmp_path / "schedules.json").write_text(json.dumps({"contenders": found}))
    prices = study._prices()
    for shown in ("whole", "tokens", "mean"):
        trial = Trial("default", shown, "CNN", 400, 0, 600)
        assert study._seconds_of(trial.source, 400, prices) == 20
    assert study._seconds_of("real", 400, prices) is None
    assert study._seconds_of(study.CLOSED_LOOP, 400, prices) is None
    assert {*sources.ITERATIONS.values()} <= {100, 200, 400}


def test_a_step_on_tokens_takes_less_time(teacher: SparseViT) -> None:
    made = study.Study.__new__(study.Study)
    made.teacher, made.pictures = teacher, lambda *_: pictures(64, kept=16)
    found = study.time_on_tokens(made, 64, 1)
    assert (found["kept"], found["of"]) == (16, 64) and found["over_whole"]["median"] < 0.8


def test_sources_without_a_teacher_differ_by_seed_and_keep_every_patch() -> None:
    vit = load_teacher("fashion-canvas")
    for name in ("Gaussian noise", "1/f noise"):
        first, again, other = (sources.SOURCES[name](vit, 3, seed) for seed in (0, 0, 1))
        assert torch.equal(first.pixels, again.pixels) and first.masks.all()
        assert not torch.equal(first.pixels, other.pixels)
        assert first.pixels.min() >= 0 and first.pixels.max() <= 1
        neighbours = first.pixels.diff(dim=3).square().mean() / first.pixels.var()
        assert (neighbours > 1) == (name == "Gaussian noise")  # 1/f noise is smooth


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_learns_its_teacher(teacher: SparseViT, name: str) -> None:
    """On a few images that it sees again and again it agrees with the teacher soon."""
    made = pictures(8, kept=30)
    training = Training(STUDENTS[name], teacher, 40, seed=0)
    losses = []
    step = training._step

    def watched(images: Tensor, masks: Tensor) -> None:
        step(images, masks)
        losses.append(distance(training, teacher, images, masks))

    training._step = watched  # type: ignore[method-assign]
    training.learn(made, None, 40)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def distance(training: Training, teacher: SparseViT, images: Tensor, masks: Tensor) -> float:
    with torch.no_grad():
        kept = masks.flatten(1).nonzero()[:, 1].view(len(masks), -1)
        kept = kept if training._on_tokens else None
        wanted = teacher(images, kept).logits.softmax(1)
        found = training._logits(images, kept).log_softmax(1)
        return torch.nn.functional.kl_div(found, wanted, reduction="batchmean").item()


def test_a_student_on_tokens_sees_no_other_patch(teacher: SparseViT) -> None:
    made = pictures(4, kept=10)
    other = Pictures(over(made.pixels, made.masks, "black"), made.masks)
    found = []
    for given in (made, other):
        training = Training(STUDENTS["ViT on kept tokens"], teacher, 3, seed=0)
        training.learn(given, None, 3)
        found.append(torch.cat([p.detach().flatten() for p in training.student.parameters()]))
    torch.testing.assert_close(*found)


def test_the_closed_loop_goes_on_with_images_of_its_student(
    teacher: SparseViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed_loop, "ITERATIONS", 6)
    training, made = closed_loop.trained("CNN", teacher, 8, 4, seed=0)
    assert len(made.pixels) == 8
    assert training._rate.last_epoch == 4
    first = closed_loop.trained("CNN", teacher, 8, 4, seed=0)[1]
    torch.testing.assert_close(first.pixels[:2], made.pixels[:2])


def test_trials_differ_and_are_not_run_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for quick in (False, True):
        every = [*trials(quick)]
        assert len({trial.path for trial in every}) == len(every)
    runs: list[Trial] = []

    def run(self: object, trial: Trial) -> dict[str, Any]:
        runs.append(trial)
        return {"accuracy": 0.5, "commits": []}

    monkeypatch.setattr(study.Study, "_run", run)
    monkeypatch.setattr(study.Study, "__init__", lambda self: None)
    trial = next(trials(quick=True))
    made = study.Study()  # type: ignore[call-arg]
    assert made.found(trial) == made.found(trial) and runs == [trial]
    assert json.loads(trial.path.read_text())["accuracy"] == 0.5


def test_the_picture_has_a_curve_for_each_timed_source() -> None:
    def entry(accuracy: float, seconds: float | None) -> dict[str, Any]:
        return {"accuracy": {"mean": accuracy}, "synthesis_seconds": seconds}

    rows = {
        "default": {"400": entry(0.6, 4.0), "100": entry(0.4, 1.0)},
        "real": {"400": entry(0.7, None)},
    }
    (axes,) = study.draw(rows, 0.88).axes
    curve, ceiling = axes.lines
    assert [*curve.get_xdata()] == [1.0, 4.0] and [*curve.get_ydata()] == [0.4, 0.6]
    assert curve.get_label() == "default" and ceiling.get_ydata()[0] == 0.88
