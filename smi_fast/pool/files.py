"""Files of a pool: written completely or not at all, and deleted only when they are the pool's."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_NUMBER = "([0-9]{6}|[1-9][0-9]{6,})"
# With one slash too, because a Path makes one of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+:/")
_PASSWORD = re.compile(r"(:/{1,2}[^/:@]*):[^/]*@")
_PICTURE = re.compile(rf"{_NUMBER}\.png|\.{_NUMBER}\.png\.part")


class PoolError(OSError):
    """A pool can't be made, read or written; the message says what failed, and why."""


@contextmanager
def explained(action: str, outcome: str = "") -> Iterator[None]:
    """Turn an error of the system or of JSON into a PoolError with one sentence."""
    try:
        yield
    except PoolError:
        raise
    except RecursionError as error:
        raise PoolError(f"{action} failed: it is nested too deep{outcome}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PoolError(f"{action} failed: {reason}{outcome}") from error


def is_url(path: str | Path) -> bool:
    """Whether this is the URL of a pool, and no folder."""
    return _URL.match(str(path)) is not None


def without_password(text: str) -> str:
    """A URL, or a sentence with one, as users and log files may see it."""
    return _PASSWORD.sub(r"\1:***@", text)


def folder_of(path: str | Path) -> Path:
    """The folder of a pool.

    Raises:
        PoolError: it is a URL, which would become a folder with a strange name.
    """
    if is_url(path):
        raise PoolError(
            "expected a folder that this machine sees, got the URL "
            f"{without_password(str(path))}, which is for RemotePool"
        )
    return Path(path)


def unfinished_name(path: Path) -> Path:
    """Where a file is written before it is complete."""
    return path.with_name(f".{path.name}.part")


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file completely, or leave it as it was.

    Args:
        path: the file; replaced when it exists, its folder made when missing.
        write: called with a binary file, to which it writes the content.

    Raises:
        OSError: the system's error. The file is then as it was before.
    """
    path = Path(path)
    temporary = unfinished_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_content(path: Path, content: bytes, outcome: str = "") -> None:
    """Write a whole file.

    Args:
        path: the file.
        content: of it.
        outcome: what an error says behind its reason.

    Raises:
        PoolError: it can't be written. It is then as it was before.
    """
    with explained(f"writing {path}", outcome):
        write_atomically(path, lambda file: file.write(content))


def file_names(folder: Path) -> set[str]:
    """The names of the files in a folder; none where it is missing.

    Raises:
        OSError: the system's error.
    """
    try:
        with os.scandir(folder) as found:
            return {entry.name for entry in found if entry.is_file()}
    except FileNotFoundError:
        return set()


def delete_file(path: Path) -> None:
    """Delete a file and what an interrupted write left of it; a missing file is no error."""
    path.unlink(missing_ok=True)
    unfinished_name(path).unlink(missing_ok=True)


def picture_number(name: str) -> int | None:
    """The number of a picture, also of a part of it; None for another name."""
    found = _PICTURE.fullmatch(name)
    return None if found is None else int(found[1] or found[2])


def delete_pictures(
    folder: Path, numbers: range = range(sys.maxsize), spared: Container[int] = ()
) -> None:
    """Delete the pictures that a pool wrote into a folder, and the folder when it is then empty.

    Files with other names stay, and so does everything behind a symbolic link.

    Args:
        folder: one of the pool's folders.
        numbers: of the pictures; by default all.
        spared: numbers of those that stay.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for name in os.listdir(folder):
        number = picture_number(name)
        if number is None or number not in numbers or number in spared:
            continue
        if not (folder / name).is_dir():
            (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()
