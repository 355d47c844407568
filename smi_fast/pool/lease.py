"""Who adds images to a pool at a URL: locks that a killed process doesn't leave behind for good.

No protocol-wide operation succeeds for only one of two processes. So each process first writes a
file of its own to ``.locks/``, and then looks for those of others. Of two that begin at once, the
one that writes later sees the file of the other. This asks no more of a server than that it lists a
file once it is written.

A process renews its file, and loses the lock when it doesn't: others watch for a minute whether the
content changes, and compare no clocks. On the machine of a process they see at once that it ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from smi_fast.pool.files import PoolError
from smi_fast.pool.store import Store

LOCKS = ".locks"
# After how many seconds without a renewal a process has lost its lock.
PATIENCE = 60.0
# How often a process renews its lock, so that several failures in a row don't lose it.
_RENEWAL = 10.0
_LOOK = 0.5
WRITER = "writer"


class Lease:
    """A lock of this process, renewed by a thread until it is released.

    Args:
        url: of the pool.
        role: what the process does.

    Raises:
        PoolError: the URL can't be reached or written.
    """

    def __init__(self, url: str, role: str) -> None:
        self._store = Store(url)
        self.name = f"{LOCKS}/{role}-{uuid4().hex}.json"
        self._renewals = 0
        self._write()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="smi_fast lease", daemon=True)
        self._thread.start()

    def check(self, store: Store) -> None:
        """Refuse to go on without the lock.

        Args:
            store: of this thread.

        Raises:
            PoolError: another process has taken the lock over.
        """
        if self.name not in store.names(LOCKS):
            raise PoolError(
                f"another process has taken over {self._store.where}, because this one could not "
                f"renew its lock for {PATIENCE:.0f} s"
            )

    def release(self) -> None:
        """Let others take the lock."""
        self._end.set()
        self._thread.join()
        self._store.delete([self.name])

    def _renew(self) -> None:
        while not self._end.wait(_RENEWAL):
            start = time.monotonic()
            with suppress(PoolError):  # the next renewal may succeed
                if self.name in self._store.names(LOCKS):
                    self._write()
            # Another process may have taken over before a write that came late.
            if time.monotonic() - start > PATIENCE / 2:
                with suppress(PoolError):
                    self._store.delete([self.name])

    def _write(self) -> None:
        self._renewals += 1
        content = {**_this_process(), "renewals": self._renewals}
        self._store.write({self.name: json.dumps(content).encode()})


class Watch:
    """Sees which locks of a pool are held, by looking at them again and again.

    Args:
        store: files of the pool.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # The content of each lock, and for how many seconds it has not changed.
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._last = 0.0

    def look(self) -> dict[str, bool | None]:
        """Each lock, and whether it is held; None where only time will tell."""
        now = time.monotonic()
        # Where this process was stopped meanwhile, the others may have been too.
        step, self._last = min(now - self._last, 2 * _LOOK), now
        found = self._store.read(self._store.names(LOCKS))
        return {name: self._held(name, content, step) for name, content in found.items()}

    def _held(self, name: str, content: bytes, step: float) -> bool | None:
        before, unchanged = self._seen.get(name, (content, -step))
        unchanged = unchanged + step if content == before else 0.0
        self._seen[name] = (content, unchanged)
        if content != before:
            return True
        return False if unchanged >= PATIENCE or _has_ended(content) else None


def take(url: str, store: Store) -> Lease:
    """The lock of the process that adds images to a pool.

    Where another process may hold it, this one says so and watches that process.

    Args:
        url: of the pool.
        store: its files.

    Raises:
        PoolError: another process adds images, or the URL can't be reached or written.
    """
    lease, watch, said = Lease(url, WRITER), Watch(store), False
    try:
        while True:
            others = watch.look()
            if others.pop(lease.name, "missing") == "missing":
                raise PoolError(f"{store.where}: listing it doesn't show what was just written")
            held = [name for name, found in others.items() if found]
            if held:
                raise PoolError(f"another process adds images to {store.where}")
            if all(found is False for found in others.values()):
                store.delete(list(others))
                return lease
            if not said:
                said = True
                print(
                    f"another process may still add images to {store.where}: waiting "
                    f"{PATIENCE:.0f} s to see whether it has ended",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(_LOOK)
    except BaseException:
        lease.release()
        raise


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "space": _space(), "process": os.getpid()}


def _space() -> str | None:
    """What tells this machine, and its numbers of processes, from all others."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _has_ended(content: bytes) -> bool:
    """Whether a lock is of a process of this machine that has ended."""
    with suppress(ValueError):
        owner = json.loads(content)
        if isinstance(owner, Mapping) and owner.get("space") == _space() is not None:
            try:
                state = Path(f"/proc/{owner.get('process')}/stat").read_text()
            except OSError:
                return True
            return state.rpartition(")")[2].split()[0] == "Z"  # ended, but not waited for
    return False
