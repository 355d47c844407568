"""Parts of a pool's metadata, each written by one process of a group.

A part is a file ``parts/0001.jsonl`` with lines that the metadata will have, in whole batches of
any numbers. The process that holds the pool's lock moves them to the metadata when their turn has
come, see :meth:`smi_fast.pool.Pool.gather`. Until then ``parts/ahead.jsonl`` keeps the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from smi_fast.pool import metadata
from smi_fast.pool.batch import encode, unfinished
from smi_fast.pool.files import (
    PoolError,
    delete_file,
    explained,
    write_atomically,
    write_content,
)
from smi_fast.pool.layout import LOSS, PARTS, SECONDS
from smi_fast.pool.settings import Settings

_AHEAD = "ahead.jsonl"
_LINES = re.compile(r"[0-9]{4,}\.jsonl|ahead\.jsonl")
_SECONDS = re.compile(r"[0-9]{4,}\.seconds\.jsonl")
_LOCKS = re.compile(r"[0-9]{4,}\.lock")
_OUTCOME = "; the images before this batch are safe in the pool"


class Part:
    """What one process of a group adds to a pool.

    Args:
        path: folder of the pool.
        settings: of the pool.
        rank: of the process.

    Raises:
        PoolError: the part can't be written, or another process writes it.
    """

    def __init__(self, path: Path, settings: Settings, rank: int) -> None:
        self.path, self._settings = path, settings
        self._lines = path / PARTS / f"{rank:04}.jsonl"
        self._seconds = path / PARTS / f"{rank:04}.seconds.jsonl"
        self._size = 0
        self._lock = FileLock(_lock_file(path, rank), timeout=0)
        with explained(f"opening {self._lines}"):
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                raise PoolError(f"another process adds images to {path}") from None

    def add(
        self,
        images: Tensor,
        masks: Tensor,
        records: Sequence[Mapping[str, Any]],
        *,
        batch: int,
        start: int,
        loss: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        moments: Sequence[Tensor] = (),
    ) -> None:
        """Add a batch, as :meth:`smi_fast.pool.Pool.add` does.

        Args:
            images: see there, as the next two.
            masks: likewise.
            records: likewise.
            batch: number of the batch in the pool.
            start: index of its first image.
            loss: see there, as the next two.
            seconds: likewise.
            moments: likewise.

        Raises:
            ValueError: see there.
            PoolError: a file can't be written. The part is then as it was before.
        """
        made = encode(self._settings, images, masks, records, moments, batch=batch, start=start)
        self._write(made.files)
        if loss is not None:
            self._write({LOSS: metadata.to_line(loss)})
        times = metadata.to_line({"batch": batch, "seconds": seconds})
        self._append(batch, made.lines, None if seconds is None else times)

    def add_unfinished(self, images: Tensor, start: int) -> None:
        """Save the images of an interrupted batch, whose first one has the index ``start``.

        Raises:
            PoolError: a file can't be written.
        """
        self._write(unfinished(images, start))

    def close(self) -> None:
        """Let the process that holds the pool's lock take the part."""
        self._lock.release()

    def _write(self, contents: Mapping[str, bytes]) -> None:
        for name, content in contents.items():
            write_content(self.path / name, content, _OUTCOME)

    def _append(self, batch: int, lines: Sequence[bytes], times: bytes | None) -> None:
        """Append a batch's lines, from which on the part has it."""
        if times is not None:
            with explained(f"writing {self._seconds}", _OUTCOME):
                metadata.append(self._seconds, times)
        try:
            with explained(f"writing {self._lines}", _OUTCOME):
                self._size = metadata.append(self._lines, b"".join(lines), self._size)
        except PoolError:
            with suppress(OSError):
                metadata.cut(self._lines, self._size)
            raise


def check_free(path: Path) -> None:
    """Refuse a pool to which processes of a group still add images.

    Raises:
        PoolError: one holds its part.
    """
    if any(map(_is_locked, _files(path, _LOCKS))):
        raise PoolError(f"another process adds images to {path}")


def is_held(path: Path, rank: int) -> bool:
    """Whether a process of this rank holds its part of the pool in ``path``."""
    return _is_locked(_lock_file(path, rank))


def _lock_file(path: Path, rank: int) -> Path:
    return path / PARTS / f"{rank:04}.lock"


def _is_locked(file: Path) -> bool:
    with explained(f"opening {file}"):
        try:
            FileLock(file, timeout=0).acquire().lock.release()
        except Timeout:
            return True
    return False


def read_parts(path: Path, class_names: Sequence[str], first: int) -> dict[int, list[bytes]]:
    """The lines of each whole batch in the parts of a pool, by its number.

    A part whose process was killed may end amid a batch, which is left out.

    Args:
        path: folder of the pool.
        class_names: of all classes of the teacher, by index.
        first: number of the first batch that is wanted.

    Raises:
        PoolError: a part can't be read, or has a line that is no record of its batch.
    """
    found: dict[int, list[bytes]] = {}
    for file in _files(path, _LINES):
        with explained(f"reading {file}"):
            for batch, lines in _whole_batches(file, class_names):
                if batch >= first:
                    found[batch] = lines
    return found


def _whole_batches(file: Path, class_names: Sequence[str]) -> list[tuple[int, list[bytes]]]:
    found: list[tuple[int, list[bytes]]] = []
    batch, size, start, lines = 0, 0, 0, list[bytes]()
    for number, line in enumerate(metadata.whole_lines(file.read_bytes()).splitlines(True), 1):
        numbers = metadata.numbers_of_a_batch(metadata.from_json(line), class_names)
        if numbers is not None and not lines:
            batch, size, start = numbers
        if numbers != (batch, size, start + len(lines)):
            raise ValueError(f"line {number} is not the record of an image of its batch")
        lines.append(line)
        if len(lines) == size:
            found.append((batch, lines))
            lines = []
    return found


def images_of(ahead: Mapping[int, Sequence[bytes]]) -> dict[int, range]:
    """The indices of each batch's images, by the number of the batch."""
    found = {}
    for batch, lines in ahead.items():
        start = metadata.from_json(lines[0])["index"]
        found[batch] = range(start, start + len(lines))
    return found


def take(ahead: dict[int, list[bytes]], batch: int, start: int) -> list[bytes]:
    """Remove the batches that follow each other from number ``batch`` on, and return their lines.

    Raises:
        PoolError: the first image isn't ``start``.
    """
    lines: list[bytes] = []
    for number in range(batch, batch + len(ahead)):
        if number not in ahead:
            break
        lines += ahead.pop(number)
    if lines and metadata.from_json(lines[0])["index"] != start:
        raise PoolError(
            f"expected image {start} first in batch {batch} of {PARTS}/, got image "
            f"{metadata.from_json(lines[0])['index']}: make the pool anew with --overwrite"
        )
    return lines


def settle_parts(path: Path, ahead: Mapping[int, Sequence[bytes]]) -> None:
    """Delete all parts but for the batches whose turn has not come.

    Args:
        path: folder of the pool.
        ahead: the lines of these batches.

    Raises:
        PoolError: a file can't be written or deleted.
    """
    with explained(f"writing {path / PARTS}"):
        seconds = b"".join(map(Path.read_bytes, _files(path, _SECONDS)))
        if seconds:
            metadata.append(path / SECONDS, metadata.whole_lines(seconds))
        if ahead:
            content = b"".join(line for batch in sorted(ahead) for line in ahead[batch])
            write_atomically(path / PARTS / _AHEAD, lambda file: file.write(content))
        delete_parts(path, keep=_AHEAD if ahead else "")


def delete_parts(path: Path, keep: str = "") -> None:
    """Delete the parts of a pool, but for the file ``keep``.

    Raises:
        OSError: the system's error.
    """
    for pattern in (_LINES, _SECONDS, _LOCKS):
        for file in _files(path, pattern):
            if file.name != keep:
                delete_file(file)
    with suppress(OSError):
        (path / PARTS).rmdir()


def _files(path: Path, pattern: re.Pattern[str]) -> list[Path]:
    folder = path / PARTS
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name))
