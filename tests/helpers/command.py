"""The command in a process of its own, which can be killed at any access to its pool.

A server that has imported everything forks the processes, because importing torch takes seconds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from smi_fast.__main__ import main

# What happens right before the chosen access to the pool.
TROUBLE: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "interrupted": lambda: signal.raise_signal(signal.SIGINT),
    "disk full": lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    ),
}
ACCESSES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "os.listdir"}
ACCESSES |= {"os.truncate"}
PRELOADED = ["tests.helpers.command", "smi_fast.cli", "smi_fast.fill", "smi_fast.zoo"]
# What matplotlib and typer import at their first use.
PRELOADED += ["matplotlib.backends.backend_agg", "pydantic.type_adapter"]


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative for a signal.
        errors: what it printed as errors, unless it was killed.
        accesses: how often it touched its pool, unless it was killed.
    """

    code: int
    errors: str = ""
    accesses: int = 0


def run(arguments: list[str], pool: Path, trouble: str | None = None, access: int = 0) -> Ended:
    """Runs the command to its end.

    Args:
        arguments: of the command.
        pool: the folder whose accesses count.
        trouble: one of :data:`TROUBLE`, or None.
        access: before which access it happens, from 1.
    """
    return _Process(arguments, pool, trouble, access).ended


def run_group(
    arguments: list[str],
    pool: Path,
    size: int,
    *,
    victim: int | None = None,
    access: int = 0,
    trouble: str = "killed",
    last_rites: signal.Signals | None = signal.SIGTERM,
) -> list[Ended]:
    """Runs the command in processes that share the work, as torchrun starts them.

    Args:
        arguments: of the command.
        pool: the folder whose accesses count.
        size: number of processes; 1 for one without a group.
        victim: the process that gets into trouble, or None.
        access: before which access of its own, from 1.
        trouble: one of :data:`TROUBLE`.
        last_rites: what the others get once it has failed; torchrun sends SIGTERM. None: they go
            on.
    """
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    processes = []
    for rank in range(size):
        own = trouble if rank == victim else None
        place["RANK"] = str(rank)
        processes.append(_Process(arguments, pool, own, access, place))
    if victim is not None:
        failed = processes[victim].ended.code != 0
        for process in processes:
            if failed and last_rites is not None:
                process.send(last_rites)
    return [process.ended for process in processes]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


class _Process:
    """The command in a process that has begun."""

    def __init__(
        self,
        arguments: list[str],
        pool: Path,
        trouble: str | None,
        access: int,
        place: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_serve, args=(sender, arguments, str(pool), trouble, access, dict(place or {}))
        )
        self._process.start()
        sender.close()

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal, if it still runs."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    @cached_property
    def ended(self) -> Ended:
        """How it ended, for which this waits."""
        try:
            ended = self._receiver.recv()
        except EOFError:
            self._process.join()
            ended = Ended(self._process.exitcode or 0)
        self._process.join()
        return ended


def _serve(
    results: Connection,
    arguments: list[str],
    pool: str,
    trouble: str | None,
    access: int,
    place: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(place)
    sys.argv = ["smi-fast", *arguments]
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    count = 0

    def watch(event: str, values: tuple[object, ...]) -> None:
        nonlocal count
        if event in ACCESSES and str(values[0]).startswith(pool):
            count += 1
            if count == access and trouble is not None:
                TROUBLE[trouble]()

    sys.addaudithook(watch)
    code: int | str | None = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        code = 1
        traceback.print_exc()
    results.send(Ended(int(code or 0), sys.stderr.getvalue(), count))
