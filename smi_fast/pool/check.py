"""Whether a pool has the files that its records name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smi_fast.pool.files import PoolError, explained, file_names
from smi_fast.pool.layout import FOLDERS


def check_present(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
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
                raise PoolError(
                    f"{path / record[key]} is missing: put it back, or make the pool anew with "
                    "--overwrite"
                )
