"""Shuffled batches of images, with the random numbers of the published loader."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

# Worker processes of the published loader. Their number decides what random transforms draw.
WORKERS = 4


class DataIter:
    """Batches of a loader without end: after the last one they are shuffled again.

    An epoch draws two numbers from torch's generator when it starts: a seed for the workers, and
    one for the shuffle. Random transforms draw from the workers' generators, and leave those of
    this process alone. Where no worker can be forked, the batches are loaded in this process with
    the generators that the workers would have, so the batches are the same.

    Args:
        dataloader: a loader with workers, that shuffles.
    """

    def __init__(self, dataloader: DataLoader[Any]) -> None:
        self.dataloader = dataloader
        self._epoch = _start(dataloader)

    def next(self) -> Any:
        """The next batch."""
        # No handler of StopIteration: a generator that starts in one keeps the callers' frames.
        for batch in self._epoch:
            return batch
        self._epoch = _start(self.dataloader)
        return next(self._epoch)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    before = torch.get_rng_state()
    if _can_fork():
        try:
            return iter(loader)
        except (ImportError, OSError):  # no semaphores, or no more processes
            torch.set_rng_state(before)
    return _in_this_process(loader)


def _can_fork() -> bool:
    """Whether this process may fork workers.

    A worker that is started otherwise imports the script again. A script without a ``__main__``
    guard would then invert its images once more in each worker.
    """
    daemon = multiprocessing.current_process().daemon  # it may not have children
    return multiprocessing.get_start_method() == "fork" and not daemon


def _in_this_process(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of an epoch, drawn as an iterator with workers draws them."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    batches = list(loader.batch_sampler or ())
    workers = [_Generators(seed, worker) for worker in range(loader.num_workers)]
    return _load(loader, batches, workers)


def _load(
    loader: DataLoader[Any], batches: list[list[int]], workers: list[_Generators]
) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        with workers[number % len(workers)].in_use():
            loaded = loader.collate_fn([loader.dataset[index] for index in batch])
        yield loaded


class _Generators:
    """The states of Python's, torch's and NumPy's global generators in a worker.

    Args:
        seed: the seed that the epoch drew for its workers.
        worker: number of the worker.
    """

    def __init__(self, seed: int, worker: int) -> None:
        from torch.utils.data._utils.worker import _generate_state

        self._states: Any = (
            random.Random(seed + worker).getstate(),
            torch.Generator().manual_seed(seed + worker).get_state(),
            np.random.RandomState(_generate_state(seed, worker)).get_state(),
        )

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put these states in place of the process's own, and take them out again."""
        own = _read()
        _write(self._states)
        try:
            yield
        finally:
            self._states = _read()
            _write(own)


def _read() -> Any:
    return random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002


def _write(states: Any) -> None:
    python, pytorch, numpy = states
    random.setstate(python)
    torch.set_rng_state(pytorch)
    np.random.set_state(numpy)  # noqa: NPY002
