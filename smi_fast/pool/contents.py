"""The files of a pool: which are missing, which have no line, and the deletion of them all."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from smi_fast.pool.files import (
    PoolError,
    delete_file,
    delete_pictures,
    explained,
    file_names,
    picture_number,
)
from smi_fast.pool.layout import (
    CARD,
    CLASSES,
    FOLDERS,
    METADATA,
    PARTS,
    PROGRESS,
    REPORTS,
    UNFINISHED,
)
from smi_fast.pool.parts import delete_parts


def check_present(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a pool in ``path`` that lacks a file of an image.

    Raises:
        PoolError: it lacks one, or its folders can't be read.
    """
    # Listing a folder takes far less time than asking for each of its files.
    names: dict[str, set[str]] = {}
    for record in records:
        for key in FOLDERS:
            folder, _, name = record[key].rpartition("/")
            if folder not in names:
                with explained(f"reading {path / folder}"):
                    names[folder] = file_names(path / folder)
            if name not in names[folder]:
                raise missing(path / record[key])


def missing(file: str | Path) -> PoolError:
    """The error of a pool that lacks a file of an image."""
    return PoolError(f"{file} is missing: put it back, or make the pool anew with --overwrite")


def strays(path: Path, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The pictures that no record names, which loaders of folders would find."""
    named = {record[key] for record in records for key in FOLDERS}
    found = [
        f"{folder.relative_to(path).as_posix()}/{name}"
        for folder in _class_folders(path)
        for name in sorted(file_names(folder))
        if picture_number(name) is not None
    ]
    return [name for name in found if name not in named]


def delete_strays(path: Path, held: int, spared: Container[int] = ()) -> None:
    """Delete the images from index ``held`` on, which loaders of folders would find.

    Args:
        path: folder of the pool.
        held: number of images that have a line in the metadata.
        spared: images that have one elsewhere.
    """
    with suppress(OSError):
        for folder in (*reversed(_class_folders(path)), path / PROGRESS):
            delete_pictures(folder, range(held, sys.maxsize), spared)


def delete_pool(path: Path) -> None:
    """Delete everything but the settings, which mark the folder as a pool until the end.

    The metadata goes first, so that no line outlives its files.

    Raises:
        PoolError: a folder is a symbolic link, or a file can't be deleted.
    """
    with explained(f"reading {path}"):
        folders = [*_class_folders(path), path / UNFINISHED, path / PROGRESS]
    for folder in filter(Path.is_symlink, (*folders, path / "report", path / PARTS)):
        raise PoolError(
            f"{folder} is a symbolic link, which is not followed, so {path} is not overwritten"
        )
    with explained(f"deleting {path}"):
        for name in (METADATA, CLASSES, CARD, *REPORTS):
            delete_file(path / name)
        delete_parts(path)
        for folder in reversed(folders):
            delete_pictures(folder)
        with suppress(OSError):
            (path / "report").rmdir()


def _class_folders(path: Path) -> list[Path]:
    """The folders of classes, and above each three the one that holds them."""
    found = []
    for folder in map(path.__truediv__, FOLDERS.values()):
        found.append(folder)
        if folder.is_dir() and not folder.is_symlink():
            found += [each for each in folder.iterdir() if each.name.isdecimal()]
    return found
