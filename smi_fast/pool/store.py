"""The files of a pool at a URL, which fsspec reads and writes."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from smi_fast.pool.files import PoolError, unfinished_name, without_password, write_content

# Where an object becomes visible whole or not at all. Elsewhere it is moved to its name once whole.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"}
# Waits between the tries of a request, because a server may close a connection that is not used.
_PAUSES = (0.2, 2.0)
_TRIES = len(_PAUSES) + 1
# What another try doesn't change.
_FINAL = (PermissionError, ImportError, ValueError, TypeError)
# Files that are held in memory at a time.
_CHUNK = 256
_LAST_SLASHES = re.compile(r"(?<=[^:/])/+$")

T = TypeVar("T")


class Store:
    """Whole files below a URL, by their names relative to it.

    Each method raises a PoolError where the URL can't be reached.

    Args:
        url: such as ``s3://bucket/pool`` or ``sftp://host/pool``. fsspec's configuration has the
            options of its protocol, such as another endpoint.

    Attributes:
        url: likewise.
        where: the URL without its password and the slashes at its end, for messages.

    Raises:
        PoolError: it is no URL; fsspec, or the package of the protocol, is not installed; or the
            URL can't be reached.
    """

    def __init__(self, url: str) -> None:
        self.url, self.where = url, without_password(_LAST_SLASHES.sub("", url))
        if "://" not in url:
            raise PoolError(f"expected a URL such as s3://bucket/pool, got {self.where}")
        self._folders: set[str] = set()
        self._try("opening it", self._connect)

    def names(self, folder: str = "") -> dict[str, int]:
        """The size of each file in bytes, or of those below a folder, by its name."""

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(folder), detail=True)
            sizes = {
                posixpath.relpath(name, self._root or "."): int(info.get("size") or 0)
                for name, info in found.items()
            }
            for name in sizes:
                if name.startswith("../"):  # copied, it would overwrite a file of this machine
                    raise ValueError(f"the server lists {name}, which is no file of the folder")
            return sizes

        return self._try("listing it", find)

    def read(self, names: Iterable[str]) -> dict[str, bytes]:
        """The contents of files, by their names; without those that don't exist."""
        paths = {self._path(name): name for name in names}

        def cat() -> dict[str, bytes]:
            self._fs.invalidate_cache()
            found = self._fs.cat(list(paths), on_error="return")
            contents = {}
            for path, content in found.items():
                if isinstance(content, bytes):
                    contents[paths[path]] = content
                elif not isinstance(content, FileNotFoundError):
                    raise content
            return contents

        return self._try("reading", cat) if paths else {}

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Write files, each whole or not at all.

        A file that has another size there than it should is torn, and written again.

        Raises:
            PoolError: they can't be written, or stay torn.
        """
        left = dict(contents)
        for _ in range(_TRIES):
            if left:
                left = self._try("writing", partial(self._write, left))
        if left:
            raise PoolError(f"writing {self.where}/{min(left)} failed: it has another size there")

    def delete(self, names: Collection[str]) -> None:
        """Delete files and what an interrupted write left of them; missing ones are no error."""

        def remove() -> None:
            self._fs.invalidate_cache()
            for path in map(self._path, names):
                for each in filter(self._fs.exists, (path, _part(path))):
                    self._fs.rm_file(each)

        def remove_at_once() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm(list(map(self._path, names)))

        if not names:
            return
        # Object stores delete many at once, and mind no missing ones.
        self._try("deleting", remove_at_once if self._whole else remove)
        if not self._whole:
            self._delete_empty({str(folder) for name in names for folder in Path(name).parents})

    def _delete_empty(self, folders: Iterable[str]) -> None:
        """Delete folders where they are empty, because loaders refuse a class without images."""
        for folder in sorted({*folders} - {"."}, key=len, reverse=True):
            path = self._path(folder)
            with suppress(Exception):  # a missing folder is another error in each protocol
                self._fs.invalidate_cache()
                # Some protocols delete what is in the folder too, as hdfs:// does.
                if not self._fs.ls(path, detail=False):
                    self._fs.rmdir(path)
                    self._folders.discard(path)

    def copy(self, names: Iterable[str], folder: Path) -> None:
        """Copy files into a local folder."""
        left = list(names)
        for start in range(0, len(left), _CHUNK):
            chunk = left[start : start + _CHUNK]
            contents = self.read(chunk)
            for name in chunk:
                if name not in contents:
                    raise PoolError(f"{self.where}/{name} is missing: put it back")
                write_content(folder / name, contents[name])

    def _write(self, contents: Mapping[str, bytes]) -> dict[str, bytes]:
        """Write files, and return those that are torn."""
        paths = {self._path(name): content for name, content in contents.items()}
        names = {path: path if self._whole else _part(path) for path in paths}
        if not self._whole:
            for folder in {posixpath.dirname(path) for path in paths} - self._folders:
                self._fs.makedirs(folder, exist_ok=True)
                self._folders.add(folder)
        self._fs.pipe({names[path]: content for path, content in paths.items()})
        self._fs.invalidate_cache()
        sizes = dict(zip(paths, self._fs.sizes(list(names.values())), strict=True))
        for path, name in names.items():
            if sizes[path] == len(paths[path]) and name != path:
                self._fs.mv(name, path)
        return {
            name: content
            for (name, content), size in zip(contents.items(), sizes.values(), strict=True)
            if size != len(content)
        }

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name) if name else self._root

    def _connect(self) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise ImportError("it needs fsspec: pip install 'smi-fast[remote]'") from None
        # Another connection than that of other threads, which some protocols can't share.
        self._fs, root = url_to_fs(self.url, skip_instance_cache=True)
        self._root: str = root.rstrip("/") or self._fs.root_marker
        self._folders.clear()
        protocols = self._fs.protocol
        protocols = {protocols} if isinstance(protocols, str) else {*protocols}
        self._whole = bool(protocols & _WHOLE)

    def _try(self, action: str, request: Callable[[], T]) -> T:
        """The result of a request, which is repeated over a new connection where it fails."""
        error: Exception | None = None
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            try:
                if error is not None:
                    self._connect()
                return request()
            except Exception as found:  # the packages of protocols have no common class of errors
                error = found
                if isinstance(error, _FINAL):
                    break
        assert error is not None
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        reason = reason or type(error).__name__
        reason = without_password(reason)
        raise PoolError(f"{self.where}: {action} failed: {reason}") from error


def _part(path: str) -> str:
    """Where a file is written before it is complete."""
    folder, name = posixpath.split(path)
    return posixpath.join(folder, unfinished_name(Path(name)).name)
