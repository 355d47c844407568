"""Pools in the layouts of other tools."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from smi_fast.pool.files import PoolError, explained, folder_of, write_content
from smi_fast.pool.layout import CLASSES, class_folder, picture_name
from smi_fast.pool.pool import Pool

MOST_BYTES = 256 * 2**20


def empty_folder(path: str | Path) -> Path:
    """A missing or empty folder, which it makes.

    Raises:
        PoolError: it has files, is a URL, or can't be made.
    """
    path = folder_of(path)
    with explained(f"opening {path}"):
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise PoolError(f"expected a missing or empty folder for --out, got files in {path}")
    return path


def export_imagenet(pool: str | Path, out: str | Path) -> int:
    """Copy a pool into ``out/train/0207/000000.png`` and so on.

    Its kept patches, over the pool's background, go into ``out/train_masked``, and the folders of
    all classes, by index, into ``out/classes.txt``.

    Args:
        pool: folder of the pool.
        out: a missing or empty folder.

    Returns:
        the number of images.

    Raises:
        PoolError: the pool can't be read, or the folder isn't empty or can't be written.
    """
    source = Pool(pool)
    records, classes = source.records, len(source.settings["class_names"])
    folder = empty_folder(out)
    for record in records:
        where = f"{class_folder(record['label'], classes)}/{picture_name(record['index'])}"
        for key, split in (("file_name", "train"), ("masked_file_name", "train_masked")):
            write_content(folder / split / where, _content(source.path / record[key]))
    lines = "".join(f"{class_folder(label, classes)}\n" for label in range(classes))
    write_content(folder / CLASSES, lines.encode())
    return len(records)


def export_webdataset(pool: str | Path, out: str | Path, *, most_bytes: int = MOST_BYTES) -> int:
    """Write a pool into tar files ``out/00000.tar`` and so on, as WebDataset reads them.

    Of image 12 there are ``000012.png``, ``000012.masked.png``, ``000012.mask.png``, ``000012.cls``
    with its label, and ``000012.json`` with its record.

    Args:
        pool: folder of the pool.
        out: a missing or empty folder.
        most_bytes: of a tar file, unless one image alone takes more.

    Returns:
        the number of images.

    Raises:
        PoolError: the pool can't be read, or the folder isn't empty or can't be written.
    """
    source = Pool(pool)
    records, _ = source.records, source.settings
    folder, number, content = empty_folder(out), 0, io.BytesIO()
    for record in records:
        stem = picture_name(record["index"]).removesuffix(".png")
        members = {
            f"{stem}.png": _content(source.path / record["file_name"]),
            f"{stem}.masked.png": _content(source.path / record["masked_file_name"]),
            f"{stem}.mask.png": _content(source.path / record["mask_file_name"]),
            f"{stem}.cls": str(record["label"]).encode(),
            f"{stem}.json": json.dumps(record).encode(),
        }
        image = b"".join(_member(name, each) for name, each in members.items())
        if content.tell() and content.tell() + len(image) + 1024 > most_bytes:
            write_content(folder / f"{number:05}.tar", content.getvalue() + bytes(1024))
            number, content = number + 1, io.BytesIO()
        content.write(image)
    if records:
        write_content(folder / f"{number:05}.tar", content.getvalue() + bytes(1024))
    return len(records)


def _member(name: str, content: bytes) -> bytes:
    """A file in a tar, without a time or an owner, so that the same pool gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _content(path: Path) -> bytes:
    with explained(f"reading {path}"):
        return path.read_bytes()
