"""A fixed number of images of a contender, timed once and kept in a folder with their seconds.

The folder is that of :mod:`benchmarks.quality.images`. A study that was cut off goes on, so a file
also says at which commit it was made and how busy the machine was with anything else.
"""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.fashion_canvas.data import CLASSES
from benchmarks.harness.environment import commit, cpu_seconds, share_of_others
from benchmarks.harness.memory import peak_bytes
from benchmarks.quality.images import Images, folder
from benchmarks.schedules.contenders import CONTENDERS, Contender
from smi_fast import load_teacher

# Iterations of two runs that aren't timed. The first one comes before the timed run, because the
# first iterations of a process are slow. The second one's memory is measured, which doesn't depend
# on its length.
SHORT = 14


@dataclass(frozen=True)
class Job:
    """A number of images of one contender, of a length and a seed."""

    name: str
    iterations: int
    seed: int
    images: int

    @property
    def contender(self) -> Contender:
        return CONTENDERS[self.name]

    @property
    def trajectories(self) -> int:
        return math.ceil(self.images / self.contender.images)

    @property
    def path(self) -> Path:
        name = re.sub(r"\W+", "-", self.name)
        file = f"schedules-{name}-{self.images}-{self.iterations}-{self.seed}.safetensors"
        return folder() / file


@dataclass(frozen=True, eq=False)
class Timed:
    """What a job made, and what it took.

    Attributes:
        images: as many as were asked for; the last trajectory may have given more.
        updates: int64 [N], iterations that the shown patches of each image received.
        patch_iterations: patches that the teacher computed for a trajectory, over all iterations.
        seconds: for all trajectories.
        others: share of the machine's CPU time that other processes used meanwhile, or None.
    """

    images: Images
    updates: Tensor
    patch_iterations: int
    seconds: float
    others: float | None


def labels(count: int) -> Tensor:
    """int64 [count], the classes in turn."""
    return torch.arange(count) % len(CLASSES)


def timed(vit: VisionTransformer, job: Job) -> Timed:
    """What a job made, which is made if the folder doesn't have it."""
    if not job.path.exists():
        _make(vit, job)
    with safe_open(job.path, "pt") as file:
        names = ("pixels", "masks", "logits", "wanted", "updates")
        *shown, updates = (file.get_tensor(name)[: job.images] for name in names)
        said = file.metadata()
    others = float(said["others"]) if said["others"] else None
    images = Images(*shown, said["commit"])
    return Timed(images, updates, int(said["patch_iterations"]), float(said["seconds"]), others)


def _make(vit: VisionTransformer, job: Job) -> None:
    prepare = job.contender.prepare
    prepare(vit, SHORT)(labels(2), torch.Generator().manual_seed(0))
    run, generator = prepare(vit, job.iterations), torch.Generator().manual_seed(job.seed)
    wanted = labels(job.trajectories)
    before, start = cpu_seconds(), time.perf_counter()
    made = run(wanted, generator)
    seconds, others = time.perf_counter() - start, share_of_others(before)
    tensors = {
        "pixels": made.pixels,
        "masks": made.masks,
        "logits": made.logits,
        "wanted": made.wanted,
        "updates": made.updates,
    }
    said = {
        "commit": commit(),
        "seconds": repr(seconds),
        "others": "" if others is None else repr(others),
        "patch_iterations": str(made.patch_iterations),
    }
    job.path.parent.mkdir(parents=True, exist_ok=True)
    partial = job.path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, said)
    partial.replace(job.path)


def peak_memory(name: str, images: int) -> int:
    """Peak resident bytes of a run. A peak never falls, so call this in a new process."""
    vit, job = load_teacher("fashion-canvas"), Job(name, SHORT, 0, images)
    job.contender.prepare(vit, SHORT)(labels(1), torch.Generator().manual_seed(0))
    run = job.contender.prepare(vit, SHORT)
    wanted = labels(job.trajectories)
    return peak_bytes(lambda: run(wanted, torch.Generator().manual_seed(0)))
