"""Everything that a GPU is to show, in one command of ten minutes: ``python -m benchmarks gpu``."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from benchmarks.gpu.counters import send_counters
from benchmarks.gpu.launches import send_launches
from benchmarks.gpu.parity import send_parity
from benchmarks.gpu.steps import step_lines
from benchmarks.gpu.whole_runs import send_whole_runs
from benchmarks.harness.environment import result_file
from smi_fast.verify import gpu_stages, report
from smi_fast.verify.stages import Stage, alone

MINUTES, QUICK_MINUTES = 9.0, 2.0
# Those of smi-fast verify, and those that need a checkout. The first ones decide everything else.
STAGES = (
    gpu_stages.ENVIRONMENT,
    gpu_stages.SMOKE,
    gpu_stages.CAPTURED,
    Stage("parity", 60, alone(send_parity), proves=True),
    gpu_stages.GRID,
    gpu_stages.OPS,
    Stage("steps", 150, step_lines),
    Stage("launches", 30, alone(send_launches)),
    Stage("counters", 50, alone(send_counters)),
    Stage("whole runs", 50, alone(send_whole_runs)),
)


def main(quick: bool = False, minutes: float = MINUTES, compare: Path | None = None) -> None:
    """Run all stages on the first GPU, and write ``results/gpu/NAME.jsonl`` as they come.

    Args:
        quick: take at most two minutes.
        minutes: for all stages together.
        compare: a file of an earlier run, with which times are compared.

    Raises:
        NotComparable: ``compare`` isn't such a file.
    """
    if not torch.cuda.is_available():
        print("gpu: not run, because no CUDA device is visible")
        return
    device = torch.device("cuda", 0)
    name = re.sub("[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    out = result_file(f"gpu/{name}.jsonl", quick=quick)
    out.parent.mkdir(exist_ok=True)
    seconds = 60 * (min(minutes, QUICK_MINUTES) if quick else minutes)
    report.verify(out, [device], seconds, seconds, STAGES, compare)
    print(f"gpu: all figures are in {out}")
