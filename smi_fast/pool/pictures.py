"""Pictures of a pool: a contact sheet of its images, and the curves of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from smi_fast.pool.files import PoolError, explained, write_atomically
from smi_fast.pool.layout import CONTACT_SHEET, LOSS_CURVES
from smi_fast.pool.pool import Pool

# Limits of a contact sheet, so that it fits on a screen and in memory.
MOST_CLASSES, MOST_PER_CLASS = 40, 8
SMALLEST_TILE = 112
GAP = 12
NAME_SIZE, CONFIDENCE_SIZE = 18, 13
STOP_COLOUR = "#d62728"
GREY = "#444444"
# The files of an image that a contact sheet shows, by the entries of its record.
_READ = ("file_name", "masked_file_name")


def draw_sheet(pool: Pool) -> None:
    """Draw the contact sheet of a pool into its folder.

    Raises:
        PoolError: an image can't be read, or the sheet can't be written. The images are safe.
    """
    records = pool.records
    with explained(f"writing {pool.path / CONTACT_SHEET}", _safe(len(records))):
        pool.bring(record[key] for row in _rows(records) for record in row for key in _READ)
        _sheet(pool.path, records, pool.path / CONTACT_SHEET)


def draw_loss(pool: Pool) -> None:
    """Draw the loss curves of a pool's last batch into its folder, if the pool knows them.

    Raises:
        PoolError: the curves can't be read or written. The pool's images are safe.
    """
    loss = pool.loss
    if loss is not None:
        with explained(f"writing {pool.path / LOSS_CURVES}", _safe(len(pool.records))):
            loss_curves(loss["history"], loss["stops"], pool.path / LOSS_CURVES)


def _safe(images: int) -> str:
    return f"; images safe in the pool: {images}"


def contact_sheet(pool: str | Path, path: str | Path) -> None:
    """Draw the images of a pool, one row for each class.

    Each whole image has its kept patches to its right. Below the image is the teacher's confidence
    in the wanted class, and to its right what the judge sees in the image, in red where it is
    another class. From a large pool it draws the first images of the first classes, and the title
    says how many.

    Args:
        pool: folder of the pool. Its records may have a ``confidence`` in [0, 1], and the name of a
            class as ``judge``.
        path: PNG file to write.

    Raises:
        ValueError: the pool is empty.
        PoolError: the pool or one of its images can't be read.
        OSError: the sheet can't be written.
    """
    _sheet(Path(pool), Pool(pool).records, Path(path))


def _rows(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The first images of the first classes."""
    classes: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        classes.setdefault(record["label"], []).append(record)
    return [classes[label][:MOST_PER_CLASS] for label in sorted(classes)[:MOST_CLASSES]]


def _sheet(pool: Path, records: Sequence[Mapping[str, Any]], path: Path) -> None:
    if not records:
        raise ValueError(f"expected a pool of images, got an empty one in {pool}")
    rows, classes = _rows(records), {record["label"] for record in records}
    names = [row[0]["class_name"] for row in rows]
    title = (
        f"{sum(map(len, rows))} of {len(records)} images, {len(rows)} of {len(classes)} classes: "
        "whole, and kept patches"
    )
    title += ". Below: the teacher's confidence" * ("confidence" in records[0])
    title += ", and what an independent judge sees" * ("judge" in records[0])

    def read(name: str) -> Image.Image:
        try:
            with Image.open(pool / name) as image:
                scale = -(-SMALLEST_TILE // min(image.size))
                return image.resize(
                    (image.width * scale, image.height * scale), Image.Resampling.NEAREST
                )
        except Exception as error:  # Pillow has no common class for what a damaged file raises
            raise PoolError(
                f"reading {pool / name} failed: {error}; put the image back, or make the "
                "pool anew with --overwrite"
            ) from error

    large, small = ImageFont.load_default(NAME_SIZE), ImageFont.load_default(CONFIDENCE_SIZE)
    width, height = read(rows[0][0]["file_name"]).size
    left = round(max(map(large.getlength, names))) + 2 * GAP
    top = NAME_SIZE + 2 * GAP
    across, down = 2 * width + GAP, height + CONFIDENCE_SIZE + 2 * GAP
    right = max(left + across * max(map(len, rows)), round(large.getlength(title)) + 2 * GAP)
    sheet = Image.new("RGB", (right, top + down * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, "black", large)
    for y, name, row in zip(range(top, sheet.height, down), names, rows, strict=True):
        draw.text((GAP, y + height // 2), name, "black", large, anchor="lm")
        for x, record in zip(range(left, right, across), row, strict=False):
            for shift, key in zip((0, width), _READ, strict=True):
                sheet.paste(read(record[key]), (x + shift, y))
            if "confidence" in record:
                draw.text((x, y + height + 2), f"{record['confidence']:.1%}", GREY, small)
            if "judge" in record:
                word, wanted = str(record["judge"]), record["class_name"]
                word = _fitting(word, width, small)
                colour = GREY if record["judge"] == wanted else STOP_COLOUR
                draw.text((x + width, y + height + 2), word, colour, small)
    write_atomically(path, partial(sheet.save, format="PNG"))


def _fitting(word: str, width: int, font: Any) -> str:
    """The word, or its beginning and an ellipsis where it is wider than ``width`` pixels."""
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(f"{word}…") > width:
        word = word[:-1]
    return f"{word}…"


def loss_curves(
    history: Mapping[str, Sequence[float]], stops: Sequence[int], path: str | Path
) -> None:
    """Draw each objective over the iterations, with a vertical line at each stop.

    The scale is logarithmic and omits zeros; with a negative value it is linear.

    Args:
        history: values of each objective by its name, one for each iteration.
        stops: iterations of the stops.
        path: PNG file to write.

    Raises:
        OSError: the file can't be written.
    """
    # Imported here because that takes half a second. Figure without pyplot has no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in history.items():
        axes.plot(values, label=name.replace("_", " "))
    for stop in stops:
        axes.axvline(
            stop, color=STOP_COLOUR, linestyle=":", label="stop" if stop == stops[0] else None
        )
    values = [value for curve in history.values() for value in curve]
    if min(values, default=0) >= 0 and max(values, default=0) > 0:
        axes.set_yscale("log", nonpositive="mask")
    axes.set(title="Loss of the inversion", xlabel="iteration", ylabel="value before its weight")
    axes.legend()
    write_atomically(path, partial(figure.savefig, format="png", dpi=120))
