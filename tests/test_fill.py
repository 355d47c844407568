"""Filling a pool from Python: batches, seeds, what its images and records are."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import (
    CrossEntropy,
    EarlyFinish,
    InversionResult,
    MassSchedule,
    NonFiniteLoss,
    PatchRebirth,
    ResolutionSchedule,
    Schedule,
    SparseInverter,
    recipes,
    workers,
)
from smi_fast.fill import fill
from smi_fast.pool import LOSS_CURVES, SECONDS, Pool, PoolError
from smi_fast.provenance import describe, versions
from tests.helpers.fills import LABELS, REBIRTH, filled, quick
from tests.helpers.inversions import make
from tests.helpers.pools import SETTINGS, files, read


def test_each_batch_is_its_inversion(teacher: VisionTransformer, tmp_path: Path) -> None:
    inverter = make(teacher)
    pool = filled(tmp_path, inverter, "blurred", seed=3, provenance={"by": "a test"})
    records = pool.records
    assert [record["label"] for record in records] == list(LABELS)
    assert [record["class_name"] for record in records] == ["e", "a", "a", "c", "d"]
    assert all((record["seed"], record["by"]) == (3, "a test") for record in records)
    assert all((r["iterations"], len(r["kept"])) == (10, 6) for r in records)
    described = describe(inverter)
    for key in ("teacher_sha256", "schedule", "parametrization", "precision", "backend"):
        assert {record[key] for record in records} == {described[key]}
    assert records[0]["versions"] == versions()
    assert [(r["batch"], r["batch_size"]) for r in records] == [
        (0, 2),
        (0, 2),
        (1, 2),
        (1, 2),
        (2, 1),
    ]
    lines = (tmp_path / SECONDS).read_text().splitlines()
    assert [json.loads(line)["batch"] for line in lines] == [0, 1, 2]
    assert all(json.loads(line)["seconds"] > 0 for line in lines)
    assert (tmp_path / LOSS_CURVES).exists()
    for start in (0, 2, 4):
        generator = torch.Generator().manual_seed((3 << 32) + start)
        labels = LABELS[start : start + 2]
        expected = inverter.invert(labels, generator=generator, progress=False)
        images, masked = (
            (pixels.float() * 255).round().permute(0, 2, 3, 1).numpy()
            for pixels in (expected.images, expected.over("blurred"))
        )
        for record, image, shown, kept, confidence, prediction in zip(
            records[start : start + 2],
            images,
            masked,
            expected.kept.tolist(),
            expected.confidence.tolist(),
            expected.logits.argmax(1).tolist(),
            strict=True,
        ):
            np.testing.assert_array_equal(read(tmp_path / record["file_name"]), image)
            np.testing.assert_array_equal(read(tmp_path / record["masked_file_name"]), shown)
            assert record["kept"] == kept
            assert (record["confidence"], record["prediction"]) == (confidence, prediction)


@quick
def test_labels_are_classes_of_the_pool(teacher: VisionTransformer, tmp_path: Path) -> None:
    with Pool.create(tmp_path, SETTINGS, ["a", "b", "c", "d"]) as pool:
        with pytest.raises(ValueError, match=r"expected labels in 0..3, got 4"):
            fill(pool, make(teacher), LABELS, recipe=recipes.smi())
        assert pool.records == []


@quick
def test_targets_are_those_of_the_recipe(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverter, got = make(teacher), []
    invert = inverter.invert

    def noted(targets: Tensor, **options: object) -> InversionResult:
        got.append(targets)
        return invert(targets, **options)

    monkeypatch.setattr(SparseInverter, "invert", staticmethod(noted))
    filled(tmp_path, inverter, recipe=recipes.sardfq())
    assert [targets.shape for targets in got] == [(2, 5), (2, 5), (1, 5)]
    assert torch.cat(got).argmax(1).tolist() == list(LABELS)


@quick
def test_patch_rebirth_gives_images_with_the_same_label(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    """Nine images of three labels take five trajectories of three, or of what is left."""
    inverter = make(teacher, schedule=PatchRebirth(3))
    pool = filled(tmp_path, inverter, labels=REBIRTH, strip=1, seed=3)
    records = pool.records
    assert [record["label"] for record in records] == list(REBIRTH)
    assert [record["trajectory"] for record in records] == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    assert [record["iterations"] for record in records] == [3, 6, 10, 3, 6, 3, 6, 10, 3]
    assert [record["batch_size"] for record in records] == [5] * 5 + [4] * 4
    for start, labels, rows in ((0, [4, 0], [0, 1, 2, 3, 4]), (5, [1, 1], [0, 1, 2, 3])):
        generator = torch.Generator().manual_seed((3 << 32) + start)
        found = inverter.invert(labels, generator=generator, progress=False).sparse_images()
        masked = (found.over("mean") * 255).round().permute(0, 2, 3, 1).numpy()
        for record, row in zip(records[start:], rows, strict=False):
            assert record["kept"] == found.kept[row].tolist()
            assert record["confidence"] == found.confidence[row].item()
            assert record["prediction"] == found.logits[row].argmax().item()
            np.testing.assert_array_equal(read(tmp_path / record["masked_file_name"]), masked[row])
            strip = read(tmp_path / f"report/progress/{record['index']:06}.png")
            np.testing.assert_array_equal(strip, read(tmp_path / record["file_name"]))


@quick
@pytest.mark.parametrize(
    "schedule", [MassSchedule(0.4, at=(3,)), ResolutionSchedule((24, 48), at=(3,), keep=0.3)]
)
def test_a_pool_has_the_patches_that_each_image_keeps(
    teacher: VisionTransformer, tmp_path: Path, schedule: Schedule
) -> None:
    inverter = make(teacher, schedule=schedule)
    records = filled(tmp_path, inverter, seed=3).records
    generator = torch.Generator().manual_seed(3 << 32)
    result = inverter.invert(LABELS[:2], generator=generator, progress=False)
    for record, mask, image in zip(records, result.masks, result.images, strict=False):
        assert record["kept"] == mask.flatten().nonzero()[:, 0].tolist()
        pixels = (image * 255).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(read(tmp_path / record["file_name"]), pixels, atol=0.51)


@quick
def test_a_pool_that_ends_amid_a_trajectory_is_refused(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    filled(tmp_path, make(teacher), labels=(4, 4))
    with pytest.raises(
        PoolError, match=r"expected whole trajectories of 3 images .*, got 2 images"
    ):
        filled(tmp_path, make(teacher, schedule=PatchRebirth(3)), labels=REBIRTH)


@quick
def test_a_full_pool_is_left_as_it_is(teacher: VisionTransformer, tmp_path: Path) -> None:
    filled(tmp_path, make(teacher))
    before = files(tmp_path)
    filled(tmp_path, make(teacher))
    assert files(tmp_path) == before


@quick
def test_a_loss_that_is_not_finite_leaves_the_last_images(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    calls = []

    def spoilt(images: Tensor, logits: Tensor) -> Tensor:
        calls.append(1)
        return images.sum() * (torch.nan if len(calls) > 14 else 0)

    inverter = make(teacher, objectives=[CrossEntropy(), spoilt])
    with pytest.raises(NonFiniteLoss, match="spoilt is not finite at iteration 4"):
        filled(tmp_path, inverter)
    assert len(Pool(tmp_path).records) == 2
    assert len(list((tmp_path / "unfinished").iterdir())) == 2


@quick
def test_a_strip_shows_moments_of_each_image(teacher: VisionTransformer, tmp_path: Path) -> None:
    inverter = make(teacher)
    filled(tmp_path, inverter, seed=1)
    before = files(tmp_path)
    strips = filled(tmp_path / "strips", inverter, seed=1, strip=3)
    seen: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed((1 << 32) + 2)
    inverter.invert(
        LABELS[2:4],
        generator=generator,
        progress=False,
        callback=lambda number, images, kept: seen.update({number: images.clone()}),
    )
    for i, index in enumerate((2, 3)):
        frames = [inverter.settings.space.denormalize(seen[number])[i] for number in (2, 5, 9)]
        expected = (torch.cat(frames, 2).float() * 255).round().permute(1, 2, 0).numpy()
        strip = read(tmp_path / "strips/report/progress" / f"{index:06}.png")
        np.testing.assert_array_equal(strip, expected)
    found = files(strips.path)
    assert {name: found.pop(name) for name in before} == before
    assert sorted(found) == [f"report/progress/{i:06}.png" for i in range(5)]
    strips.close()
    with Pool.create(strips.path, SETTINGS, ["a"], overwrite=True):
        assert not (strips.path / "report").exists()


def test_a_strip_has_at_most_a_moment_for_each_iteration(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    for strip in (-1, 11):
        with pytest.raises(ValueError, match=rf"a strip of 0..10 moments, got {strip}"):
            filled(tmp_path / str(strip), make(teacher), strip=strip)


@quick
def test_images_that_are_finished_early_have_their_iterations(
    teacher: VisionTransformer, tmp_path: Path
) -> None:
    terms = (CrossEntropy(),)
    finish = EarlyFinish(1e-9, iterations=2)
    inverter = make(teacher, objectives=terms, finish=finish, max_batch=2)
    pool = filled(tmp_path / "pool", inverter, batch_size=5, seed=1)
    generator = torch.Generator().manual_seed(1 << 32)
    result = inverter.invert(LABELS, generator=generator, progress=False)
    assert result.ages.tolist() == [8] * 5
    records = pool.records
    assert [record["iterations"] for record in records] == [8] * 5
    assert [record["label"] for record in records] == list(LABELS)
    assert describe(inverter)["finish"] == "EarlyFinish(confidence=1e-09, iterations=2)"
    with pytest.raises(ValueError, match="expected a strip of 0 moments with finish"):
        filled(tmp_path / "strip", inverter, strip=2)


def test_the_curves_are_drawn_now_and_then_and_at_the_end(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    monkeypatch.setattr(workers, "draw_loss", lambda pool: held.append(len(pool.records)))
    filled(tmp_path / "soon", make(teacher))
    assert held == [2, 5]
    held.clear()
    monkeypatch.setattr(workers, "_SECONDS_BETWEEN_PLOTS", 0.0)
    filled(tmp_path / "always", make(teacher))
    assert held == [2, 4, 5, 5]


@quick
def test_a_batch_is_written_while_the_next_is_inverted(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverter, add, begun = make(teacher), Pool.add, [Event() for _ in range(4)]
    invert, inversions, additions = inverter.invert, iter(begun), iter(begun[1:])

    def inverting(*arguments: object, **options: object) -> InversionResult:
        next(inversions).set()
        return invert(*arguments, **options)

    def adding(self: Pool, *arguments: object, **options: object) -> None:
        event = next(additions)
        assert event is begun[-1] or event.wait(20)
        add(self, *arguments, **options)

    monkeypatch.setattr(SparseInverter, "invert", staticmethod(inverting))
    monkeypatch.setattr(Pool, "add", adding)
    assert len(filled(tmp_path, inverter).records) == len(LABELS)


@quick
@pytest.mark.parametrize("batch", range(3))
def test_an_error_of_the_writer_is_raised(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    add, calls = Pool.add, iter(range(9))

    def failing(self: Pool, *arguments: object, **options: object) -> None:
        if next(calls) == batch:
            raise PoolError("disk full")
        add(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "add", failing)
        with pytest.raises(PoolError, match="disk full"):
            filled(tmp_path, make(teacher))
    assert next(calls) == batch + 1
    assert len(Pool(tmp_path).records) == 2 * batch


@quick
def test_the_progress_is_that_of_the_pool(
    teacher: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path, make(teacher), labels=LABELS[:2]).close()
    assert capsys.readouterr().err == ""
    with filled(tmp_path, make(teacher), progress=True) as pool:
        records = pool.records
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 5 images, " in line]
    assert len(lines) == 2
    for line, count, classes in zip(lines, (4, 5), (3, 4), strict=True):
        sure = sum(record["confidence"] for record in records[:count]) / count
        assert line.startswith(f"{count} of 5 images, ")
        assert line.endswith(f" left, {classes} classes, mean confidence {sure:.3f}")


def test_a_folder_or_a_url_in_place_of_a_pool_is_refused(teacher: VisionTransformer) -> None:
    with pytest.raises(TypeError, match=r"^expected a pool of .* URL of RemotePool.*, got str$"):
        fill("s3://bucket/pool", make(teacher), [0], recipe=recipes.smi())
