"""Filling a pool from Python: batches, seeds, resumption, and how it ends early."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.distributed import HashStore

from smi_fast import (
    CrossEntropy,
    InversionResult,
    MassSchedule,
    NonFiniteLoss,
    PatchRebirth,
    ResolutionSchedule,
    Schedule,
    SparseInverter,
    recipes,
)
from smi_fast.fill import Interrupted, Stopped, fill
from smi_fast.group import Group
from smi_fast.job_progress import Tally
from smi_fast.pool import LOSS_CURVES, SECONDS, Pool, PoolError
from smi_fast.provenance import describe, versions
from tests.helpers.inversions import make
from tests.helpers.pools import SETTINGS, files, read

LABELS = (4, 0, 0, 2, 3)


@pytest.fixture
def _without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a plot takes far longer than these batches."""
    for module in ("fill", "workers"):
        monkeypatch.setattr(f"smi_fast.{module}.draw_loss", lambda *_: None)


quick = pytest.mark.usefixtures("_without_curves")


def filled(
    path: Path, inverter: SparseInverter, background: str = "mean", **options: object
) -> Pool:
    pool = Pool.resume(path, SETTINGS, ["a", "b", "c", "d", "e"], background=background)
    options = {"recipe": recipes.smi(), "batch_size": 2, "progress": False, **options}
    fill(pool, inverter, options.pop("labels", LABELS), **options)
    return pool


def interrupting(monkeypatch: pytest.MonkeyPatch, inverter: SparseInverter, batch: int) -> None:
    """Makes Ctrl-C end a batch, counted from 0, after its third iteration."""
    invert, batches = inverter.invert, iter(range(100))

    def interrupted(*arguments: object, **options: object) -> InversionResult:
        wanted = next(batches) == batch

        def stop(number: int, images: Tensor, kept: Tensor) -> None:
            if wanted and number == 2:
                raise KeyboardInterrupt

        return invert(*arguments, callback=stop, **options)

    monkeypatch.setattr(SparseInverter, "invert", staticmethod(interrupted))


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
def test_an_interrupted_fill_goes_on_where_it_stood(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "whole", make(teacher), seed=1)
    inverter = make(teacher)
    with monkeypatch.context() as patch:
        interrupting(patch, inverter, batch=1)
        with pytest.raises(Interrupted, match=r"after 3 iterations: .*unfinished; --resume starts"):
            filled(tmp_path / "parts", inverter, seed=1)
    assert len(Pool(tmp_path / "parts").records) == 2
    unfinished = sorted((tmp_path / "parts" / "unfinished").iterdir())
    assert [path.name for path in unfinished] == ["000002.png", "000003.png"]
    filled(tmp_path / "parts", inverter, seed=1)
    whole, parts = (files(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts


REBIRTH = (4, 4, 4, 0, 0, 1, 1, 1, 1)


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
def test_an_interrupted_fill_of_trajectories_goes_on(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "whole", make(teacher, schedule=PatchRebirth(3)), labels=REBIRTH)
    inverter = make(teacher, schedule=PatchRebirth(3))
    with monkeypatch.context() as patch:
        interrupting(patch, inverter, batch=1)
        with pytest.raises(Interrupted):
            filled(tmp_path / "parts", inverter, labels=REBIRTH)
    assert len(Pool(tmp_path / "parts").records) == 5
    filled(tmp_path / "parts", inverter, labels=REBIRTH)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


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
def test_an_interrupted_group_goes_on_where_it_stood(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "alone", make(teacher), batch_size=1).close()
    expected = files(tmp_path / "alone")
    inverter, store = make(teacher), HashStore()
    store.add("next", 2)  # another process has taken the first turns of five
    with monkeypatch.context() as patch:
        interrupting(patch, inverter, batch=1)
        with pytest.raises(Interrupted, match="after 3 iterations"):
            filled(tmp_path / "group", inverter, batch_size=1, group=Group(store, 0, 1))
    assert (tmp_path / "group/unfinished/000003.png").exists()
    with Pool.resume(tmp_path / "group", SETTINGS, list("abcde")) as begun:
        assert (begun.records, begun.ahead) == ([], {2: range(2, 3)})
    with pytest.raises(PoolError, match=r"expected batch 2 of 2 trajectories .* the images 2 to 2"):
        filled(tmp_path / "group", make(teacher))
    shutil.copytree(tmp_path / "group", tmp_path / "resumed")
    filled(tmp_path / "resumed", make(teacher), batch_size=1).close()
    assert files(tmp_path / "resumed") == expected
    group = Group(HashStore(), 0, 1)
    filled(tmp_path / "group", make(teacher), batch_size=1, group=group).close()
    assert files(tmp_path / "group") == expected


@quick
def test_batches_of_a_dead_process_are_made_by_the_first(
    teacher: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "alone", make(teacher)).close()
    store = HashStore()
    dead = Group(store, 1, 2)
    dead.begin()
    assert dead.next() == 0
    dead.hold()  # and its end has released the lock
    dead.report(Tally(1, frozenset({4}), 0.5).to_json())
    group = Group(store, 0, 2)
    filled(tmp_path / "group", make(teacher), group=group, progress=True).close()
    assert files(tmp_path / "group") == files(tmp_path / "alone")
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 5 images, " in line]
    assert [line[0] for line in lines] == ["3", "4", "5"]


def stopping(inverter: SparseInverter, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Presses Ctrl-C in the third iteration of each batch, and maybe once more."""
    invert = inverter.invert

    def pressed(*arguments: object, **options: object) -> InversionResult:
        def press(number: int, images: Tensor, kept: Tensor) -> None:
            if number == 2:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        return invert(*arguments, callback=press, **options)

    monkeypatch.setattr(SparseInverter, "invert", staticmethod(pressed))


@quick
@pytest.mark.parametrize("store", [None, HashStore()])
def test_the_first_ctrl_c_lets_the_batch_end(
    teacher: VisionTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    store: HashStore | None,
) -> None:
    inverter, group = make(teacher), None if store is None else Group(store, 0, 1)
    with monkeypatch.context() as patch:
        stopping(inverter, patch, times=1)
        with pytest.raises(
            Stopped, match=r"stopped: .* has 2 of 5 images; --resume makes the rest"
        ):
            filled(tmp_path, inverter, group=group)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopping after this batch; Ctrl-C again ends it at once" in capfd.readouterr().err
    assert len(Pool(tmp_path).records) == 2 and not (tmp_path / "unfinished").exists()
    if store is not None:
        assert Group(store, 1, 2).stopped  # the other processes stop too


@quick
def test_the_second_ctrl_c_ends_the_batch(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverter = make(teacher)
    stopping(inverter, monkeypatch, times=2)
    with pytest.raises(Interrupted, match="after 3 iterations: the unfinished images"):
        filled(tmp_path, inverter)
    assert len(list((tmp_path / "unfinished").iterdir())) == 2


@quick
def test_a_handler_of_the_program_stays(teacher: VisionTransformer, tmp_path: Path) -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        inverter = make(teacher)
        with pytest.MonkeyPatch.context() as patch:
            stopping(inverter, patch, times=1)
            assert len(filled(tmp_path, inverter).records) == 5
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 3


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
