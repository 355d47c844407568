"""Hardware counters of single kernels, by Nsight Compute where it is installed.

Run as a program it is what Nsight Compute looks at: each op once, with the sizes of DeiT-S.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from smi_fast.ops import backends
from smi_fast.verify import timing
from smi_fast.verify.isolation import described

METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram__bytes.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
)
# Seconds after which Nsight Compute is ended; the process of the stage ends a little later.
SECONDS = 40
BATCH = 32


def send_counters(send: Callable[[object], None], device: str) -> None:
    """Send a line for each kernel, or one that says why there are none."""
    tool = shutil.which("ncu")
    if tool is None:
        send({"kind": "counters", "not_counted": "ncu isn't installed"})
        return
    command = [tool, "--csv", "--metrics", ",".join(METRICS), "--target-processes", "all"]
    command += ["--kernel-name-base", "demangled", "--profile-from-start", "off"]
    command += [sys.executable, "-m", "benchmarks.gpu.counters", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    lines = list(rows(done.stdout.splitlines()))
    for line in lines:
        send({"kind": "counters", **line})
    if not lines:
        said = " ".join((done.stdout + done.stderr).split())[-300:]
        send({"kind": "counters", "not_counted": f"ncu counted nothing: {said}"})


def rows(text: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The kernels in what ``ncu --csv`` prints, which has a row for each counter of a kernel.

    Other lines are what the program printed.
    """
    kernels: dict[str, dict[str, Any]] = {}
    table = (line for line in text if line.startswith('"'))
    for row in csv.DictReader(table):
        if not {"ID", "Kernel Name", "Metric Name", "Metric Value"} <= row.keys():
            continue
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        unit = row.get("Metric Unit") or ""
        kernel[row["Metric Name"]] = f"{value} {unit}".strip()
    return iter(kernels.values())


def main(device: torch.device) -> None:
    """Run each op by each backend that can, once to compile it and once to be counted."""
    for call in timing.deit_calls(BATCH):
        dtype = torch.bfloat16 if call.op.startswith("gather_attention") else torch.float32
        own = call.converted(dtype, str(device))
        for backend in backends.BACKENDS:
            name = call.op.removesuffix("_backward")
            if backend.name == "reference" or backend.why_not(name, device, dtype) is not None:
                continue
            if not call.fits(backend, device, dtype):
                continue
            try:
                own.run(backend.functions)
                torch.cuda.synchronize(device)
                torch.cuda.profiler.start()
                own.run(backend.functions)
                torch.cuda.synchronize(device)
            except Exception as problem:
                print(f"{backend.name} {call}: {described(problem)}")
            finally:
                torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
