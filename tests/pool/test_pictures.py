"""The pictures of a pool: the contact sheet and the loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from smi_fast.pool import CONTACT_SHEET, LOSS_CURVES, Pool, pictures
from tests.helpers.pools import NAMES, SETTINGS, batch, read

MASKED = (0.0, 0.2, 1.0)  # (0, 51, 255)


def colour_pool(path: Path, classes: int, per_class: int, side: int = 32) -> Pool:
    """A pool of plain tiles: class i is (20 i, 200, 40), without a kept patch."""
    labels = torch.arange(classes).repeat(per_class)  # in any order but sorted
    colours = torch.stack([labels * 20, labels * 0 + 200, labels * 0 + 40], dim=1) / 255
    images = colours[:, :, None, None].expand(-1, -1, side, side)
    made = Pool.create(path, SETTINGS, NAMES, background=MASKED)
    records = [{"label": int(label), "confidence": 0.987} for label in labels]
    made.add(images, torch.zeros(len(labels), 4, 4).bool(), records)
    return made


def where(sheet: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    return np.asarray((sheet == colour).all(axis=-1))


def test_contact_sheet_shows_every_image_in_the_row_of_its_class(tmp_path: Path) -> None:
    colour_pool(tmp_path, classes=4, per_class=3)
    pictures.contact_sheet(tmp_path, tmp_path / "contact_sheet.png")
    sheet = read(tmp_path / "contact_sheet.png")
    bottom = 0
    for label in range(4):
        whole = where(sheet, (20 * label, 200, 40))
        # 32 px are drawn four times as large.
        assert whole.sum() == 3 * 128**2
        masked = where(sheet, (0, 51, 255)) & whole.any(axis=1)[:, None]
        assert masked.sum() == 3 * 128**2
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


def test_contact_sheet_without_confidence_or_images(tmp_path: Path) -> None:
    images, masks, _ = batch(2)
    made = Pool.create(tmp_path, SETTINGS, NAMES)
    with pytest.raises(ValueError, match="empty"):
        pictures.contact_sheet(tmp_path, tmp_path / "sheet.png")
    made.add(images, masks, [{"label": 7}, {"label": 3}])
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


def test_pictures_have_the_same_bytes_whenever_they_are_drawn(tmp_path: Path) -> None:
    made = colour_pool(tmp_path, classes=2, per_class=1)
    made.add(*batch(1), loss={"stops": [2], "history": {"cross_entropy": [3, 2.5, 0.25]}})
    drawn = []
    for _ in range(2):
        pictures.draw_loss(made)
        pictures.draw_sheet(made)
        drawn.append([(tmp_path / name).read_bytes() for name in (LOSS_CURVES, CONTACT_SHEET)])
    assert drawn[0] == drawn[1]
