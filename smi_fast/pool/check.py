"""Whether a pool is whole: every file there, and what was written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smi_fast.pool.batch import fingerprint
from smi_fast.pool.contents import strays
from smi_fast.pool.files import explained
from smi_fast.pool.layout import FOLDERS, PARTS
from smi_fast.pool.metadata import to_record
from smi_fast.pool.parts import read_parts
from smi_fast.pool.pool import Pool


def find_faults(path: str | Path) -> Iterator[str]:
    """Each fault of a pool, as a sentence; none of a pool that is whole.

    Of each image it reads the three files: they must be there, have the hash of the record and the
    size of the pool's first image, and the mask must show the record's kept patches. The label of
    a record must be that of its folder. A picture without a record is a fault too.

    >>> result = invert(teacher, [1], iterations=3, schedule=Dense(), progress=False)
    >>> pool = Pool.create(folder / "pool", {"seed": 0}, ["cat", "dog"])
    >>> pool.add(result.images, result.masks, [{"label": 1}])
    >>> (folder / "pool/masks/0001/000000.png").write_bytes(b"damaged")
    7
    >>> list(smi_fast.pool.check.find_faults(folder / "pool"))
    ['image 0: its files are not those that were written, by their hash']

    Args:
        path: folder of the pool.

    Raises:
        PoolError: the folder holds no pool, its metadata can't be read, or a line isn't the record
            of its image.
    """
    path, pool = Path(path), Pool(path)
    names, records = pool.settings["class_names"], pool.records
    size: tuple[int, int] | None = None
    for record in records:
        try:
            contents = [(path / record[key]).read_bytes() for key in FOLDERS]
        except OSError as error:
            yield f"image {record['index']}: {error.filename} can't be read: {error.strerror}"
            continue
        # Records of the first pools of this version have no hash.
        if "sha256" in record and fingerprint(contents) != record["sha256"]:
            yield (
                f"image {record['index']}: its files are not those that were written, by their hash"
            )
            continue
        try:
            whole, masked, mask = map(_pixels, contents)
        except Exception as error:  # Pillow has no common class for what a damaged file raises
            yield f"image {record['index']}: a file is no picture: {error}"
            continue
        size = size or whole.shape[:2]
        fault = _fault_of_pixels(record, whole, masked, mask, size)
        if fault:
            yield f"image {record['index']}: {fault}"
    waiting = [to_record(line) for lines in read_parts(path, names, 0).values() for line in lines]
    waiting = [record for record in waiting if record["index"] >= len(records)]
    if waiting:
        yield f"{path / PARTS} has {len(waiting)} images of an unfinished run: --resume takes them"
    with explained(f"reading {path}"):
        yield from (f"{path / name} has no record" for name in strays(path, [*records, *waiting]))


def _pixels(content: bytes) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture)


def _fault_of_pixels(
    record: Mapping[str, Any],
    whole: np.ndarray[Any, Any],
    masked: np.ndarray[Any, Any],
    mask: np.ndarray[Any, Any],
    size: tuple[int, ...],
) -> str | None:
    for name, pixels in (("whole", whole), ("masked", masked)):
        if pixels.shape != (*size, 3):
            return f"expected a {name} image of {[*size, 3]}, got {list(pixels.shape)}"
    if mask.ndim != 2 or any(side % count for side, count in zip(size, mask.shape, strict=True)):
        return f"expected a mask that divides {list(size)} pixels, got {list(mask.shape)}"
    kept = np.flatnonzero(mask).tolist()
    return None if kept == record.get("kept") else "its mask is not that of its kept patches"
