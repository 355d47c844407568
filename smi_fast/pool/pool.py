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
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from smi_fast.background import Background, over
from smi_fast.pool import metadata
from smi_fast.pool.batch import check_batch, check_labels, to_uint8
from smi_fast.pool.card import card
from smi_fast.pool.files import (
    PoolError,
    delete_file,
    delete_pictures,
    explained,
    unfinished_name,
    write_atomically,
)
from smi_fast.pool.layout import (
    CARD,
    CLASSES,
    FOLDERS,
    LOCK,
    LOSS,
    METADATA,
    PROGRESS,
    REPORTS,
    SECONDS,
    SETTINGS,
    UNFINISHED,
    class_folder,
    files_of,
    picture_name,
)
from smi_fast.pool.metadata import Record
from smi_fast.pool.settings import Settings, make_settings, not_a_pool, parse_settings

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
        # Images, batches and bytes of the metadata, which only the holder of the lock may cache.
        self._held = self._batches = self._size = 0

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
                pool._check_settings(old, wanted)
                pool._check_files()
                pool._settle()
                pool._discard_unfinished(before=pool._held)
        return pool

    def close(self) -> None:
        """Let another process add images. The end of this process does the same."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

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
        loss: dict[str, Any] | None = self._read(LOSS, _parse_loss, missing=None)
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
                ``batch_size``, ``class_name`` and ``kept``, the patches of the mask.
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
        if self._lock is None:
            raise ValueError("expected a pool of Pool.create or Pool.resume, Pool(path) only reads")
        settings = self.settings
        names = settings["class_names"]
        check_batch(images, masks, len(records))
        for moment in moments:
            check_batch(moment, masks, len(records))
        labels = check_labels(records, len(names))
        if not records:
            return
        pictures: dict[str, Image.Image] = {}
        lines = []
        masked = over(images.float(), masks, settings["background"])
        grey = (masks.cpu().byte() * 255).numpy()
        pixels = zip(to_uint8(images), to_uint8(masked), grey, strict=True)
        strips = None if not moments else to_uint8(torch.cat(list(moments), dim=3))
        kept = [mask.flatten().nonzero()[:, 0].tolist() for mask in masks.cpu()]
        for i, (record, label, each) in enumerate(zip(records, labels, pixels, strict=True)):
            index = self._held + i
            files = files_of(index, label, len(names))
            pictures |= zip(files.values(), map(Image.fromarray, each), strict=True)
            if strips is not None:
                pictures[f"{PROGRESS}/{picture_name(index)}"] = Image.fromarray(strips[i])
            own = {**files, "index": index, "batch": self._batches, "batch_size": len(records)}
            own |= {"label": label, "class_name": names[label], "kept": kept[i]}
            lines.append(metadata.to_line({**own, **record, **own}))
        loss_line = None if loss is None else metadata.to_line(loss)
        time_line = metadata.to_line({"batch": self._batches, "seconds": seconds})

        try:
            for name, picture in pictures.items():
                self._write(name, partial(picture.save, format="PNG"))
            if loss_line is not None:
                self._write_bytes(LOSS, loss_line)
            if seconds is not None:
                with self._explained(SECONDS):
                    metadata.append(self.path / SECONDS, time_line)
            with self._explained(METADATA):
                self._size = metadata.append(self.path / METADATA, b"".join(lines), self._size)
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, PoolError):
                    metadata.cut(self.path / METADATA, self._size)
                self._settle()  # an interrupt may have come after the last line
            raise
        self._held += len(records)
        self._batches += 1
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
            save = partial(Image.fromarray(pixels).save, format="PNG")
            self._write(f"{UNFINISHED}/{picture_name(index)}", save)

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
        parse = partial(metadata.parse, class_names=settings["class_names"])
        found: tuple[list[Record], int] = self._read(METADATA, parse, missing=([], 0))
        return found

    def _settle(self) -> None:
        """Count what the pool holds, and delete what an interrupted batch left."""
        records, self._size = self._parse()
        self._held = len(records)
        self._batches = records[-1]["batch"] + 1 if records else 0
        with explained(f"writing {self.path / METADATA}"):
            metadata.cut(self.path / METADATA, self._size)
        self._discard_strays()

    def _explained(self, name: str) -> Any:
        return explained(f"writing {self.path / name}", f"; images safe in the pool: {self._held}")

    def _write(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        with self._explained(name):
            write_atomically(self.path / name, write)

    def _write_bytes(self, name: str, content: bytes) -> None:
        self._write(name, lambda file: file.write(content))

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
                self._delete()
            elif self.records:
                raise PoolError(
                    f"{self.path} is not empty: continue it with --resume or replace it with "
                    "--overwrite"
                )
        content = json.dumps(settings, indent=2, allow_nan=False) + "\n"
        self._write_bytes(SETTINGS, content.encode())
        self._describe(settings, anew=True)
        self._settle()

    def _describe(self, settings: Settings, anew: bool) -> None:
        """Write what explains the pool to loaders and readers, where it is missing or for all."""
        count = len(settings["class_names"])
        folders = "".join(f"{class_folder(label, count)}\n" for label in range(count))
        for name, content in ((CLASSES, folders), (CARD, card(settings))):
            if anew or not (self.path / name).exists():
                self._write_bytes(name, content.encode())

    def _check_settings(self, old: Settings, settings: Settings) -> None:
        new = json.loads(json.dumps(settings))
        for key in old | new:
            with explained(f"reading {self.path / SETTINGS}"):
                before, now = (
                    json.dumps(side[key], sort_keys=True) if key in side else "nothing"
                    for side in (old, new)
                )
            if before != now:
                raise PoolError(
                    f"{self.path} can't be resumed: it was made with {key} = {before}, "
                    f"now it is {now}"
                )
        self._describe(settings, anew=False)

    def _check_files(self) -> None:
        for record in self.records:
            for key in FOLDERS:
                path = self.path / record[key]
                with explained(f"reading {path}"):
                    found = path.is_file()
                if not found:
                    raise PoolError(
                        f"{path} is missing: put it back, or make the pool anew with --overwrite"
                    )

    def _class_folders(self) -> list[Path]:
        """The folders of classes, and above each three the one that holds them."""
        found = []
        for folder in map(self.path.__truediv__, FOLDERS.values()):
            found.append(folder)
            if folder.is_dir() and not folder.is_symlink():
                found += [each for each in folder.iterdir() if each.name.isdecimal()]
        return found

    def _discard_strays(self) -> None:
        """Delete the images without a line, which loaders of folders would find."""
        with suppress(OSError):
            for folder in (*reversed(self._class_folders()), self.path / PROGRESS):
                delete_pictures(folder, range(self._held, sys.maxsize))

    def _discard_unfinished(self, before: int = sys.maxsize) -> None:
        """Delete unfinished images, or only those with a smaller number."""
        with suppress(OSError):
            delete_pictures(self.path / UNFINISHED, range(before))

    def _delete(self) -> None:
        """Delete everything but the settings, which mark the folder as a pool until the end.

        The metadata goes first, so that no line outlives its files.
        """
        with explained(f"reading {self.path}"):
            folders = [*self._class_folders(), self.path / UNFINISHED, self.path / PROGRESS]
        for folder in filter(Path.is_symlink, (*folders, self.path / "report")):
            raise PoolError(
                f"{folder} is a symbolic link, which is not followed, so {self.path} is not "
                "overwritten"
            )
        with explained(f"deleting {self.path}"):
            for name in (METADATA, CLASSES, CARD, *REPORTS):
                delete_file(self.path / name)
            for folder in reversed(folders):
                delete_pictures(folder)
            with suppress(OSError):
                (self.path / "report").rmdir()


def _parse_loss(content: bytes) -> dict[str, Any]:
    loss = metadata.from_json(content)
    history, stops = (isinstance(loss, dict) and loss.get(key) for key in ("history", "stops"))
    lists = [stops, *history.values()] if isinstance(history, dict) else [None]
    for numbers in lists:
        if not isinstance(numbers, list) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError("it is not the loss of a batch")
    return dict(loss)
