"""The pool on disk: exact pixels, nothing half-written, nothing lost; and the pictures of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from smi_fast import pool
from smi_fast.pool import Pool, PoolError, pictures

SETTINGS = {"teacher": "fashion-canvas", "at": (50, 100), "seed": 0}


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[dict[str, Any]]]:
    """What ``Pool.add`` takes: images [B, 3, 16, 24] of exact 8-bit values, masks [B, 2, 3]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, 16, 24), generator=generator) / 255
    masks = torch.rand(size, 2, 3, generator=generator) < 0.5
    pixels = masks.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    records = [{"label": i % 3, "class_name": f"class {i % 3}", "seed": seed} for i in range(size)]
    return images, images * pixels, masks, records


def files(path: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def read(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def fail_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Makes the call number ``count`` of a function find the disk full."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, function)


def test_pixels_masks_and_records_come_back_exactly(tmp_path: Path) -> None:
    images, masked, masks, records = batch(5)
    Pool.create(tmp_path / "pool", SETTINGS).add(images, masked, masks, records)

    found = Pool(tmp_path / "pool").records
    assert len(found) == 5
    for i, record in enumerate(found):
        assert record == {
            **records[i],
            "index": i,
            "image": f"images/{i:06}.png",
            "masked": f"masked/{i:06}.png",
            "mask": f"masks/{i:06}.png",
        }
        for key, pixels in (("image", images), ("masked", masked)):
            expected = (pixels[i].double() * 255).round().permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(read(tmp_path / "pool" / record[key]), expected)
        mask = read(tmp_path / "pool" / record["mask"])
        np.testing.assert_array_equal(mask, np.where(masks[i].numpy(), 255, 0))


def test_values_are_rounded_to_the_nearest_of_256_and_clamped(tmp_path: Path) -> None:
    values = torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.1])
    images = values.expand(1, 3, 2, 6)
    Pool.create(tmp_path, SETTINGS).add(images, images, torch.ones(1, 1, 1).bool(), [{}])
    assert read(tmp_path / "images/000000.png")[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floats_and_layouts(tmp_path: Path, dtype: torch.dtype) -> None:
    images = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)[None, :, None, None].expand(2, 3, 4, 4)
    Pool.create(tmp_path, SETTINGS).add(images, images, torch.ones(2, 1, 1).bool(), [{}, {}])
    assert (read(tmp_path / "images/000001.png") == [0, 128, 255]).all()


def test_an_empty_batch_adds_nothing(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS)
    made.add(*batch(0))
    assert made.records == []


@pytest.mark.parametrize(
    ("owner", "name", "calls"), [(os, "replace", 7), (os, "fsync", 7), (Image.Image, "save", 6)]
)
def test_a_full_disk_leaves_the_pool_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    # Two images are three files each, and then the manifest.
    made = Pool.create(tmp_path, SETTINGS)
    made.add(*batch(3, seed=1))
    before = files(tmp_path)
    for count in range(1, calls + 1):
        with monkeypatch.context() as patch:
            fail_at_call(patch, owner, name, count)
            with pytest.raises(PoolError) as caught:
                made.add(*batch(2, seed=2))
        written = "manifest.jsonl" if count == 7 else f"00000{3 + (count - 1) // 3}.png"
        assert written in str(caught.value)
        assert "No space left on device; images safe in the pool: 3" in str(caught.value)
        assert files(tmp_path) == before

    made.add(*batch(2, seed=2))
    assert [record["seed"] for record in Pool(tmp_path).records] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("count", range(1, 8))
def test_an_interrupt_leaves_only_whole_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    # The interrupt comes right after a file is in its place, the manifest included.
    made = Pool.create(tmp_path, SETTINGS)
    made.add(*batch(1, seed=1))
    replace, calls = os.replace, iter(range(1, 1000))

    def interrupted(*args: Any) -> None:
        replace(*args)
        if next(calls) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.add(*batch(2, seed=2))
    assert [record["seed"] for record in made.records] == ([1, 2, 2] if count == 7 else [1])

    made.add(*batch(2, seed=3))
    images = {1: batch(1, seed=1)[0], 2: batch(2, seed=2)[0], 3: batch(2, seed=3)[0]}
    for record in made.records:
        pixels = images[record["seed"]][record["label"]].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(read(tmp_path / record["image"]), (pixels * 255).round())


def test_left_overs_do_not_count_and_are_replaced(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/000000.png").write_bytes(b"half a picture")
    assert made.records == []
    made.add(*batch(1))
    assert read(tmp_path / "images/000000.png").shape == (16, 24, 3)


def test_unfinished_images_are_kept_until_the_next_batch(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS)
    made.add(*batch(1))
    images, *_ = batch(2, seed=1)
    made.add_unfinished(images)
    assert len(made.records) == 1
    for i in range(2):
        expected = (images[i] * 255).round().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(read(tmp_path / f"unfinished/{i + 1:06}.png"), expected)
    made.add(*batch(1))
    assert len(made.records) == 2
    assert not (tmp_path / "unfinished").exists()

    made.add_unfinished(images)
    Pool.create(tmp_path, SETTINGS, overwrite=True)
    assert set(files(tmp_path)) == {"settings.json"}


def test_resume_continues_the_numbers(tmp_path: Path) -> None:
    Pool.resume(tmp_path / "pool", SETTINGS).add(*batch(2, seed=1))
    Pool.resume(tmp_path / "pool", SETTINGS).add(*batch(3, seed=2))
    found = Pool(tmp_path / "pool").records
    assert [record["index"] for record in found] == [0, 1, 2, 3, 4]
    assert [record["seed"] for record in found] == [1, 1, 2, 2, 2]


def test_resume_minds_no_order_of_keys(tmp_path: Path) -> None:
    Pool.create(tmp_path, {"seed": 0, "weights": {"l1": 0.1, "l2": 0.2}})
    Pool.resume(tmp_path, {"weights": {"l2": 0.2, "l1": 0.1}, "seed": 0})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "made with seed = 0, now it is 1"),
        ({"at": (50, 99), "seed": 1}, r"made with at = \[50, 100\], now it is \[50, 99\]"),
        ({"lr": 0.1}, "made with lr = nothing, now it is 0.1"),
    ],
)
def test_resume_refuses_other_settings(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    Pool.create(tmp_path, SETTINGS)
    with pytest.raises(PoolError, match=sentence):
        Pool.resume(tmp_path, {**SETTINGS, **change})


def test_create_and_resume_refuse_a_folder_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for attempt in (Pool.create, Pool.resume):
        with pytest.raises(PoolError, match=r"not empty.*--resume.*--overwrite"):
            attempt(tmp_path, SETTINGS)
    with pytest.raises(PoolError, match="not a pool"):
        Pool.create(tmp_path, SETTINGS, overwrite=True)
    assert files(tmp_path) == {"thesis.tex": b"precious"}


def test_create_refuses_a_pool_and_overwrites_it_when_told(tmp_path: Path) -> None:
    Pool.create(tmp_path, SETTINGS).add(*batch(2))
    (tmp_path / pool.CONTACT_SHEET).write_bytes(b"of the old images")
    (tmp_path / "notes.txt").write_text("not the pool's")
    with pytest.raises(PoolError, match="not empty"):
        Pool.create(tmp_path, SETTINGS)
    assert len(Pool(tmp_path).records) == 2

    made = Pool.create(tmp_path, {"seed": 1}, overwrite=True)
    assert made.records == []
    assert set(files(tmp_path)) == {"settings.json", "notes.txt"}
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}


def test_a_failed_overwrite_leaves_a_pool_that_can_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pool.create(tmp_path, SETTINGS).add(*batch(2))
    with monkeypatch.context() as patch:
        fail_at_call(patch, shutil, "rmtree", 2)
        with pytest.raises(PoolError, match=r"deleting .* failed: No space left"):
            Pool.create(tmp_path, SETTINGS, overwrite=True)
    assert Pool(tmp_path).records == []
    Pool.create(tmp_path, SETTINGS, overwrite=True).add(*batch(1))
    assert len(Pool(tmp_path).records) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for attempt in (Pool.create, Pool.resume):
        with pytest.raises(PoolError, match="Not a directory"):
            attempt(tmp_path / "file" / "pool", SETTINGS)
    with pytest.raises(PoolError, match="File exists"):
        Pool.create(tmp_path / "file", SETTINGS)
    fail_at_call(monkeypatch, os, "replace", 1)
    with pytest.raises(PoolError, match=r"settings.json failed: No space left"):
        Pool.create(tmp_path / "pool", SETTINGS)
    Pool.create(tmp_path / "pool", SETTINGS)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS)
    (tmp_path / "manifest.jsonl").write_text('{"index": 0\n')
    with pytest.raises(PoolError, match=r"reading .*manifest.jsonl failed: Expecting"):
        made.add(*batch(1))


def test_add_says_what_it_expected(tmp_path: Path) -> None:
    made = Pool.create(tmp_path, SETTINGS)
    images, masked, masks, records = batch(2)
    bytes_ = (images * 255).byte()
    for arguments, sentence in (
        (
            (images[:1], masked, masks, records),
            r"images as floats \[2, 3, H, W\].*\[1, 3, 16, 24\]",
        ),
        ((bytes_, bytes_, masks, records), r"images as floats .* got torch.uint8"),
        ((images, masked[..., :8], masks, records), r"masked images .*\[2, 3, 16, 8\]"),
        ((images, masked, masks.float(), records), r"masks as bool .* got torch.float32"),
        ((images, masked, masks, records[:1]), r"for 1 records, got .*\[2, 3, 16, 24\]"),
        ((images, masked, masks, [{"confidence": float("nan")}] * 2), "JSON compliant"),
    ):
        with pytest.raises(ValueError, match=sentence):
            made.add(*arguments)
    assert set(files(tmp_path)) == {"settings.json"}


def test_write_atomically_keeps_the_old_file(tmp_path: Path) -> None:
    pool.write_atomically(tmp_path / "new" / "plot.png", lambda file: file.write(b"old"))

    def half(file: Any) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.write_atomically(tmp_path / "new" / "plot.png", half)
    assert files(tmp_path) == {"new/plot.png": b"old"}


def colour_pool(path: Path, classes: int, per_class: int, side: int = 32) -> Pool:
    """A pool of plain tiles: class i is (20 i, 200, 40), its masked images (20 i, 40, 200)."""
    labels = torch.arange(classes).repeat(per_class)  # in any order but sorted
    colours = torch.stack([labels * 20, labels * 0 + 200, labels * 0 + 40], dim=1) / 255
    images = colours[:, :, None, None].expand(-1, -1, side, side)
    made = Pool.create(path, SETTINGS)
    records = [
        {"label": int(label), "class_name": f"class {label}", "confidence": 0.987}
        for label in labels
    ]
    made.add(images, images[:, [0, 2, 1]], torch.ones(len(labels), 4, 4).bool(), records)
    return made


def where(sheet: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return np.asarray((sheet == colour).all(axis=-1))


def test_contact_sheet_shows_every_image_in_the_row_of_its_class(tmp_path: Path) -> None:
    colour_pool(tmp_path, classes=4, per_class=3)
    pictures.contact_sheet(tmp_path, tmp_path / "contact_sheet.png")
    sheet = read(tmp_path / "contact_sheet.png")
    bottom = 0
    for label in range(4):
        whole, masked = where(sheet, (20 * label, 200, 40)), where(sheet, (20 * label, 40, 200))
        # 32 px are drawn four times as large.
        assert whole.sum() == masked.sum() == 3 * 128**2
        rows, columns = np.nonzero(whole.any(axis=1))[0], np.nonzero(whole.any(axis=0))[0]
        assert rows[0] > bottom
        assert len(rows) == 128
        assert len(columns) == 3 * 128
        assert (masked.any(axis=1) == whole.any(axis=1)).all()
        bottom = rows[-1]
        name = sheet[rows[0] : rows[-1], : columns[0]]
        confidence = sheet[bottom + 1 : bottom + 16, columns[0] : columns[-1]]
        assert (name < 128).all(axis=-1).sum() > 50
        assert (confidence < 128).all(axis=-1).sum() > 50


def test_contact_sheet_grows_with_classes_and_images(tmp_path: Path) -> None:
    shapes = {}
    for classes, per_class in ((2, 5), (3, 5), (2, 6)):
        path = tmp_path / f"{classes}x{per_class}"
        colour_pool(path, classes, per_class, side=112)
        pictures.contact_sheet(path, path / "sheet.png")
        shapes[classes, per_class] = read(path / "sheet.png").shape
    assert shapes[3, 5][0] - shapes[2, 5][0] > 112
    assert shapes[3, 5][1] == shapes[2, 5][1]
    assert shapes[2, 6][1] - shapes[2, 5][1] > 2 * 112
    assert shapes[2, 6][0] == shapes[2, 5][0]


def test_contact_sheet_of_a_large_pool_shows_its_beginning(tmp_path: Path) -> None:
    colour_pool(tmp_path, classes=2, per_class=pictures.MOST_PER_CLASS + 3)
    pictures.contact_sheet(tmp_path, tmp_path / "sheet.png")
    shown = where(read(tmp_path / "sheet.png"), (20, 200, 40)).sum()
    assert shown == pictures.MOST_PER_CLASS * 128**2


def test_contact_sheet_without_names_confidence_or_images(tmp_path: Path) -> None:
    images, masked, masks, _ = batch(2)
    made = Pool.create(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="empty"):
        pictures.contact_sheet(tmp_path, tmp_path / "sheet.png")
    made.add(images, masked, masks, [{"label": 7}, {"label": 3}])
    pictures.contact_sheet(tmp_path, tmp_path / "sheet.png")
    sheet = read(tmp_path / "sheet.png")
    enlarged = (images[0] * 255).round().byte().permute(1, 2, 0).numpy().repeat(7, 0).repeat(7, 1)
    left, top = next(
        (x, y)
        for y in range(sheet.shape[0])
        for x in range(sheet.shape[1])
        if (sheet[y, x] != 255).any() and np.array_equal(sheet[y : y + 112, x : x + 168], enlarged)
    )
    # Label 7 comes below label 3, whose tile is as high.
    assert top > 112
    assert (sheet[top : top + 112, :left] == 0).all(axis=-1).any()


def near(path: Path, colour: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Which pixels of a plot have a colour, but for the smoothing of lines."""
    with Image.open(path) as image:
        difference = np.asarray(image.convert("RGB")).astype(int) - colour
    return np.asarray(abs(difference).max(axis=-1) < 64)


def test_loss_curves_has_a_line_at_each_stop(tmp_path: Path) -> None:
    history = {"cross_entropy": [0.97**i for i in range(201)], "total_variation": [1.0] * 201}
    found = {}
    for stops in ((), (50, 100, 200)):
        pictures.loss_curves(history, stops, tmp_path / "loss.png")
        red = near(tmp_path / "loss.png", tuple(bytes.fromhex(pictures.STOP_COLOUR[1:])))
        columns = np.nonzero(red.sum(axis=0) > 100)[0]
        lines = np.split(columns, np.nonzero(np.diff(columns) > 1)[0] + 1)
        found[stops] = [line.mean() for line in lines if len(line)]
    assert found[()] == []
    first, second, third = found[50, 100, 200]
    assert (third - second) / (second - first) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("others", "middle"),
    [({}, 0.5), ({"zero": [0.0] * 101}, 0.5), ({"negative": [-0.5] * 101}, 1.0)],
)
def test_loss_curves_is_logarithmic_unless_a_value_is_negative(
    tmp_path: Path, others: dict[str, list[float]], middle: float
) -> None:
    # What falls by a constant factor is half-way down in logarithms, and at the bottom without.
    pictures.loss_curves(
        {"falling": [0.9**i for i in range(101)], **others}, (), tmp_path / "l.png"
    )
    blue = near(tmp_path / "l.png", (31, 119, 180))
    left, *_, right = np.nonzero(blue.any(axis=0))[0]
    top = np.nonzero(blue[:, left])[0].min()
    bottom = np.nonzero(blue[:, right])[0].max()
    height = np.nonzero(blue[:, (left + right) // 2])[0].mean()
    assert (height - top) / (bottom - top) == pytest.approx(middle, abs=0.03)
