"""Inverted images on disk: pixels, masks and provenance."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from smi_fast.background import Background
from smi_fast.pool import metadata
from smi_fast.pool.batch import Encoded, encode, unfinished
from smi_fast.pool.card import descriptions
from smi_fast.pool.contents import check_present, delete_pool, delete_strays
from smi_fast.pool.files import (
    PoolError,
    delete_pictures,
    explained,
    write_content,
)
from smi_fast.pool.layout import LOCK, LOSS, METADATA, SECONDS, SETTINGS, UNFINISHED
from smi_fast.pool.metadata import Record
from smi_fast.pool.parts import Part, check_free, images_of, is_held, read_parts, settle_parts, take
from smi_fast.pool.reading import Readable
from smi_fast.pool.settings import Settings, check_same, make_settings, read_settings


class Pool(Readable):
    """A folder of inverted images and their records.

    ``Pool(path)`` reads the records of a pool. :meth:`create` and :meth:`resume` return a pool to
    which images can be added.

    >>> result = invert(teacher, [1], iterations=3, schedule=Dense(), progress=False)
    >>> pool = Pool.create(folder / "pool", {"seed": 0}, ["cat", "dog"], background="blurred")
    >>> pool.add(result.images, result.masks, [{"label": 1}])
    >>> pool.records[0]["class_name"], pool.records[0]["file_name"]
    ('dog', 'images/0001/000000.png')

    Args:
        path: the folder.

    Raises:
        PoolError: it is a URL.

    Attributes:
        path: the folder.
        where: the folder as a text, or the URL of a :class:`smi_fast.pool.remote.RemotePool`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._lock: FileLock | None = None
        # The records and the bytes of the metadata, which only the holder of the lock may cache.
        self._records: list[Record] | None = None
        self._size = 0
        self._seconds_size: int | None = None
        self._ahead: dict[int, list[bytes]] = {}

    @classmethod
    def create(
        cls,
        path: str | Path,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        *,
        background: Background = "mean",
        overwrite: bool = False,
    ) -> Pool:
        """Start an empty pool.

        Args:
            path: a missing or empty folder, or a pool without images.
            settings: the settings that decide the images, as JSON values.
            class_names: of all classes of the teacher, by index.
            background: what the masked images show in place of stopped patches, see
                :meth:`InversionResult.over`.
            overwrite: delete the pool in the folder first, but no other files.

        Raises:
            ValueError: no background, or no class.
            PoolError: the folder holds something else than a pool; it holds a pool with images and
                ``overwrite`` is not set; it can't be written; or another process adds images.
        """
        pool, wanted = cls(path), make_settings(settings, class_names, background)
        with pool._opening():
            pool._start(wanted, overwrite)
        return pool

    @classmethod
    def resume(
        cls,
        path: str | Path,
        settings: Mapping[str, Any],
        class_names: Sequence[str],
        *,
        background: Background = "mean",
    ) -> Pool:
        """Continue a pool, or start one where the folder has none.

        Args:
            path: the folder.
            settings: the settings that the pool was made with.
            class_names: likewise.
            background: likewise.

        Raises:
            ValueError: no background, or no class.
            PoolError: the pool was made with other settings, lacks a file of an image, can't be
                read or written, or another process adds images.
        """
        pool, wanted = cls(path), make_settings(settings, class_names, background)
        with pool._opening():
            old = read_settings(pool.path)
            if old is None:
                pool._start(wanted, overwrite=False)
            else:
                check_same(pool.path, old, wanted)
                pool._describe(wanted, anew=False)
                found = pool._parse()
                pool._check_present(found[0])
                pool._settle(found)
        return pool

    def close(self) -> None:
        """Let another process add images. The end of this process does the same."""
        if self._lock is not None:
            self._lock.release()
            self._lock = self._records = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def records(self) -> list[Record]:
        """See :attr:`smi_fast.pool.reading.Readable.records`."""
        return super().records if self._records is None else list(self._records)

    @property
    def batches(self) -> int:
        """The number of batches that it held when it was opened, and that were added since."""
        return self._records[-1]["batch"] + 1 if self._records else 0

    @property
    def ahead(self) -> dict[int, range]:
        """The images of batches that a group made before their turn came, by the batch's number."""
        return images_of(self._ahead)

    @property
    def waiting(self) -> list[Record]:
        """The records of the images of :attr:`ahead`."""
        return list(map(metadata.to_record, chain(*self._ahead.values())))

    def add(
        self,
        images: Tensor,
        masks: Tensor,
        records: Sequence[Mapping[str, Any]],
        *,
        loss: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        moments: Sequence[Tensor] = (),
    ) -> None:
        """Add a batch of images. After an error the pool has none of them.

        Args:
            images: [B, 3, H, W] in [0, 1], stored with 8 bits.
            masks: bool [B, rows, columns], true at kept patches.
            records: of each image its ``label``, and further entries as JSON values. The pool adds
                ``file_name``, ``masked_file_name``, ``mask_file_name``, ``index``, ``batch``,
                ``batch_size``, ``class_name``, ``kept``, the patches of the mask, and ``sha256`` of
                the three files after each other.
            loss: of this batch: its ``history``, the values of each objective by its name, and its
                ``stops``. It replaces that of the batch before.
            seconds: that the batch took.
            moments: the images at some moments of their inversion, each as ``images``; of each
                image ``report/progress/`` shows them side by side.

        Raises:
            ValueError: shapes or types don't fit, a label is no class of the pool, a record has a
                NaN or an infinity, or the pool was opened to be read only.
            PoolError: a file can't be written. The pool is then as it was before.
        """
        where = {"batch": self.batches, "start": self._held}
        made = encode(self.settings, images, masks, records, moments, **where)
        self.add_encoded(made, loss=loss, seconds=seconds)

    def add_encoded(
        self,
        made: Encoded,
        *,
        loss: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> None:
        """Add a batch of :func:`smi_fast.pool.batch.encode`, see :meth:`add`.

        Raises:
            ValueError: the pool was opened to be read only.
            PoolError: a file can't be written. The pool is then as it was before.
        """
        if self._lock is None or self._records is None:
            raise ValueError("expected a pool of Pool.create or Pool.resume, Pool(path) only reads")
        if not made.lines:
            return
        loss_line = None if loss is None else metadata.to_line(loss)
        time_line = metadata.to_line({"batch": self.batches, "seconds": seconds})
        try:
            self._write(made.files)
            if loss_line is not None:
                self._write({LOSS: loss_line})
            self._append(made.lines, None if seconds is None else time_line)
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, PoolError):
                    metadata.cut(self.path / METADATA, self._size)
                self._settle()  # an interrupt may have come after the last line
            raise
        self._records.extend(map(metadata.to_record, made.lines))
        self._discard_unfinished()
        if self._ahead:
            self._absorb()
            if not self._ahead:
                settle_parts(self.path, {})

    def add_unfinished(self, images: Tensor) -> None:
        """Save the images of an interrupted batch as ``unfinished/000000.png`` and so on.

        They are not part of the pool, and :meth:`add` deletes them.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            PoolError: a file can't be written.
        """
        self._write(unfinished(images, self._held))

    def gather(self) -> None:
        """Take over what the processes of a group have added, as far as its turn has come.

        Raises:
            PoolError: a part of the metadata is damaged, one of its pictures is missing, or a file
                can't be written.
        """
        names = self.settings["class_names"]
        self._ahead = read_parts(self.path, names, self.batches)
        self._check_present(self.waiting)
        self._absorb()
        settle_parts(self.path, self._ahead)
        self._discard_unfinished(before=self._held)

    def _absorb(self) -> None:
        """Append the batches of parts whose turn has come to the metadata."""
        lines = take(self._ahead, self.batches, self._held)
        if lines and self._records is not None:
            self._append_lines(lines)
            self._records.extend(map(metadata.to_record, lines))

    def part(self, rank: int) -> Part:
        """What the process of this rank adds to the pool, in a group of processes.

        Raises:
            PoolError: it can't be written, or another process of this rank writes it.
        """
        return Part(self.path, self.settings, rank)

    def part_is_held(self, rank: int) -> bool:
        """Whether a process of this rank holds its part of the pool."""
        return is_held(self.path, rank)

    def bring(self, names: Iterable[str]) -> None:
        """See that these files of the pool are in its folder, where a pool keeps them anyway."""

    @property
    def _held(self) -> int:
        """The number of images."""
        return len(self._records or ())

    def _settle(self, found: tuple[list[Record], int] | None = None) -> None:
        """Hold what the pool has, and delete what an interrupted batch left."""
        self._records, self._size = found or self._parse()
        with explained(f"writing {self.path / METADATA}"):
            metadata.cut(self.path / METADATA, self._size)
        self.gather()
        ahead = {index for images in self.ahead.values() for index in images}
        self._delete_strays(ahead)

    def _explained(self, name: str) -> Any:
        return explained(f"writing {self.path / name}", self._outcome)

    @property
    def _outcome(self) -> str:
        return f"; images safe in the pool: {self._held}"

    def _write(self, contents: Mapping[str, bytes]) -> None:
        for name, content in contents.items():
            write_content(self.path / name, content, self._outcome)

    def _append(self, lines: Sequence[bytes], times: bytes | None) -> None:
        """Append a batch's lines, from which on the pool has it."""
        if times is not None:
            with self._explained(SECONDS):
                size = self._seconds_size
                self._seconds_size = metadata.append(self.path / SECONDS, times, size)
        self._append_lines(lines)

    def _append_lines(self, lines: Sequence[bytes]) -> None:
        with self._explained(METADATA):
            self._size = metadata.append(self.path / METADATA, b"".join(lines), self._size)

    def _check_present(self, records: Iterable[Record]) -> None:
        check_present(self.path, records)

    def _delete(self) -> None:
        delete_pool(self.path)

    def _delete_strays(self, spared: set[int]) -> None:
        delete_strays(self.path, self._held, spared)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Hold the lock from here on, unless the body fails."""
        read_settings(
            self.path
        )  # before the lock, which is a file, so that none is put among foreign ones
        lock = FileLock(self.path / LOCK, timeout=0)
        with explained(f"opening {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise PoolError(f"another process adds images to {self.path}") from None
        self._lock = lock
        try:
            check_free(self.path)
            yield
        except BaseException:
            self.close()
            raise

    def _start(self, settings: Settings, overwrite: bool) -> None:
        if read_settings(self.path) is not None:
            if overwrite:
                self._delete()
            elif self.records or self._begun():
                raise PoolError(
                    f"{self.path} is not empty: continue it with --resume or replace it with "
                    "--overwrite"
                )
        content = json.dumps(settings, indent=2, allow_nan=False) + "\n"
        self._write({SETTINGS: content.encode()})
        self._describe(settings, anew=True)
        self._settle()

    def _begun(self) -> bool:
        """Whether processes of a group have left images, though the metadata has none."""
        return bool(read_parts(self.path, self.settings["class_names"], 0))

    def _describe(self, settings: Settings, anew: bool) -> None:
        """Write what explains the pool, where it is missing or for all."""
        for name, content in descriptions(settings).items():
            if anew or not (self.path / name).exists():
                self._write({name: content})

    def _discard_unfinished(self, before: int = sys.maxsize) -> None:
        """Delete unfinished images, or only those with a smaller number."""
        with suppress(OSError):
            delete_pictures(self.path / UNFINISHED, range(before))
