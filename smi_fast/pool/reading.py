"""What a pool tells to readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smi_fast.pool import metadata
from smi_fast.pool.files import PoolError, explained, folder_of
from smi_fast.pool.layout import LOSS, METADATA
from smi_fast.pool.metadata import Record
from smi_fast.pool.settings import Settings, read_settings


class Readable:
    """The settings and records of a pool in a folder, which may be filled meanwhile.

    Args:
        path: the folder.

    Raises:
        PoolError: it is a URL.

    Attributes:
        path: the folder.
        where: the folder as a text, or the URL of a :class:`smi_fast.pool.remote.RemotePool`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = folder_of(path)
        self.where = str(path)

    @property
    def settings(self) -> Settings:
        """What the pool was made with, ``background`` and ``class_names`` included.

        Raises:
            PoolError: the folder holds no pool, or its settings can't be read.
        """
        settings = read_settings(self.path)
        if settings is None:
            raise PoolError(f"expected a pool in {self.path}, got an empty or missing folder")
        return settings

    @property
    def records(self) -> list[Record]:
        """The record of each image, in the order of their index.

        The file is read anew each time, but not while this pool is the one that adds images.

        Raises:
            PoolError: the folder holds something else than a pool, its metadata can't be read, or
                a line isn't the record of its image.
        """
        return self._parse()[0]

    @property
    def loss(self) -> dict[str, Any] | None:
        """What the last :meth:`add` was given as ``loss``, or None.

        Raises:
            PoolError: the file can't be read, or holds something else.
        """
        with explained(f"reading {self.path / LOSS}"):
            try:
                return metadata.parse_loss((self.path / LOSS).read_bytes())
            except FileNotFoundError:
                return None

    def _parse(self) -> tuple[list[Record], int]:
        """The records, and the number of bytes that they take."""
        settings = read_settings(self.path)
        if settings is None:
            return [], 0
        return metadata.read(self.path / METADATA, settings["class_names"])
