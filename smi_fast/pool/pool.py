"""Inverted images on disk: pixels, masks and provenance.

A pool is a folder::

    settings.json            what the folder is, and the settings that decided the images
    metadata.jsonl           one line per image: its files and its record
    classes.txt              the folder of each class of the teacher, by index
    README.md                what is in the folder and how to load it
    images/0207/000000.png   the whole image, in the folder of its class
    masked/0207/000000.png   its kept patches, over the pool's background
    masks/0207/000000.png    one pixel per patch: 255 kept, 0 stopped
    report/loss.json         the loss of the last batch, in each iteration
    report/seconds.jsonl     how long each batch took
    report/progress/         moments of each image's inversion side by side, if they were kept
    .lock                    held by the process that adds images

The settings decide every byte of it but those of ``report/seconds.jsonl``.

All files of a line in the metadata exist, even if writing was interrupted. A file without a line
remains from an interrupted write; :meth:`Pool.resume` deletes it. ``format`` in the settings marks
the folder as a pool. Without it nothing there is deleted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from smi_fast.background import Background
from smi_fast.pool import metadata
from smi_fast.pool.batch import Encoded, encode, png, to_uint8
from smi_fast.pool.card import card
from smi_fast.pool.contents import check_present, delete_pool, delete_strays
from smi_fast.pool.files import (
    PoolError,
    delete_pictures,
    explained,
    unfinished_name,
    write_atomically,
)
from smi_fast.pool.layout import (
    CARD,
    CLASSES,
    LOCK,
    LOSS,
    METADATA,
    SECONDS,
    SETTINGS,
    UNFINISHED,
    class_folder,
    picture_name,
)
from smi_fast.pool.metadata import Record
from smi_fast.pool.settings import Settings, check_same, make_settings, not_a_pool, parse_settings

# What a process that was killed before it wrote the settings may have left.
_TRACES = {LOCK, unfinished_name(Path(SETTINGS)).name}


class Pool:
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

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FileLock | None = None
        # The records and the bytes of the metadata, which only the holder of the lock may cache.
        self._records: list[Record] | None = None
        self._size = 0
        self._seconds_size: int | None = None

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
            old = pool._settings()
            if old is None:
                pool._start(wanted, overwrite=False)
            else:
                check_same(pool.path, old, wanted)
                pool._describe(wanted, anew=False)
                found = pool._parse()
                check_present(pool.path, found[0])
                pool._settle(found)
                pool._discard_unfinished(before=pool._held)
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
    def settings(self) -> Settings:
        """What the pool was made with, ``background`` and ``class_names`` included.

        Raises:
            PoolError: the folder holds no pool, or its settings can't be read.
        """
        settings = self._settings()
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
        return self._parse()[0] if self._records is None else list(self._records)

    @property
    def loss(self) -> dict[str, Any] | None:
        """What the last :meth:`add` was given as ``loss``, or None.

        Raises:
            PoolError: the file can't be read, or holds something else.
        """
        loss: dict[str, Any] | None = self._read(LOSS, metadata.parse_loss, missing=None)
        return loss

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
        where = {"batch": self._batches, "start": self._held}
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
        time_line = metadata.to_line({"batch": self._batches, "seconds": seconds})
        try:
            for name, content in made.files.items():
                self._write(name, content)
            if loss_line is not None:
                self._write(LOSS, loss_line)
            if seconds is not None:
                with self._explained(SECONDS):
                    size = self._seconds_size
                    self._seconds_size = metadata.append(self.path / SECONDS, time_line, size)
            with self._explained(METADATA):
                content = b"".join(made.lines)
                self._size = metadata.append(self.path / METADATA, content, self._size)
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, PoolError):
                    metadata.cut(self.path / METADATA, self._size)
                self._settle()  # an interrupt may have come after the last line
            raise
        self._records.extend(map(metadata.to_record, made.lines))
        self._discard_unfinished()

    def add_unfinished(self, images: Tensor) -> None:
        """Save the images of an interrupted batch as ``unfinished/000000.png`` and so on.

        They are not part of the pool, and :meth:`add` deletes them.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            PoolError: a file can't be written.
        """
        for index, pixels in enumerate(to_uint8(images), start=self._held):
            self._write(f"{UNFINISHED}/{picture_name(index)}", png(pixels))

    def _read(self, name: str, parse: Callable[[bytes], Any], missing: Any) -> Any:
        with explained(f"reading {self.path / name}"):
            try:
                return parse((self.path / name).read_bytes())
            except FileNotFoundError:
                return missing

    def _parse(self) -> tuple[list[Record], int]:
        """The records, and the number of bytes that they take."""
        settings = self._settings()
        if settings is None:
            return [], 0
        path = self.path / METADATA
        with explained(f"reading {path}"):
            try:
                with path.open("rb") as lines:
                    return metadata.parse(lines, settings["class_names"])
            except FileNotFoundError:
                return [], 0

    @property
    def _held(self) -> int:
        """The number of images."""
        return len(self._records or ())

    @property
    def _batches(self) -> int:
        return self._records[-1]["batch"] + 1 if self._records else 0

    def _settle(self, found: tuple[list[Record], int] | None = None) -> None:
        """Hold what the pool has, and delete what an interrupted batch left."""
        self._records, self._size = found or self._parse()
        with explained(f"writing {self.path / METADATA}"):
            metadata.cut(self.path / METADATA, self._size)
        delete_strays(self.path, self._held)

    def _explained(self, name: str) -> Any:
        return explained(f"writing {self.path / name}", f"; images safe in the pool: {self._held}")

    def _write(self, name: str, content: bytes) -> None:
        with self._explained(name):
            write_atomically(self.path / name, lambda file: file.write(content))

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Hold the lock from here on, unless the body fails."""
        self._settings()  # before the lock, which is a file, so that none is put among foreign ones
        lock = FileLock(self.path / LOCK, timeout=0)
        with explained(f"opening {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                raise PoolError(f"another process adds images to {self.path}") from None
        self._lock = lock
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _settings(self) -> Settings | None:
        """The settings, or None where there is no pool yet.

        Raises:
            PoolError: the folder holds something else than a pool.
        """
        with explained(f"opening {self.path}"):
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if names <= _TRACES:
            return None
        settings: Settings | None = self._read(
            SETTINGS, partial(parse_settings, path=self.path), missing=None
        )
        if settings is None:
            raise not_a_pool(self.path)
        return settings

    def _start(self, settings: Settings, overwrite: bool) -> None:
        if self._settings() is not None:
            if overwrite:
                delete_pool(self.path)
            elif self.records:
                raise PoolError(
                    f"{self.path} is not empty: continue it with --resume or replace it with "
                    "--overwrite"
                )
        content = json.dumps(settings, indent=2, allow_nan=False) + "\n"
        self._write(SETTINGS, content.encode())
        self._describe(settings, anew=True)
        self._settle()

    def _describe(self, settings: Settings, anew: bool) -> None:
        """Write what explains the pool to loaders and readers, where it is missing or for all."""
        count = len(settings["class_names"])
        folders = "".join(f"{class_folder(label, count)}\n" for label in range(count))
        for name, content in ((CLASSES, folders), (CARD, card(settings))):
            if anew or not (self.path / name).exists():
                self._write(name, content.encode())

    def _discard_unfinished(self, before: int = sys.maxsize) -> None:
        """Delete unfinished images, or only those with a smaller number."""
        with suppress(OSError):
            delete_pictures(self.path / UNFINISHED, range(before))
