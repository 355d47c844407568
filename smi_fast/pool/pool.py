"""Inverted images on disk: pixels, masks and provenance.

A pool is a folder::

    settings.json        what the folder is, and the settings that decided the images
    manifest.jsonl       one line per image: its files and its record
    images/000000.png    the whole image
    masked/000000.png    its kept patches, on black
    masks/000000.png     one pixel per patch: 255 kept, 0 stopped
    loss.json            the loss of the last batch, in each iteration
    .lock                held by the process that adds images

All files of a line in the manifest exist, even if writing was interrupted. A file without a line
remains from an interrupted write: readers ignore it, and the next image with its number replaces
it. ``format`` in the settings marks the folder as a pool. Without it nothing there is deleted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from smi_fast.pool.files import (
    PoolError,
    delete_file,
    delete_pictures,
    explained,
    unfinished_name,
    write_atomically,
)

FORMAT = "smi_fast pool 1"
SETTINGS = "settings.json"
MANIFEST = "manifest.jsonl"
LOSS = "loss.json"
CONTACT_SHEET = "contact_sheet.png"
LOSS_CURVES = "loss.png"
LOCK = ".lock"
UNFINISHED = "unfinished"
FOLDERS = {"image": "images", "masked": "masked", "mask": "masks"}
# What a process that was killed before it wrote the settings may have left.
_TRACES = {LOCK, unfinished_name(Path(SETTINGS)).name}


class Pool:
    """A folder of inverted images and their records.

    ``Pool(path)`` reads the records of a pool. :meth:`create` and :meth:`resume` return a pool to
    which images can be added.

    >>> result = invert(teacher, [7], iterations=3, schedule=Dense(), progress=False)
    >>> pool = Pool.create(folder / "pool", {"teacher": "fashion-canvas"})
    >>> pool.add(result.images, result.over(), result.masks, [{"label": 7}])
    >>> pool.records[0]["label"], pool.records[0]["image"]
    (7, 'images/000000.png')

    Args:
        path: the folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FileLock | None = None

    @classmethod
    def create(
        cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> Pool:
        """Start an empty pool.

        Args:
            path: a missing or empty folder, or a pool without images.
            settings: the settings that decide the images, as JSON values.
            overwrite: delete the pool in the folder first, but no other files.

        Raises:
            PoolError: the folder holds something else than a pool; it holds a pool with images and
                ``overwrite`` is not set; it can't be written; or another process adds images.
        """
        pool = cls(path)
        with pool._opening():
            pool._start(settings, overwrite)
        return pool

    @classmethod
    def resume(cls, path: str | Path, settings: Mapping[str, Any]) -> Pool:
        """Continue a pool, or start one where the folder has none.

        Args:
            path: the folder.
            settings: the settings that the pool was made with.

        Raises:
            PoolError: the pool was made with other settings, lacks a file of an image, can't be
                read or written, or another process adds images.
        """
        pool = cls(path)
        with pool._opening():
            old = pool._settings()
            if old is None:
                pool._start(settings, overwrite=False)
            else:
                pool._check_settings(old, settings)
                pool._check_files()
                pool._discard_unfinished(before=len(pool.records))
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
    def records(self) -> list[dict[str, Any]]:
        """The record of each image, in the order of their index.

        Raises:
            PoolError: the manifest can't be read, or a line isn't the record of its image.
        """
        lines: list[dict[str, Any]] = self._read(MANIFEST, _parse_lines, missing=[])
        return lines

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
        masked_images: Tensor,
        masks: Tensor,
        records: Sequence[Mapping[str, Any]],
        loss: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a batch of images. After an error the pool has none of them.

        Args:
            images: [B, 3, H, W] in [0, 1], stored with 8 bits.
            masked_images: [B, 3, H, W] in [0, 1], black in stopped patches.
            masks: bool [B, rows, columns], true at kept patches.
            records: further entries of each image's record, as JSON values. The pool adds ``index``
                and the files ``image``, ``masked`` and ``mask``.
            loss: of this batch: its ``history``, the values of each objective by its name, and its
                ``stops``. It replaces that of the batch before.

        Raises:
            ValueError: shapes or types don't fit, a record has a NaN or an infinity, or the pool
                was opened to be read only.
            PoolError: a file can't be written. The pool is then as it was before.
        """
        if self._lock is None:
            raise ValueError("expected a pool of Pool.create or Pool.resume, Pool(path) only reads")
        _check_batch(images, masked_images, masks, len(records))
        lines = self.records
        held = len(lines)
        pictures: dict[str, Image.Image] = {}
        grey = (masks.cpu().byte() * 255).numpy()
        batch = zip(records, _to_uint8(images), _to_uint8(masked_images), grey, strict=True)
        for index, (record, *pixels) in enumerate(batch, start=held):
            files = _files(index)
            pictures |= zip(files.values(), map(Image.fromarray, pixels), strict=True)
            lines.append({**record, "index": index, **files})
        manifest = "".join(map(_line, lines)).encode()
        loss_line = None if loss is None else _line(loss).encode()

        try:
            for name, picture in pictures.items():
                self._write(name, partial(picture.save, format="PNG"), held)
            if loss_line is not None:
                self._write(LOSS, lambda file: file.write(loss_line), held)
            self._write(MANIFEST, lambda file: file.write(manifest), held)
        except PoolError:
            for name in pictures:
                with suppress(OSError):
                    (self.path / name).unlink()
            raise
        self._discard_unfinished()

    def add_unfinished(self, images: Tensor) -> None:
        """Save the images of an interrupted batch as ``unfinished/000000.png`` and so on.

        They are not part of the pool, and :meth:`add` deletes them.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            PoolError: a file can't be written.
        """
        held = len(self.records)
        for index, pixels in enumerate(_to_uint8(images), start=held):
            save = partial(Image.fromarray(pixels).save, format="PNG")
            self._write(f"{UNFINISHED}/{index:06}.png", save, held)

    def _read(self, name: str, parse: Callable[[str], Any], missing: Any) -> Any:
        with explained(f"reading {self.path / name}"):
            try:
                return parse((self.path / name).read_text("utf-8"))
            except FileNotFoundError:
                return missing

    def _write(self, name: str, write: Callable[[BinaryIO], object], held: int) -> None:
        with explained(f"writing {self.path / name}", f"; images safe in the pool: {held}"):
            write_atomically(self.path / name, write)

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

    def _settings(self) -> dict[str, Any] | None:
        """The settings, or None where there is no pool yet.

        Raises:
            PoolError: the folder holds something else than a pool.
        """
        with explained(f"opening {self.path}"):
            names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        if names <= _TRACES:
            return None
        settings = self._read(SETTINGS, json.loads, missing=None)
        if not isinstance(settings, dict) or settings.get("format") != FORMAT:
            raise PoolError(
                f"{self.path} is not empty, and not a pool of this version, whose {SETTINGS} has "
                f'"format": "{FORMAT}": choose another folder'
            )
        return settings

    def _start(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        content = json.dumps({"format": FORMAT, **settings}, indent=2, allow_nan=False) + "\n"
        if self._settings() is not None:
            if overwrite:
                self._delete()
            elif self._has_images():
                raise PoolError(
                    f"{self.path} is not empty: continue it with --resume or replace it with "
                    "--overwrite"
                )
        self._write(SETTINGS, lambda file: file.write(content.encode()), held=0)

    def _has_images(self) -> bool:
        with explained(f"reading {self.path / MANIFEST}"), suppress(FileNotFoundError):
            return (self.path / MANIFEST).stat().st_size > 0
        return False

    def _check_settings(self, old: dict[str, Any], settings: Mapping[str, Any]) -> None:
        new = json.loads(json.dumps({"format": FORMAT, **settings}))
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

    def _discard_unfinished(self, before: int | None = None) -> None:
        """Delete unfinished images, or only those with a smaller number."""
        with suppress(OSError):
            delete_pictures(self.path / UNFINISHED, before)

    def _delete(self) -> None:
        """Delete everything but the settings, which mark the folder as a pool until the end.

        The manifest goes first, so that no line outlives its files.
        """
        folders = [self.path / name for name in (*FOLDERS.values(), UNFINISHED)]
        for folder in filter(Path.is_symlink, folders):
            raise PoolError(
                f"{folder} is a symbolic link, which is not followed, so {self.path} is not "
                "overwritten"
            )
        with explained(f"deleting {self.path}"):
            for name in (MANIFEST, LOSS, CONTACT_SHEET, LOSS_CURVES):
                delete_file(self.path / name)
            for folder in folders:
                delete_pictures(folder)


def _files(index: int) -> dict[str, str]:
    """The files of an image, relative to the pool."""
    return {key: f"{folder}/{index:06}.png" for key, folder in FOLDERS.items()}


def _line(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, allow_nan=False) + "\n"


def _parse_lines(text: str) -> list[Any]:
    lines = [json.loads(line, parse_constant=_refuse) for line in text.splitlines()]
    for index, line in enumerate(lines):
        expected = {"index": index, **_files(index)}
        if not isinstance(line, dict) or any(line.get(key) != expected[key] for key in expected):
            raise ValueError(f"line {index + 1} is not the record of image {index}")
    return lines


def _parse_loss(text: str) -> dict[str, Any]:
    loss = json.loads(text, parse_constant=_refuse)
    history, stops = (isinstance(loss, dict) and loss.get(key) for key in ("history", "stops"))
    lists = [stops, *history.values()] if isinstance(history, dict) else [None]
    for numbers in lists:
        if not isinstance(numbers, list) or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError("it is not the loss of a batch")
    return dict(loss)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no value of JSON")


def _check_batch(images: Tensor, masked_images: Tensor, masks: Tensor, size: int) -> None:
    for name, pixels in (("images", images), ("masked images", masked_images)):
        fits = pixels.ndim == 4 and pixels.shape[:2] == (size, 3) and pixels.is_floating_point()
        if not fits or pixels.shape != images.shape:
            raise ValueError(
                f"expected {name} as floats [{size}, 3, H, W] for {size} records, "
                f"got {pixels.dtype} {list(pixels.shape)}"
            )
    if masks.ndim != 3 or len(masks) != size or masks.dtype != torch.bool:
        raise ValueError(
            f"expected masks as bool [{size}, rows, columns] for {size} records, "
            f"got {masks.dtype} {list(masks.shape)}"
        )


def _to_uint8(images: Tensor) -> Any:
    """Pixels [B, 3, H, W] in [0, 1] as an array uint8 [B, H, W, 3]."""
    pixels = images.detach().cpu().float().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
