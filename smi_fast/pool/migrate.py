"""A pool of the first version as one of this version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fast.pool.batch import read_pixels
from smi_fast.pool.files import PoolError, explained
from smi_fast.pool.layout import SETTINGS
from smi_fast.pool.metadata import from_json
from smi_fast.pool.pool import Pool
from smi_fast.pool.settings import OLD_FORMAT

_MANIFEST, _LOSS = "manifest.jsonl", "loss.json"
_FOLDERS = {"image": "images", "masked": "masked", "mask": "masks"}


def migrate(old: str | Path, new: str | Path) -> Pool:
    """Copy a pool of the first version into a new one; the old one stays as it is.

    Images and masks keep their pixels, records and settings their entries. Masked images stay on
    black. The new pool knows the classes up to the last that has an image; where none has a name,
    its name is its index.

    Args:
        old: folder of the old pool.
        new: a missing or empty folder.

    Returns:
        the new pool, closed.

    Raises:
        PoolError: the old folder holds no pool of the first version, or one that is damaged; or the
            new one can't be made.
    """
    old = Path(old)
    settings, records, loss = _read(old)
    names = {record["label"]: str(record.get("class_name", record["label"])) for record in records}
    class_names = [names.get(label, str(label)) for label in range(max(names, default=0) + 1)]
    batch_size = settings.get("batch_size")
    size = batch_size if type(batch_size) is int and batch_size > 0 else 1
    with Pool.create(new, settings, class_names, background="black") as pool:
        for start in range(0, len(records), size):
            batch = records[start : start + size]
            images, masks = zip(*_pixels(old, batch), strict=True)
            entries = [{k: v for k, v in each.items() if k not in _FOLDERS} for each in batch]
            last = start + size >= len(records)
            with explained(f"migrating {old}"):
                pool.add(
                    torch.stack(images), torch.stack(masks), entries, loss=loss if last else None
                )
    return pool


def _read(old: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
    """Settings, records and loss."""
    with explained(f"reading {old / SETTINGS}"):
        settings = from_json((old / SETTINGS).read_text("utf-8"))
    version = settings.pop("format", None) if isinstance(settings, dict) else None
    if version != OLD_FORMAT:
        raise PoolError(f"expected {old} to be a {OLD_FORMAT}, got {version!r} in {SETTINGS}")
    records, path = [], old / _MANIFEST
    with explained(f"reading {path}"):
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for index, line in enumerate(lines):
            record = from_json(line)
            files = {key: f"{folder}/{index:06}.png" for key, folder in _FOLDERS.items()}
            label = record.get("label") if isinstance(record, dict) else None
            right = type(label) is int and label >= 0 and record.get("index") == index
            if not right or any(record.get(key) != file for key, file in files.items()):
                raise ValueError(f"line {index + 1} is not the record of image {index}")
            records.append(record)
    with explained(f"reading {old / _LOSS}"):
        loss = from_json((old / _LOSS).read_bytes()) if (old / _LOSS).exists() else None
    return settings, records, loss


def _pixels(old: Path, records: list[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Image [3, H, W] in [0, 1] and mask [rows, columns] of each record."""
    for record in records:
        image, mask = (
            torch.from_numpy(read_pixels(old / record[key])) for key in ("image", "mask")
        )
        yield image.permute(2, 0, 1).double() / 255, mask > 0
