"""The study of quality: images that stay in a folder, what judges are shown, and levels reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.quality import factors, other_teachers, precisions, recognition
from benchmarks.quality.images import Contender, Images, Run, images_of, make
from benchmarks.quality.time_to_quality import DENSE, OURS, levels, phases_of, shortest
from benchmarks.quality.verdicts import load_judges, verdict, within_class
from smi_fast import SparseViT, load_teacher
from smi_fast.inversion.state import InversionState


@pytest.fixture(scope="module")
def teacher() -> SparseViT:
    return SparseViT(load_teacher("fashion-canvas"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUALITY_IMAGES", str(tmp_path / "images"))
    return tmp_path / "images"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of the iterations taken."""
    taken: list[int] = []
    evaluate = InversionState.evaluate

    def counted(state: InversionState, *, score: bool = False, number: int = 0) -> Any:
        taken.append(number)
        return evaluate(state, score=score, number=number)

    monkeypatch.setattr(InversionState, "evaluate", counted)
    return taken


def dense(longest: int) -> Contender:
    return Contender(options=recognition.clear_dense, longest=longest)


def test_a_dense_run_is_taken_up_where_it_was_left(
    teacher: SparseViT, folder: Path, steps: list[int]
) -> None:
    short, long = (Run("a, dense", dense(8), length, 0, 1) for length in (2, 4))
    make(teacher, [short, long])
    assert steps == [0, 1, 2, 3]
    again = Run("another, dense", dense(8), 4, 0, 1)
    assert torch.equal(images_of(teacher, long).pixels, images_of(teacher, again).pixels)
    made = images_of(teacher, short)
    assert made.pixels.shape == (10, 3, 64, 64) and made.masks.all() and made.commit
    assert len(steps) == 8


def test_a_shorter_dense_run_than_the_saved_state_starts_anew(
    teacher: SparseViT, steps: list[int]
) -> None:
    make(teacher, [Run("a", dense(8), length, 0, 1) for length in (4, 2)])
    assert steps == [0, 1, 2, 3, 0, 1]


def test_own_jitter_differs_between_images_and_stays_still_around_a_stop(
    teacher: SparseViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts: list[torch.Tensor] = []
    forward = SparseViT.forward

    def watched(self: SparseViT, *args: Any, jitter: Any = None, **options: Any) -> Any:
        if jitter is not None:
            shifts.append(jitter[0])
        return forward(self, *args, jitter=jitter, **options)

    monkeypatch.setattr(SparseViT, "forward", watched)
    own = factors.contenders()["sparse"]["default"]
    made = images_of(teacher, Run("own", own, 100, 0, 1))
    assert (made.masks.sum((1, 2)) == 30).all()
    several = [len(shift.unique(dim=0)) > 1 for shift in shifts[7:13]]
    assert several == [True, True, False, False, True, True]
    assert all(shift.shape == (10, 2) for shift in shifts)


def test_distance_within_a_class_leaves_out_an_image_and_itself() -> None:
    found = torch.zeros(20, 2)
    found[::2, 0] = 3.0
    labels = torch.arange(10).repeat_interleave(2)
    assert within_class(found, labels) == pytest.approx(3.0)


def test_a_verdict_is_about_the_wanted_class() -> None:
    wanted = torch.arange(10).repeat_interleave(2)
    logits = torch.nn.functional.one_hot(wanted, 10).float()
    logits[0] = 0
    logits[0, 9] = 1
    masks = torch.ones(20, 8, 8, dtype=torch.bool)
    images = Images(torch.rand(20, 3, 64, 64), masks, logits, wanted, "commit")
    judges = load_judges()
    found = verdict(judges, {"judge": 0.5, "second_judge": 0.25}, images)
    assert found["teacher_of_kept_patches"] == 0.95
    assert found["judge"] == found["judge_of_kept_patches_over_mean"]
    assert verdict(judges, {"judge": 1.0, "second_judge": 0.25}, images)[
        "diversity_in_judge"
    ] == pytest.approx(found["diversity_in_judge"] / 2, abs=1e-4)


def entries(**shares: float) -> dict[str, Any]:
    return {length.strip("_"): {"judge": {"mean": share}} for length, share in shares.items()}


def test_a_level_is_reached_at_the_shortest_measured_length() -> None:
    assert shortest(entries(_5=0.2, _10=0.6, _25=0.5, _50=0.7), "judge", 0.6) == 10
    assert shortest(entries(_5=0.2), "judge", 0.6) is None
    ours = {name: entries(_5=0.3, _10=0.5, _15=0.6) for name in OURS}
    found = levels({DENSE: entries(_25=0.2, _400=0.6, _4000=0.45), **ours}, "judge")
    assert found["best"]["published_iterations"] == 400
    assert found["last"]["recognised"] == 0.45
    assert found["best"]["our_iterations"] == dict.fromkeys(OURS, 15)
    assert found["last"]["our_iterations"] == dict.fromkeys(OURS, 10)


def test_phases_of_a_run() -> None:
    assert phases_of("clear, dense", 25) == [(64, 25)]
    assert phases_of("clear, 30 of 64 patches", 100) == [(64, 10), (30, 90)]


def test_both_studies_have_runs_of_their_own() -> None:
    for runs in ([*recognition.runs()], [*factors.runs()]):
        assert len({run.path() for run in runs}) == len(runs)
    assert not set(recognition.SEEDS) & set(factors.SEEDS)


def test_another_teacher_is_trained_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def run(training: other_teachers.Training) -> VisionTransformer:
        made.append(VisionTransformer(**training.config))
        return made[-1]

    monkeypatch.setattr(other_teachers.Training, "run", run)
    first, again = (
        other_teachers.trained(other_teachers.QUICK, folder / "a.teacher") for _ in range(2)
    )
    assert len(made) == 1
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(SparseViT(first)(images).logits, SparseViT(again)(images).logits)
    assert not first.training and not any(p.requires_grad for p in first.parameters())


def test_what_was_recorded_with_the_same_settings_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "quality.json"
    monkeypatch.setattr(recognition, "result_file", lambda name: file)
    assert recognition._recorded() == {}

    found = {
        name: {
            "settings": recognition.settings_of(contender),
            "by_length": {str(length): {} for length in recognition.lengths_of(name)},
        }
        for name, contender in recognition.CONTENDERS.items()
    }
    found["clear, dense"]["settings"] = {**found["clear, dense"]["settings"], "lr": "7"}
    del found["published, dense"]["by_length"]["25"]
    file.write_text(json.dumps({"contenders": found}))
    kept = set(recognition.CONTENDERS) - {"clear, dense", "published, dense"}
    assert set(recognition._recorded()) == kept


def test_the_confidence_is_the_float32_teachers_on_kept_patches_alone(teacher: SparseViT) -> None:
    masks = torch.zeros(10, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 1:6] = True
    pixels, wanted = torch.rand(10, 3, 64, 64), torch.arange(10)
    images = Images(pixels, masks, torch.zeros(10, 10), wanted, "commit")
    pixels_of_kept = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    hidden = Images(torch.where(pixels_of_kept, pixels, 0), masks, images.logits, wanted, "commit")
    sure, reached = precisions.confidence(teacher, images)
    assert (sure, reached) == precisions.confidence(teacher, hidden)
    kept = torch.tensor([8 * row + column for row in range(2, 5) for column in range(1, 6)])
    logits = teacher(precisions.normalise(pixels), kept.expand(10, -1)).logits
    assert sure == pytest.approx(logits.softmax(1).diagonal().mean().item(), abs=1e-4)
    assert reached == pytest.approx((logits.argmax(1) == wanted).float().mean().item())


def test_what_bfloat16_changes_is_beside_what_seeds_change() -> None:
    one, other = torch.zeros(2, 2, 2, dtype=torch.bool), torch.ones(2, 2, 2, dtype=torch.bool)
    one[:, 0] = True
    other[0, 0] = False
    assert precisions.same_patches(one, other) == 0.5
    found = {
        "float32": [{"judge": 0.5}, {"judge": 0.9}],
        "bfloat16": [{"judge": 0.6}, {"judge": 0.6}],
    }
    assert precisions.compared(found) == {"judge": {"difference": -0.1, "spread": 0.4}}
