"""What it costs that several processes make one pool: the store, and the writer of each."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed import TCPStore

from benchmarks.harness.timing import alternate, ratios, rounded, spread
from smi_fast.group import Group
from smi_fast.job_progress import Tally
from smi_fast.pool import Pool
from smi_fast.pool.batch import encode

ROOT = Path(__file__).parents[2]
BATCH = 2
# What a process asks of the store for each batch: see workers.GroupWorker.turns and add.
CALLS_OF_A_BATCH = 3


def together(pool: Path, processes: int, batches: int, iterations: int) -> float:
    """Batches an hour that processes of torchrun make together, of one thread each.

    It counts from the moment at which each process can have made one to that at which the first has
    none left, so that neither their start nor their end counts.
    """
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    _wait([_start(launch, pool, batches, iterations)])
    every = _times(pool)
    times = every[processes : len(every) - processes + 1]
    return 3600 * (len(times) - 1) / (times[-1] - times[0])


def apart(folder: Path, processes: int, batches: int, iterations: int) -> float:
    """The same by processes that know nothing of each other, each with a pool of its own.

    It counts while all of them are at work.
    """
    pools = [folder / str(number) for number in range(processes)]
    folder.mkdir()
    _wait([_start([], pool, batches // processes, iterations) for pool in pools])
    found = [_times(pool) for pool in pools]
    first, last = max(times[0] for times in found), min(times[-1] for times in found)
    inside = sum(first <= each <= last for times in found for each in times)
    return 3600 * (inside - 1) / (last - first)


def _start(
    launch: Sequence[str], pool: Path, batches: int, iterations: int
) -> subprocess.Popen[bytes]:
    command = [sys.executable, *launch, "-m", "smi_fast", "invert", "--quiet", "--out", str(pool)]
    command += ["--iterations", str(iterations), "--schedule", "dense", "--classes", "0"]
    command += ["--per-class", str(batches * BATCH), "--batch-size", str(BATCH)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> None:
    codes = [process.wait() for process in started]
    if any(codes):
        raise RuntimeError(f"a process ended with {max(codes, key=abs)}")


def _times(pool: Path) -> list[float]:
    """When each batch of a pool was written, ascending."""
    last: dict[int, float] = {}
    for record in Pool(pool).records:
        written = (pool / record["mask_file_name"]).stat().st_mtime
        last[record["batch"]] = max(last.get(record["batch"], 0), written)
    return sorted(last.values())


def coordination(folder: Path, batches: int, iterations: int, rounds: int) -> dict[str, Any]:
    """Images an hour by 2 and by 4 processes, as a group and each for itself, in turn.

    What 4 lose that are for themselves is the price of more processes than cores. Coordination
    costs what a group loses beyond it.
    """
    ways = {"a group": together, "each for itself": apart}

    def contender(way: str, processes: int) -> Callable[[], float]:
        turns = itertools.count()

        def images_an_hour() -> float:
            place = folder / f"{processes} processes, {way}, {next(turns)}"
            return BATCH * ways[way](place, processes, batches, iterations)

        return images_an_hour

    found = alternate(
        {(way, count): contender(way, count) for way in ways for count in (2, 4)}, rounds
    )
    kept = {way: ratios(found[way, 4], found[way, 2]) for way in ways}
    beyond = ratios(kept["a group"], kept["each for itself"])
    return {
        "cores": os.cpu_count(),
        "images_an_hour": {
            f"{processes} processes, {way}": spread(each)
            for (way, processes), each in found.items()
        },
        "lost_by_4_against_2": {
            way: spread([1 - share for share in each], 3) for way, each in kept.items()
        },
        "lost_to_coordination": spread([1 - share for share in beyond], 3),
    }


def store(clients: Sequence[int], calls: int) -> dict[str, Any]:
    """The store's calls a second, and what a batch takes of it, by the number of clients."""
    server = TCPStore("localhost", 0, is_master=True)
    report = Tally(1000, frozenset(range(1000)), 900.0).to_json()
    found = {}
    for count in clients:
        groups = [Group(TCPStore("localhost", server.port), rank, count) for rank in range(count)]

        def work(group: Group) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                assert not group.stopped
                group.next()
                group.report(report)
            return (time.perf_counter() - start) / calls

        with ThreadPoolExecutor(count) as threads:
            start = time.perf_counter()
            seconds = list(threads.map(work, groups))
            wall = time.perf_counter() - start
        found[str(count)] = {
            "ms_of_a_batch": rounded(1000 * median(seconds)),
            "batches_a_second": rounded(count * calls / wall),
        }
    return {
        "calls_of_a_batch": CALLS_OF_A_BATCH,
        "classes": len(report["labels"]),
        "clients": found,
    }


def writer(folder: Path, images: int, side: int, patch: int) -> dict[str, Any]:
    """Milliseconds to encode and write an image of noise, which no PNG shrinks."""
    torch.manual_seed(0)
    settings = {"class_names": ["noise"], "background": "mean"}
    rows = side // patch
    masks = torch.rand(images, rows, rows) < 0.25
    records = [{"label": 0}] * images
    start = time.perf_counter()
    made = encode(settings, torch.rand(images, 3, side, side), masks, records, batch=0, start=0)
    encoded = time.perf_counter()
    with Pool.create(folder, {}, ["noise"]) as pool:
        pool.add_encoded(made)
    written = time.perf_counter()
    return {
        "side": side,
        "encode_ms_of_an_image": rounded(1000 * (encoded - start) / images),
        "write_ms_of_an_image": rounded(1000 * (written - encoded) / images),
    }
