"""The records of a pool's images: lines of JSON to which whole batches are appended.

A killed process may leave a part of its last batch. Readers ignore that part, and the next writer
cuts it off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from sys import intern
from typing import Any

from smi_fast.pool.files import explained
from smi_fast.pool.layout import FOLDERS, SECONDS, files_of

Record = dict[str, Any]
# The entries whose text is another one in each record.
_DISTINCT = {*FOLDERS, "sha256"}


def to_line(entries: Mapping[str, Any]) -> bytes:
    """Entries as one line of JSON.

    Raises:
        ValueError: an infinite number or NaN.
    """
    return json.dumps(entries, allow_nan=False).encode() + b"\n"


def from_json(text: str | bytes) -> Any:
    """A value of JSON.

    Raises:
        ValueError: other text, NaN and Infinity included.
    """
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")


def whole_lines(content: bytes) -> bytes:
    """The content up to its last line that has an end."""
    return content[: content.rfind(b"\n") + 1]


def read(path: Path, class_names: Sequence[str]) -> tuple[list[Record], int]:
    """What :func:`parse` finds in a file; nothing where there is none.

    Raises:
        PoolError: it can't be read, or a line isn't the record of its image.
    """
    with explained(f"reading {path}"):
        try:
            with path.open("rb") as lines:
                return parse(lines, class_names)
        except FileNotFoundError:
            return [], 0


def parse(lines: Iterable[bytes], class_names: Sequence[str]) -> tuple[list[Record], int]:
    """The records of whole batches, and the number of bytes that they take.

    Args:
        lines: of the file, each with its end; one without an end is the last that counts.
        class_names: of all classes of the teacher, by index.

    Raises:
        ValueError: a line isn't the record of its image.
    """
    records: list[Record] = []
    start = end = size = whole = 0  # the last batch is records[start:end]
    batch = -1
    for index, line in enumerate(lines):
        if not line.endswith(b"\n"):
            break
        record = to_record(line)
        if index == end:
            batch, start, end = batch + 1, end, end + _number(record, "batch_size", least=1)
        if not _belongs(record, index, batch, end - start, class_names):
            raise ValueError(f"line {index + 1} is not the record of image {index}")
        records.append(record)
        size += len(line)
        if index + 1 == end:
            whole = size
    return records[: end if len(records) == end else start], whole


def to_record(line: bytes) -> Any:
    """The entries of a line. Equal texts of different lines are one object, to save memory.

    Raises:
        ValueError: no JSON, NaN and Infinity included.
    """
    return _DECODE(line.decode())


def _sharing(pairs: list[tuple[str, Any]]) -> Record:
    return {
        intern(key): intern(value) if type(value) is str and key not in _DISTINCT else value
        for key, value in pairs
    }


_DECODE = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_sharing).decode


def numbers_of_a_batch(record: Any, class_names: Sequence[str]) -> tuple[int, int, int] | None:
    """Batch, its size and the image's index, of a record of its own; None for another value."""
    batch, size = _number(record, "batch", least=0), _number(record, "batch_size", least=1)
    index = _number(record, "index", least=0)
    return (batch, size, index) if _belongs(record, index, batch, size, class_names) else None


def _number(record: Any, key: str, least: int) -> int:
    """A whole number of a record; ``least`` where it is damaged, which no record then agrees to."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if type(value) is int and value >= least else least


def _belongs(
    record: Any, index: int, batch: int, batch_size: int, class_names: Sequence[str]
) -> bool:
    """Whether a record has the entries that a pool gives its image."""
    label = _number(record, "label", least=0)
    if label >= len(class_names):
        return False
    expected: Record = {"index": index, "batch": batch, "batch_size": batch_size, "label": label}
    expected |= {"class_name": class_names[label]}
    expected |= files_of(index, label, len(class_names))
    # JSON's true and 1.0 equal 1, and False 0.
    return isinstance(record, dict) and all(
        record.get(key) == value and type(record[key]) is type(value)
        for key, value in expected.items()
    )


def parse_loss(content: bytes) -> dict[str, Any]:
    """The loss of a batch, from its file.

    Raises:
        ValueError: it is something else.
    """
    loss = from_json(content)
    history, stops = (isinstance(loss, dict) and loss.get(key) for key in ("history", "stops"))
    lists = [stops, *history.values()] if isinstance(history, dict) else [None]
    for numbers in lists:
        if not isinstance(numbers, list) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError("it is not the loss of a batch")
    return dict(loss)


def read_seconds(path: Path) -> dict[int, float]:
    """How long each batch of the pool in ``path`` took, by its number, where the pool knows it.

    Raises:
        PoolError: the file can't be read.
    """
    file = path / SECONDS
    with explained(f"reading {file}"):
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        entries = [from_json(line) for line in lines if line.endswith(b"\n")]
        return {entry["batch"]: entry["seconds"] for entry in entries}


def append(path: Path, content: bytes, size: int | None = None) -> int:
    """Append whole lines and return the size of the file.

    Args:
        path: the file.
        content: the lines.
        size: of the file so far, in bytes, beyond which it is cut off; by default that of its
            whole lines, for which the file is read.

    Raises:
        OSError: the system's error; :func:`cut` undoes what was written.
    """
    if size is None:
        size = len(whole_lines(path.read_bytes())) if path.exists() else 0
    cut(path, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return size + len(content)


def cut(path: Path, size: int) -> None:
    """Shorten the file to ``size`` bytes; a file without any is deleted.

    Raises:
        OSError: the system's error.
    """
    if size == 0:
        path.unlink(missing_ok=True)
    elif path.stat().st_size > size:
        os.truncate(path, size)
