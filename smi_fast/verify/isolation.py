"""Work in a process of its own, so that a crash or a hang ends nothing else."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

PRELOADED = ["smi_fast.verify.correctness"]
# Seconds that a process without work left, or one that was killed, may take to end.
PATIENCE = 10


class Ended(RuntimeError):
    """A process ended before its work was done; the message says how."""


def messages(
    work: Callable[..., None], *arguments: Any, device: torch.device, limit: float
) -> Iterator[Any]:
    """What a function sends from a process of its own, as it comes.

    Args:
        work: a function of a module, called with a function that sends a message, and then with the
            arguments.
        arguments: can be pickled, as the messages can.
        device: where the function works.
        limit: seconds that the process may take.

    Raises:
        Ended: the function raised an error, its process crashed or took too long, or there is no
            time for one.
    """
    if limit <= 0:
        raise Ended("no time was left for it")
    context: Any = multiprocessing.get_context(_start_method(device))
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, theirs, arguments))
    end = time.monotonic() + limit
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            done, message = ours.recv()
            if done and message is None:
                return
            if done:
                raise Ended(message)
            yield message
        raise Ended(f"its process took longer than {limit:g} s")
    except EOFError:
        process.join(PATIENCE)
        raise Ended(_cause(process.exitcode)) from None
    finally:
        process.kill()
        process.join(PATIENCE)  # a driver that hangs may hold a killed process for ever
        ours.close()


def _start_method(device: torch.device) -> str:
    """On the CPU processes are forked from one that has imported torch, where there is such a fork.

    A process that works with CUDA starts afresh.
    """
    if device.type != "cpu" or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(PRELOADED)
    return "forkserver"


def _run(work: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        work(lambda message: connection.send((False, message)), *arguments)
    except Exception as error:
        connection.send((True, described(error)))
    else:
        connection.send((True, None))


def described(error: Exception) -> str:
    """The type of an error and its message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _cause(exit_code: int | None) -> str:
    if exit_code is None:
        return "its process no longer sends"
    if exit_code < 0:
        return f"its process was ended by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"
