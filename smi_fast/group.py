"""The processes that torchrun starts, which make one pool together."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

# Processes wait for each other as long as batches take. torchrun ends all of them when one fails.
_PATIENCE = timedelta(days=30)


class Group:
    """A process among those that make a pool, and what they agree on.

    They share a key-value store of torch.distributed and nothing else, because images are
    independent: no tensor is sent.

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
        if plan is not None:
            self._store.set("plan", json.dumps(plan))
        self._store.wait(["plan"], _PATIENCE)
        agreed: dict[str, Any] = json.loads(self._store.get("plan"))
        return agreed

    def next(self) -> int:
        """A number from 0 on that no other process gets."""
        return int(self._store.add("next", 1)) - 1

    def finish(self) -> None:
        """Tell process 0 that this process is done; process 0 waits for all others."""
        self._store.set(f"done/{self.rank}", "")
        if self.rank == 0:
            self._store.wait([f"done/{rank}" for rank in range(self.size)], _PATIENCE)
