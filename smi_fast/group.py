"""The processes that torchrun starts, which make one pool together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

# How long process 0 may take to open the pool.
_PATIENCE = timedelta(hours=1)
# What a process is doing, from its first turn on.
_BEGUN, _HOLDING, _DONE = b"begun", b"holding", b"done"


class GroupError(RuntimeError):
    """The processes of a group have lost each other; the message says what to do."""


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except DistError as error:
        raise GroupError(
            "the group has lost its store, whose process has ended: run the command again with "
            "--resume"
        ) from error


class Group:
    """A process among those that make a pool, and what they agree on.

    They share a key-value store of torch.distributed and nothing else, because images are
    independent: no tensor is sent. Each method but :meth:`restarted` raises a GroupError where the
    store can't be reached.

    Args:
        store: of all processes, and new: keys of other processes would be taken for theirs.
        rank: of this process, from 0. Process 0 holds the pool's lock.
        size: number of processes.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size

    @classmethod
    def of_torchrun(cls) -> Group | None:
        """The group that torchrun made, or None for a process alone.

        Raises:
            ValueError: a variable of the environment, by which torchrun says where the store is, is
                missing or wrong; or torchrun has restarted the processes of several machines.
        """
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
            return None
        store, rank, size = next(iter(rendezvous("env://")))
        # The store outlives a restart. Machines count their restarts apart, so that the count
        # tells which keys are new only where there is a single machine.
        alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
        return cls.new(PrefixStore(f"smi_fast/{attempt}", store), rank, size)

    @classmethod
    def new(cls, store: Store, rank: int, size: int) -> Group:
        """A group whose store no other process of this rank has used.

        Raises:
            ValueError: one has.
        """
        if store.add(f"started/{rank}", 1) > 1:
            raise ValueError(
                f"expected process {rank} to start once, got a restart by torchrun on several "
                "machines: run the command again with --resume"
            )
        return cls(store, rank, size)

    @staticmethod
    def restarted() -> bool:
        """Whether torchrun has started the processes again, after one had failed."""
        return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def agree(self, plan: dict[str, Any] | None) -> dict[str, Any]:
        """The plan of process 0, which the others wait for.

        Args:
            plan: JSON values in process 0, None in the others.
        """
        with _connected():
            if plan is not None:
                self._store.set("plan", json.dumps(plan))
            self._store.wait(["plan"], _PATIENCE)
            agreed: dict[str, Any] = json.loads(self._store.get("plan"))
        return agreed

    def next(self) -> int:
        """A number from 0 on that no other process gets."""
        with _connected():
            return int(self._store.add("next", 1)) - 1

    def stop(self) -> None:
        """Let all processes stop after their batch."""
        with _connected():
            self._store.set("stop", "")

    @property
    def stopped(self) -> bool:
        """Whether a process has called :meth:`stop`."""
        with _connected():
            return bool(self._store.check(["stop"]))

    def report(self, made: Mapping[str, Any]) -> None:
        """Tell process 0 what this process has made so far, as JSON values."""
        with _connected():
            self._store.set(f"made/{self.rank}", json.dumps(made))

    def reports(self) -> list[dict[str, Any]]:
        """The last report of each process that has given one."""
        return [json.loads(text) for text in self._values("made").values()]

    def begin(self) -> None:
        """Tell process 0 that this process takes turns from here on."""
        self._set_state(_BEGUN)

    def hold(self) -> None:
        """Tell process 0 that this process holds its part of the pool."""
        self._set_state(_HOLDING)

    def finish(self) -> None:
        """Tell process 0 that this process takes no more turns, and has released its part."""
        self._set_state(_DONE)

    def at_work(self) -> tuple[list[int], list[int]]:
        """The processes that take turns: those that hold no part yet, and those that hold one."""
        states = self._values("state")
        begun, holding = (
            [rank for rank, state in states.items() if state == wanted]
            for wanted in (_BEGUN, _HOLDING)
        )
        return begun, holding

    def _set_state(self, state: bytes) -> None:
        with _connected():
            self._store.set(f"state/{self.rank}", state.decode())

    def _values(self, name: str) -> dict[int, bytes]:
        """The value under this name of each process that has one."""
        with _connected():
            return {
                rank: self._store.get(f"{name}/{rank}")
                for rank in range(self.size)
                if self._store.check([f"{name}/{rank}"])
            }
