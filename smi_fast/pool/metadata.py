"""The records of a pool's images: lines of JSON to which whole batches are appended.

A killed process may leave a part of its last batch. Readers ignore that part, and the next writer
cuts it off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smi_fast.pool.layout import files_of

Record = dict[str, Any]


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


def parse(content: bytes) -> tuple[list[Record], int]:
    """The records of whole batches, and the number of bytes that they take.

    Raises:
        ValueError: a line isn't the record of its image.
    """
    records: list[Record] = []
    whole = position = 0
    batch, start, end = -1, 0, 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        index, record = len(records), from_json(line)
        if index == end:
            batch, start, end = batch + 1, end, end + _number(record, "batch_size", least=1)
        label = _number(record, "label", least=0)
        expected: Record = {"batch": batch, "batch_size": end - start, "label": label}
        expected |= files_of(index, label)
        if not isinstance(record, dict) or any(record.get(k) != v for k, v in expected.items()):
            raise ValueError(f"line {index + 1} is not the record of image {index}")
        records.append(record)
        position += len(line)
        if len(records) == end:
            whole = position
    return records[: end if len(records) == end else start], whole


def _number(record: Any, key: str, least: int) -> int:
    """A whole number of a record; ``least`` where it is damaged, which no record then agrees to."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if type(value) is int and value >= least else least


def append(path: Path, records: Sequence[Record], size: int) -> int:
    """Append a batch and return the size of the file; after an error, :func:`cut` undoes it.

    Args:
        path: the file.
        records: of the batch.
        size: of the file so far, in bytes.

    Raises:
        OSError: the system's error.
    """
    content = b"".join(map(to_line, records))
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
