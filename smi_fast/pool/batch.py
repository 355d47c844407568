"""A batch on its way into a pool: what it must be, and its files and lines as bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smi_fast.background import over
from smi_fast.pool.files import PoolError
from smi_fast.pool.layout import PROGRESS, UNFINISHED, files_of, picture_name
from smi_fast.pool.metadata import to_line

# Threads that encode the pictures of a batch, because a GPU may invert more than one encodes.
_ENCODERS = 4


def check_batch(images: Tensor, masks: Tensor, size: int) -> None:
    """Refuse tensors of another size than the records.

    Raises:
        ValueError: images that aren't floats [B, 3, H, W], or masks that aren't bool [B, rows,
            columns] whose rows and columns divide H and W.
    """
    if images.ndim != 4 or images.shape[:2] != (size, 3) or not images.is_floating_point():
        raise ValueError(
            f"expected images as floats [{size}, 3, H, W] for {size} records, "
            f"got {images.dtype} {list(images.shape)}"
        )
    if masks.ndim != 3 or len(masks) != size or masks.dtype != torch.bool:
        raise ValueError(
            f"expected masks as bool [{size}, rows, columns] for {size} records, "
            f"got {masks.dtype} {list(masks.shape)}"
        )
    grid = masks.shape[1:]
    if 0 in grid or any(side % count for side, count in zip(images.shape[2:], grid, strict=True)):
        raise ValueError(
            f"expected masks whose rows and columns divide images of {list(images.shape[2:])} "
            f"pixels, got {list(grid)}"
        )


def check_labels(records: Sequence[Mapping[str, Any]], classes: int) -> list[int]:
    """The labels of the records.

    Raises:
        ValueError: one is no class.
    """
    labels = [record.get("label") for record in records]
    for label in labels:
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"expected records with a label in 0..{classes - 1}, got {label!r}")
    return [label for label in labels if label is not None]


def to_uint8(images: Tensor) -> Any:
    """Pixels [B, 3, H, W] in [0, 1] as an array uint8 [B, H, W, 3]."""
    pixels = images.detach().cpu().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


class Encoded(NamedTuple):
    """A batch as a pool stores it.

    Attributes:
        files: content of each picture, by its name relative to the pool.
        lines: of the metadata, one for each image.
    """

    files: dict[str, bytes]
    lines: list[bytes]


def encode(
    settings: Mapping[str, Any],
    images: Tensor,
    masks: Tensor,
    records: Sequence[Mapping[str, Any]],
    moments: Sequence[Tensor] = (),
    *,
    batch: int,
    start: int,
) -> Encoded:
    """Check a batch and encode it.

    Args:
        settings: of the pool.
        images: see :meth:`smi_fast.pool.Pool.add`, as the next three.
        masks: likewise.
        records: likewise.
        moments: likewise.
        batch: number of the batch in the pool.
        start: index of its first image.

    Raises:
        ValueError: shapes or types don't fit, a label is no class of the pool, or a record has a
            NaN or an infinity.
    """
    names = settings["class_names"]
    check_batch(images, masks, len(records))
    for moment in moments:
        check_batch(moment, masks, len(records))
    labels = check_labels(records, len(names))
    pictures: dict[str, bytes] = {}
    lines: list[bytes] = []
    if not records:
        return Encoded(pictures, lines)
    masked = over(images.float(), masks, settings["background"])
    grey = (masks.cpu().byte() * 255).numpy()
    arrays = [to_uint8(images), to_uint8(masked), grey]
    if moments:
        arrays.append(to_uint8(torch.cat(list(moments), dim=3)))
    with ThreadPoolExecutor(_ENCODERS, "smi_fast encoder") as threads:
        encoded = list(threads.map(_pngs, zip(*arrays, strict=True)))
    kept = [mask.flatten().nonzero()[:, 0].tolist() for mask in masks.cpu()]
    for i, (record, label, contents) in enumerate(zip(records, labels, encoded, strict=True)):
        files = files_of(start + i, label, len(names))
        strip = f"{PROGRESS}/{picture_name(start + i)}"
        pictures |= zip([*files.values(), strip], contents, strict=False)
        own = {**files, "index": start + i, "batch": batch, "batch_size": len(records)}
        own |= {"label": label, "class_name": names[label], "kept": kept[i]}
        own |= {"sha256": fingerprint(contents[: len(files)])}
        lines.append(to_line({**own, **record, **own}))
    return Encoded(pictures, lines)


def unfinished(images: Tensor, start: int) -> dict[str, bytes]:
    """The files of an interrupted batch [B, 3, H, W] whose first image has the index ``start``."""
    return {
        f"{UNFINISHED}/{picture_name(index)}": png(pixels)
        for index, pixels in enumerate(to_uint8(images), start)
    }


def fingerprint(contents: Iterable[bytes]) -> str:
    """The hash of an image's files, in the order of :data:`~smi_fast.pool.layout.FOLDERS`."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def read_pixels(path: Path) -> np.ndarray[Any, Any]:
    """The pixels of a picture file, uint8 [H, W] or [H, W, 3].

    Raises:
        PoolError: it is missing or damaged.
    """
    try:
        with Image.open(path) as picture:
            return np.array(picture)
    except Exception as error:  # Pillow has no common class for what a damaged file raises
        raise PoolError(f"reading {path} failed: {error}") from error


def _pngs(pictures: Iterable[np.ndarray[Any, Any]]) -> list[bytes]:
    return [png(pixels) for pixels in pictures]


def png(pixels: np.ndarray[Any, Any]) -> bytes:
    """Pixels uint8 [H, W] or [H, W, 3] as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()
