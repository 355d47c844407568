"""Iterations on a GPU: the published-style loop, the best that PyTorch does alone, and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.baselines import published_loop as published
from benchmarks.baselines.strong_dense import StrongDense
from benchmarks.speed.loops import NO_STOPS, Workload, deit, published_loop, time_phases
from smi_fast import SparseViT, StopSchedule
from smi_fast.engine.precision import BFLOAT16, FLOAT32, PRECISIONS, TF32, products_in
from smi_fast.ops.backends import AUTO
from smi_fast.verify import stages, timing
from smi_fast.verify.correctness import answers
from smi_fast.verify.isolation import described

# The most telling ones first, because the time may be over before the last.
MODELS = ("deit_small", "deit_base", "deit_tiny")
BATCHES = (128, 32, 8)
# Iterations of the published-style loop, of which the first ones are warm-up.
ITERATIONS, EARLY = 8, 2
# The largest relative error of the gradient that a time is given for.
ALLOWED = {FLOAT32: 1e-3, TF32: 2e-2, BFLOAT16: 0.1}
# Images that gradients are compared on.
COMPARED = 2

Send = Callable[[object], None]


def step_lines(device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """The times of each model, from a process of its own."""
    parts = [({"model": model}, send_model, (model,)) for model in MODELS]
    return stages.in_turn(parts, device, seconds)


def send_model(send: Send, device_name: str, model: str) -> None:
    """Send the times of a model, all ways of a batch one after the other."""
    device = torch.device(device_name)
    for batch in BATCHES:
        workload = deit(model, batch)
        moved = (each.to(device) for each in (workload.targets, workload.init))
        measure(send, Workload(workload.vit.to(device), *moved), model, device)


def measure(send: Send, workload: Workload, model: str, device: torch.device) -> None:
    """Send the time of every way to take an iteration, and then whole runs made of them.

    A way that raises an error, or whose gradient isn't that of the published-style loop, has a
    reason instead.
    """
    named = {"kind": "time", "model": model, "batch": len(workload.targets)}
    found: dict[tuple[str, str, int], float] = {}
    for way, precision, kept, milliseconds in ways(workload, device):
        entry = {**named, "way": way, "precision": precision, "kept": kept}
        try:
            if way == "ours":
                check_gradient(workload, precision, kept)
            found[way, precision, kept] = milliseconds()
            send({**entry, "milliseconds": found[way, precision, kept]})
        except Exception as problem:
            send({**entry, "not_timed": described(problem)})
            if not answers(device):
                raise RuntimeError("the device answers no more") from problem
    for line in whole_runs(found):
        send({**named, **line})


def ways(
    workload: Workload, device: torch.device
) -> Iterator[tuple[str, str, int, Callable[[], float]]]:
    """(name, precision, kept patches of 196, a function that measures milliseconds) of each."""
    dense = timing.KEPT[0]
    for precision in PRECISIONS:
        for kept in timing.KEPT:
            arguments = (device, workload.vit, AUTO, kept, precision, len(workload.targets))
            yield "ours", precision, kept, partial(_ours, *arguments)
    for precision in (FLOAT32, TF32):
        yield "published-style", precision, dense, partial(_published, workload, precision)
    yield "compiled", BFLOAT16, dense, partial(_compiled, workload, device)


def _ours(*arguments: Any) -> float:
    found: float = timing.step_time(*arguments)["milliseconds"]
    return found


def _published(workload: Workload, precision: str) -> float:
    # A copy, because the gradients of its weights would stay in memory.
    own = Workload(copy.deepcopy(workload.vit), workload.targets, workload.init)
    own.vit.requires_grad_(True)
    with products_in(precision):
        phases = time_phases(published_loop(own), NO_STOPS, ITERATIONS, EARLY)
    return phases[workload.patches].typical * 1e3


def _compiled(workload: Workload, device: torch.device) -> float:
    loop = StrongDense(
        workload.vit,
        workload.targets,
        init=workload.init,
        jitter=workload.jitter(ITERATIONS),
        mean=workload.mean,
        std=workload.std,
    )
    return timing.sustained(loop.step, device)[0]


def check_gradient(workload: Workload, precision: str, kept: int) -> None:
    """Compare the gradient of the cross-entropy with that of the published-style loop in float32.

    Raises:
        AssertionError: they differ by more than :data:`ALLOWED`.
    """
    count = workload.patches * kept // timing.KEPT[0]
    images, targets = workload.init[:COMPARED], workload.targets[:COMPARED]
    patches = torch.arange(count, device=images.device).expand(len(images), -1).contiguous()
    teacher = SparseViT(workload.vit, precision=precision)

    def gradient(logits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(logits(leaf), targets), leaf)[0]

    with products_in(FLOAT32):
        expected = gradient(lambda leaf: published.forward(workload.vit, leaf, patches)[0])
    ours = gradient(lambda leaf: teacher(leaf, patches).logits)
    error = ((ours - expected).norm() / expected.norm()).item()
    if not error <= ALLOWED[precision]:
        raise AssertionError(
            f"expected the gradient of the published-style loop to {ALLOWED[precision]}, "
            f"got one that is {error:.2g} away"
        )


def whole_runs(
    found: dict[tuple[str, str, int], float],
    schedule: StopSchedule = StopSchedule(),  # noqa: B008
) -> Iterator[dict[str, Any]]:
    """Seconds of the published schedule of 4000 iterations, at most: of our sparse loop up to the
    last stop all iterations count as dense ones. And how many times faster that is than each dense
    loop.
    """
    dense_kept, kept = timing.KEPT
    iterations, last = 4000, schedule.at[-1]
    dense = {
        f"{way} {precision}": iterations * milliseconds / 1e3
        for (way, precision, count), milliseconds in found.items()
        if count == dense_kept
    }
    for precision in PRECISIONS:
        early, late = (found.get(("ours", precision, count)) for count in (dense_kept, kept))
        if early is None or late is None:
            continue
        sparse = (last * early + (iterations - last) * late) / 1e3
        faster = {name: round(seconds / sparse, 2) for name, seconds in dense.items()}
        run = {"run": f"{iterations} iterations", "precision": precision}
        yield {**run, "seconds": sparse, "times_faster_than": faster}
