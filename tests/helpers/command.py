"""The command in a process of its own, which can be killed at any access to its pool.

A server that has imported everything forks the processes, because importing torch takes seconds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, arguments, str(pool), trouble, access))
    process.start()
    sender.close()
    try:
        ended = receiver.recv()
    except EOFError:
        process.join()
        ended = Ended(process.exitcode or 0)
    process.join()
    return ended


def _serve(
    results: Connection, arguments: list[str], pool: str, trouble: str | None, access: int
) -> None:
    torch.set_num_threads(1)
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
