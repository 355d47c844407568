"""What it costs that several processes make one pool: the store, and the writer of each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed import TCPStore

from benchmarks.harness.timing import rounded, spread
from smi_fast.group import Group
from smi_fast.job_progress import Tally
from smi_fast.pool import Pool
from smi_fast.pool.batch import encode

ROOT = Path(__file__).parents[2]
BATCH = 2
# What a process asks of the store for each batch: see workers.GroupWorker.turns and add.
CALLS_OF_A_BATCH = 3


def batches_an_hour(pool: Path, processes: int, batches: int, iterations: int) -> float:
    """Batches an hour that processes of torchrun make together, of one thread each.

    It counts from the moment at which each process can have made one to that at which the first has
    none left, so that neither their start nor their end counts.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "smi_fast", "invert", "--quiet"]
    command += ["--out", str(pool), "--iterations", str(iterations), "--schedule", "dense"]
    command += ["--classes", "0", "--per-class", str(batches * BATCH), "--batch-size", str(BATCH)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, capture_output=True, check=True)
    last: dict[int, float] = {}
    for record in Pool(pool).records:
        written = (pool / record["mask_file_name"]).stat().st_mtime
        last[record["batch"]] = max(last.get(record["batch"], 0), written)
    times = sorted(last.values())[processes : len(last) - processes + 1]
    return 3600 * (len(times) - 1) / (times[-1] - times[0])


def coordination(folder: Path, batches: int, iterations: int, rounds: int) -> dict[str, Any]:
    """Images an hour by 2 and by 4 processes on the cores of this machine."""
    rates: dict[int, list[float]] = {2: [], 4: []}
    for turn in range(rounds):
        for processes, found in rates.items():
            pool = folder / f"{processes} processes {turn}"
            found.append(BATCH * batches_an_hour(pool, processes, batches, iterations))
    lost = [1 - four / two for two, four in zip(rates[2], rates[4], strict=True)]
    return {
        "cores": os.cpu_count(),
        "images_an_hour": {f"{key} processes": spread(found) for key, found in rates.items()},
        "lost_by_4_against_2": spread(lost, 3),
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
