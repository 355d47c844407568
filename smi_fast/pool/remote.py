"""Pools at a URL: on S3, on a server of SFTP, wherever fsspec writes.

The files are those of a pool in a folder, see :mod:`smi_fast.pool.layout`. While images are added,
``parts/`` has a file for each batch, and ``.locks/`` one for each process. The metadata, which most
protocols can't append to, comes at the end.

A batch is in the pool once its part is, which is written behind its pictures. Therefore the URL
alone says what is done, and a process may be killed at any time: it keeps nothing but copies of the
small files, in a temporary folder. It reads no picture but for the contact sheet.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from smi_fast.pool.contents import missing
from smi_fast.pool.files import PoolError, is_url, picture_number
from smi_fast.pool.layout import (
    CARD,
    CLASSES,
    FOLDERS,
    LOSS,
    METADATA,
    PARTS,
    PROGRESS,
    REPORTS,
    SETTINGS,
    UNFINISHED,
)
from smi_fast.pool.lease import LOCKS, Lease, Watch, take
from smi_fast.pool.metadata import Record
from smi_fast.pool.parts import Part
from smi_fast.pool.pool import Pool
from smi_fast.pool.settings import Settings, is_trace, not_a_pool
from smi_fast.pool.store import Store

# The files that each process has in its own folder.
_SMALL = {SETTINGS, METADATA, CLASSES, CARD, *REPORTS}
_PARTS = re.compile(rf"{PARTS}/([0-9]{{6,}})(?:\.seconds)?\.jsonl")
_PICTURES = re.compile(
    rf"(?:(?:{'|'.join(FOLDERS.values())})/[0-9]{{4,}}|{PROGRESS}|{UNFINISHED})/([^/]+)"
)


class RemotePool(Pool):
    """A pool at a URL, see :class:`smi_fast.pool.Pool`.

    >>> with RemotePool.create("memory://pool", {"seed": 0}, ["cat", "dog"]) as pool:
    ...     result = invert(teacher, [1], iterations=3, schedule=Dense(), progress=False)
    ...     pool.add(result.images, result.masks, [{"label": 1}])
    >>> RemotePool("memory://pool").records[0]["file_name"]
    'images/0001/000000.png'

    Args:
        url: such as ``s3://bucket/pool`` or ``sftp://host/pool``, see
            :class:`smi_fast.pool.store.Store`.

    Raises:
        PoolError: it is no URL; fsspec, or the package of its protocol, is not installed; or it
            can't be reached.

    Attributes:
        path: a temporary folder with the small files of the pool, and what is drawn.
        where: the URL, without its password and the slashes at its end.
    """

    def __init__(self, url: str | Path) -> None:
        self._store = Store(str(url))
        self._folder = TemporaryDirectory(prefix="smi_fast-", ignore_cleanup_errors=True)
        super().__init__(self._folder.name)
        self.where = self._store.where
        self._lease: Lease | None = None
        self._open = False
        self._watch = Watch(self._store)
        # What this process knows of the URL: the size of each file, and the parts that it has read.
        self._sizes: dict[str, int] = {}
        self._known: set[str] = set()

    def close(self) -> None:
        """Write the metadata and what was drawn, and let another process add images."""
        if self._lease is None:
            return
        try:
            if self._open:
                self._finish(self._lease)
        finally:
            super().close()
            lease, self._lease, self._open = self._lease, None, False
            lease.release()

    @property
    def settings(self) -> Settings:
        """See :attr:`Pool.settings`."""
        with self._read():
            return super().settings

    @property
    def records(self) -> list[Record]:
        """See :attr:`Pool.records`."""
        with self._read():
            return super().records

    @property
    def loss(self) -> dict[str, Any] | None:
        """See :attr:`Pool.loss`."""
        with self._read():
            return super().loss

    def gather(self) -> None:
        """See :meth:`Pool.gather`."""
        if self._open:  # to open it has read them all
            self._sizes = self._store.names()
            self._copy_parts({LOSS})
        super().gather()

    def part(self, rank: int) -> Part:
        """See :meth:`Pool.part`."""
        return _RemotePart(self._store, self.path, self.settings, rank)

    def part_is_held(self, rank: int) -> bool:
        """See :meth:`Pool.part_is_held`."""
        # To look at all locks together makes the time of each count at once.
        locks = self._watch.look()
        role = f"{LOCKS}/{_role(rank)}-"
        return any(held is not False for name, held in locks.items() if name.startswith(role))

    def bring(self, names: Iterable[str]) -> None:
        """Copy these files of the pool into its folder.

        Raises:
            PoolError: one is missing, or can't be read or written.
        """
        self._store.copy([name for name in names if not (self.path / name).exists()], self.path)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        with _named(self.path, self.where):
            self._lease = take(self._store.url, self._store)
            try:
                self._copy()
                self._copy_parts()
                with super()._opening():
                    yield
            except BaseException:
                self.close()
                raise
        self._open = True

    @contextmanager
    def _read(self) -> Iterator[None]:
        """Have what the pool is now, unless this process is the one that adds images."""
        with _named(self.path, self.where):
            if self._lease is None:
                self._copy()
            yield

    def _copy(self) -> None:
        """Have the small files as they are at the URL.

        Raises:
            PoolError: it holds something else than a pool, or can't be read.
        """
        self._sizes = self._store.names()
        names = {name for name in self._sizes if not name.startswith(f"{LOCKS}/")}
        if SETTINGS not in names and not all(map(is_trace, names)):
            raise not_a_pool(self.where)
        for name in _SMALL - names:
            (self.path / name).unlink(missing_ok=True)
        self._store.copy(names & _SMALL, self.path)

    def _copy_parts(self, others: Collection[str] = ()) -> None:
        """Have the parts that this process doesn't know yet, and other files that it asks for."""
        new = {name for name in self._sizes if _PARTS.fullmatch(name)} - self._known
        self._store.copy(new | {name for name in others if name in self._sizes}, self.path)
        self._known |= new

    def _finish(self, lease: Lease) -> None:
        """Write what comes at the end, then delete the parts that the metadata has."""
        lease.check(self._store)
        found = [name for name in (*REPORTS, METADATA) if (self.path / name).exists()]
        contents = {name: (self.path / name).read_bytes() for name in found}
        metadata = {METADATA: contents.pop(METADATA, b"")}
        self._store.write(contents)
        if len(metadata[METADATA]) != self._sizes.get(METADATA, 0):  # lines are only appended
            self._store.write(metadata)
        batches = self.batches
        parts = {name: _PARTS.fullmatch(name) for name in self._store.names(PARTS)}
        self._store.delete([n for n, found in parts.items() if found and int(found[1]) < batches])

    def _write(self, contents: Mapping[str, bytes]) -> None:
        assert self._lease is not None
        self._lease.check(self._store)
        self._store.write(contents)
        self._sizes |= {name: len(content) for name, content in contents.items()}
        super()._write({name: contents[name] for name in contents if name in _SMALL})

    def _append(self, lines: Sequence[bytes], times: bytes | None) -> None:
        assert self._lease is not None
        self._lease.check(self._store)  # the pictures may have taken long
        self._known |= _write_part(self._store, self.batches, lines, times)
        super()._append(lines, times)

    def _check_present(self, records: Iterable[Record]) -> None:
        for record in records:
            for key in FOLDERS:
                if record[key] not in self._sizes:
                    raise missing(f"{self.where}/{record[key]}")

    def _delete(self) -> None:
        # The metadata goes first, so that no line outlives its files.
        small = _SMALL - {SETTINGS, METADATA}
        self._drop([name for name in self._sizes if name == METADATA or _PARTS.fullmatch(name)])
        self._drop([name for name in self._sizes if name in small])
        self._drop(list(self._pictures()))
        super()._delete()

    def _delete_strays(self, spared: set[int]) -> None:
        held = range(self._held)
        self._drop(
            [
                name
                for name, number in self._pictures().items()
                if number not in held
                and number not in spared
                and not name.startswith(f"{UNFINISHED}/")
            ]
        )

    def _discard_unfinished(self, before: int = sys.maxsize) -> None:
        self._drop(
            [
                name
                for name, number in self._pictures().items()
                if name.startswith(f"{UNFINISHED}/") and number < before
            ]
        )

    def _drop(self, names: Sequence[str]) -> None:
        if not names:
            return
        # Without the lock, they may be pictures of the process that has taken it over.
        assert self._lease is not None
        self._lease.check(self._store)
        self._store.delete(names)
        for name in names:
            self._sizes.pop(name, None)

    def _pictures(self) -> dict[str, int]:
        """The number of each picture at the URL."""
        found = {}
        for name in self._sizes:
            match = _PICTURES.fullmatch(name)
            number = None if match is None else picture_number(match[1])
            if number is not None:
                found[name] = number
        return found


def pool_type(where: str | Path) -> type[Pool]:
    """The class for a pool in this folder, or at this URL."""
    return RemotePool if is_url(where) else Pool


@contextmanager
def local_copy(where: str, bring_back: str | None = None) -> Iterator[Path]:
    """A folder with a whole pool: its own, or a temporary copy of one at a URL.

    Args:
        where: folder or URL of the pool.
        bring_back: a file that the block writes, and that a pool at a URL gets.

    Raises:
        PoolError: the pool can't be read, or doesn't take the file.
    """
    if not is_url(where):
        yield Path(where)
        return
    store = Store(where)
    names = [name for name in store.names() if not name.startswith(f"{LOCKS}/")]
    if names and SETTINGS not in names:
        raise not_a_pool(store.where)
    with TemporaryDirectory(prefix="smi_fast-") as folder:
        path = Path(folder) / Path(store.where).name
        path.mkdir()
        store.copy(names, path)
        with _named(path, store.where):
            yield path
        if bring_back is not None:
            store.write({bring_back: (path / bring_back).read_bytes()})


@contextmanager
def _named(folder: Path, where: str) -> Iterator[None]:
    """Let errors say the URL in place of the temporary folder, whose name says nothing."""
    try:
        yield
    except PoolError as error:
        raise PoolError(str(error).replace(str(folder), where)) from error.__cause__


class _RemotePart(Part):
    """What one process of a group adds to a pool at a URL."""

    def __init__(self, store: Store, path: Path, settings: Settings, rank: int) -> None:
        super().__init__(path, settings, rank)
        self._store = store
        self._lease = Lease(store.url, _role(rank))

    def close(self) -> None:
        super().close()
        self._lease.release()

    def _write(self, contents: Mapping[str, bytes]) -> None:
        self._lease.check(self._store)
        self._store.write(contents)

    def _append(self, batch: int, lines: Sequence[bytes], times: bytes | None) -> None:
        self._lease.check(self._store)
        _write_part(self._store, batch, lines, times)


def _role(rank: int) -> str:
    return f"part-{rank:04}"


def _write_part(store: Store, batch: int, lines: Sequence[bytes], times: bytes | None) -> set[str]:
    """Write a batch's lines, from which on the pool has it, and return the names of the files."""
    name = f"{PARTS}/{batch:06}"
    if times is not None:
        store.write({f"{name}.seconds.jsonl": times})
    store.write({f"{name}.jsonl": b"".join(lines)})
    return {f"{name}.jsonl", f"{name}.seconds.jsonl"}
