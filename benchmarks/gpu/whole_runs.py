"""Whole inversions on a GPU: seconds, the most memory, and how many images reach their class."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn

from smi_fast import SparseInverter, recipes
from smi_fast.engine.precision import PRECISIONS
from smi_fast.schedules import StopSchedule
from smi_fast.verify.stages import attempt
from smi_fast.verify.timing import synchronize
from smi_fast.zoo import load_teacher

ITERATIONS = 400
# The trained teacher, and the weights of DeiT-S, with which no class is reached.
BATCHES = {"fashion-canvas": 40, "deit_small_patch16_224": 32}


def send_whole_runs(send: Callable[[object], None], device: str) -> None:
    """Send a line for each teacher and precision."""
    for name, batch in BATCHES.items():
        trained = name == "fashion-canvas"
        teacher = load_teacher(name) if trained else timm.create_model(name)
        for precision in PRECISIONS:
            named = {"kind": "time", "teacher": name, "batch": batch, "precision": precision}
            run = (teacher.to(device), precision, batch, ITERATIONS)
            attempt(send, named, "not_timed", whole_run, *run)


def whole_run(teacher: nn.Module, precision: str, batch: int, iterations: int) -> dict[str, Any]:
    """Two inversions of SMI's recipe with its stops at the published fractions.

    Returns:
        seconds of the first one, which compiles kernels, as "first", those of the second, the most
        bytes of the GPU, and the share of images that reach their class.
    """
    inverter = SparseInverter(
        teacher,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        precision=precision,
        **recipes.smi().options(schedule=StopSchedule.scaled(iterations), iterations=iterations),
    )
    device = inverter.teacher.device
    targets = torch.arange(batch) % inverter.teacher.num_classes
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for seed in (0, 1):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        result = inverter.invert(targets, generator=generator, progress=False)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    reached = (result.logits.argmax(1).cpu() == targets).double().mean().item()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    named = {"iterations": iterations, "peak_bytes": peak}
    return {**named, "first": seconds[0], "seconds": seconds[1], "reached": reached}
