"""Inverted images on disk: pixels, masks and provenance.

A pool is a folder::

    settings.json        the settings that decided the images
    manifest.jsonl       one line per image: its files and its record
    images/000000.png    the whole image
    masked/000000.png    its kept patches, on black
    masks/000000.png     one pixel per patch: 255 kept, 0 stopped

All files of a line in the manifest exist, even if writing was interrupted. A file without a line
remains from an interrupted write: readers ignore it, and the next image with its number replaces
it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

SETTINGS = "settings.json"
MANIFEST = "manifest.jsonl"
CONTACT_SHEET = "contact_sheet.png"
LOSS_CURVES = "loss.png"
UNFINISHED = "unfinished"
FOLDERS = {"image": "images", "masked": "masked", "mask": "masks"}


class PoolError(OSError):
    """A pool can't be made, read or written; the message says what failed, and why."""


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file completely, or leave it as it was.

    Args:
        path: the file; replaced when it exists, its folder made when missing.
        write: called with a binary file, to which it writes the content.

    Raises:
        OSError: the system's error. The file is then as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
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


class Pool:
    """A folder of inverted images and their records.

    ``Pool(path)`` reads the records of a pool. :meth:`create` and :meth:`resume` return a pool to
    which images can be added.

    >>> result = invert(teacher, [7], iterations=3, schedule=Dense(), progress=False)
    >>> pool = Pool.create(folder / "pool", {"teacher": "fashion-canvas"})
    >>> pool.add(result.images, result.masked_images, result.masks, [{"label": 7}])
    >>> pool.records[0]["label"], pool.records[0]["image"]
    (7, 'images/000000.png')

    Args:
        path: the folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(
        cls, path: str | Path, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> Pool:
        """Start an empty pool.

        Args:
            path: a missing or empty folder.
            settings: the settings that decide the images, as JSON values.
            overwrite: delete an existing pool in the folder first, but no other files.

        Raises:
            PoolError: without ``overwrite``, the folder isn't empty; with it, the folder holds
                something else than a pool; or the folder can't be written.
        """
        pool = cls(path)
        content = (json.dumps(settings, indent=2, allow_nan=False) + "\n").encode()
        with _explained(f"opening {path}"):
            empty = not pool.path.is_dir() or not any(pool.path.iterdir())
        if not empty:
            if not overwrite:
                raise PoolError(
                    f"{path} is not empty: continue it with --resume or replace it with --overwrite"
                )
            pool._delete()
        pool._write(SETTINGS, lambda file: file.write(content), held=0)
        return pool

    @classmethod
    def resume(cls, path: str | Path, settings: Mapping[str, Any]) -> Pool:
        """Continue a pool, or start one where the folder has none.

        Args:
            path: the folder.
            settings: the settings that the pool was made with.

        Raises:
            PoolError: the pool was made with other settings, or can't be read or written.
        """
        pool = cls(path)
        old = pool._read(SETTINGS, json.loads, missing=None)
        if old is None:
            return cls.create(path, settings)
        new = json.loads(json.dumps(settings))
        for key in old | new:
            before, now = (
                json.dumps(side[key], sort_keys=True) if key in side else "nothing"
                for side in (old, new)
            )
            if before != now:
                raise PoolError(
                    f"{path} can't be resumed: it was made with {key} = {before}, now it is {now}"
                )
        return pool

    @property
    def records(self) -> list[dict[str, Any]]:
        """The record of each image, in the order of their index.

        Raises:
            PoolError: the manifest can't be read.
        """
        lines: list[dict[str, Any]] = self._read(MANIFEST, _parse_lines, missing=[])
        return lines

    def add(
        self,
        images: Tensor,
        masked_images: Tensor,
        masks: Tensor,
        records: Sequence[Mapping[str, Any]],
    ) -> None:
        """Add a batch of images. After an error the pool has none of them.

        Args:
            images: [B, 3, H, W] in [0, 1], stored with 8 bits.
            masked_images: [B, 3, H, W] in [0, 1], black in stopped patches.
            masks: bool [B, rows, columns], true at kept patches.
            records: further entries of each image's record, as JSON values. The pool adds ``index``
                and the files ``image``, ``masked`` and ``mask``.

        Raises:
            ValueError: shapes or types don't fit, or a record has a NaN or an infinity.
            PoolError: a file can't be written. The pool is then as it was before.
        """
        _check_batch(images, masked_images, masks, len(records))
        lines = self.records
        held = len(lines)
        pictures: dict[str, Image.Image] = {}
        grey = (masks.cpu().byte() * 255).numpy()
        batch = zip(records, _to_uint8(images), _to_uint8(masked_images), grey, strict=True)
        for index, (record, *pixels) in enumerate(batch, start=held):
            files = {key: f"{folder}/{index:06}.png" for key, folder in FOLDERS.items()}
            pictures |= zip(files.values(), map(Image.fromarray, pixels), strict=True)
            lines.append({**record, "index": index, **files})
        manifest = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode()

        try:
            for name, picture in pictures.items():
                self._write(name, partial(picture.save, format="PNG"), held)
            self._write(MANIFEST, lambda file: file.write(manifest), held)
        except PoolError:
            for name in pictures:
                with suppress(OSError):
                    (self.path / name).unlink()
            raise
        shutil.rmtree(self.path / UNFINISHED, ignore_errors=True)

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
        with _explained(f"reading {self.path / name}"):
            try:
                return parse((self.path / name).read_text("utf-8"))
            except FileNotFoundError:
                return missing

    def _write(self, name: str, write: Callable[[BinaryIO], object], held: int) -> None:
        with _explained(f"writing {self.path / name}", f"; images safe in the pool: {held}"):
            write_atomically(self.path / name, write)

    def _delete(self) -> None:
        """Delete the pool. The manifest goes first, so that no line outlives its files."""
        if not any((self.path / name).exists() for name in (MANIFEST, SETTINGS)):
            raise PoolError(f"{self.path} is not a pool of images, so it is not overwritten")
        with _explained(f"deleting {self.path}"):
            (self.path / MANIFEST).unlink(missing_ok=True)
            for folder in (*FOLDERS.values(), UNFINISHED):
                with suppress(FileNotFoundError):
                    shutil.rmtree(self.path / folder)
            for name in (CONTACT_SHEET, LOSS_CURVES, SETTINGS):
                (self.path / name).unlink(missing_ok=True)


@contextmanager
def _explained(action: str, outcome: str = "") -> Iterator[None]:
    """Turn an error of the system or of JSON into a PoolError with one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PoolError(f"{action} failed: {reason}{outcome}") from error


def _parse_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


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
