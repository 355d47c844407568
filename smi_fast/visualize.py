"""Visualise neurons: a pool with images of each, whole and sparse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smi_fast import recipes
from smi_fast.batch_maker import batch_seed
from smi_fast.fill import Interrupted
from smi_fast.importance import Attention, Gradient, Importance
from smi_fast.inversion import InversionResult, NonFiniteLoss, SparseInverter
from smi_fast.objectives import NeuronTarget
from smi_fast.pool import UNFINISHED, Pool
from smi_fast.pool.pictures import draw_loss
from smi_fast.provenance import versions
from smi_fast.schedules import Dense, Schedule, StopSchedule
from smi_fast.teacher import SparseViT

# Ways to make an image of a neuron, by name: of all patches, or of those that excite it most.
KINDS = ("dense", "sparse")


def inverters(
    teacher: SparseViT,
    block: int,
    where: str = "mlp_hidden",
    *,
    kinds: Sequence[str] = KINDS,
    iterations: int = 100,
    backend: str = "auto",
) -> dict[str, SparseInverter]:
    """The inverters that :func:`visualize` takes, by the kind of their images.

    Each is that of :func:`smi_fast.recipes.clear` with a :class:`smi_fast.NeuronTarget`. In sparse
    images the patches stay on whose tokens in front of the block the neuron depends most, see
    :class:`smi_fast.importance.Gradient`; of the first block, those of the highest attention.

    >>> encoder = SparseViT(teacher)
    >>> list(smi_fast.visualize.inverters(encoder, block=2, iterations=20))
    ['dense', 'sparse']

    Args:
        teacher: the encoder.
        block: index, from the end when negative.
        where: "tokens", "mlp_hidden" or "class_token".
        kinds: of images: "dense", "sparse" or both.
        iterations: of the optimiser.
        backend: which implementation of the ops to use.

    Raises:
        ValueError: one of these out of range, or a teacher that lacks what is read.
    """
    if not kinds or not {*kinds} <= {*KINDS}:
        raise ValueError(f"expected kinds among {', '.join(KINDS)}, got {tuple(kinds)}")
    neuron = NeuronTarget(block, where=where)
    neuron.taps(teacher.depth)  # refuses a block out of range
    before = block % teacher.depth - 1
    importance: Importance = Gradient(before) if before >= 0 else Attention()
    schedules: dict[str, Callable[[], Schedule]] = {
        "dense": Dense,
        "sparse": partial(StopSchedule.once, iterations),
    }
    clear = recipes.clear()
    chosen: dict[str, Any] = {
        "objectives": (neuron,),
        "iterations": iterations,
        "importance": importance,
        "backend": backend,
    }
    return {
        kind: SparseInverter(teacher, **clear.options(schedule=schedules[kind](), **chosen))
        for kind in kinds
    }


def rehearse(inverters: Mapping[str, SparseInverter], neurons: Tensor) -> None:
    """Check all neurons, and evaluate the loss of one image, before a pool is changed.

    Raises:
        ValueError: neurons that the teacher doesn't have, or no activation to read.
        BackendUnavailable: the backend can't run here.
    """
    for inverter in inverters.values():
        (neuron,) = inverter.settings.objectives
        neuron.check_targets(neurons, inverter.teacher)
        state = inverter.start(neurons[:1], generator=torch.Generator())
        state.evaluate(score=bool(inverter.schedule.at))


def load_directions(path: str | Path) -> Tensor:
    """Directions float32 [n, F] from a file of ``numpy.save``.

    Raises:
        ValueError: no such file, or what it holds isn't a matrix of floating point numbers.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"expected {path} as a file of numpy.save: {error}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "archive"
        raise ValueError(f"expected directions as floating point [n, width] in {path}, got {got}")
    return torch.from_numpy(found).float()


def neuron_names(neurons: Tensor, block: int, where: str) -> list[str]:
    """The names of channels int64 [n] or directions [n, F] in a pool.

    >>> smi_fast.visualize.neuron_names(torch.tensor([3, 5]), 6, "tokens")
    ['block 6 tokens channel 3', 'block 6 tokens channel 5']
    """
    numbers = range(len(neurons)) if neurons.dim() == 2 else neurons.tolist()
    kind = "direction" if neurons.dim() == 2 else "channel"
    return [f"block {block} {where} {kind} {number}" for number in numbers]


def visualize(
    pool: Pool,
    inverters: Mapping[str, SparseInverter],
    neurons: Tensor,
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Add the images of neurons that a pool doesn't hold yet.

    Image ``i`` of the pool has the label ``i % n``: first all neurons in images of the first kind,
    then of the next one. Its record has the ``kind``, and the neuron's ``activation`` by the kept
    patches alone.

    Args:
        pool: the pool, with the name of a neuron for each class.
        inverters: of :func:`inverters`.
        neurons: channels int64 [n], or directions [n, F] of the teacher's data type.
        batch_size: number of neurons inverted together.
        seed: from 0; decides noise and jitter.
        progress: show the progress of each batch.

    Raises:
        Interrupted: Ctrl-C ended a batch; its images so far are in the pool's ``unfinished/``.
        NonFiniteLoss: the loss or the gradient became infinite or NaN, likewise.
        ValueError: neurons that the teacher doesn't have.
        PoolError: the pool can't be written.
    """
    held = len(pool.records)
    for number, (kind, inverter) in enumerate(inverters.items()):
        for first in range(0, len(neurons), batch_size):
            start = number * len(neurons) + first
            if start < held:
                continue
            wanted = neurons[first : first + batch_size].to(inverter.teacher.device)
            generator = torch.Generator().manual_seed(batch_seed(seed, start))
            try:
                result = inverter.invert(wanted, generator=generator, progress=progress)
            except NonFiniteLoss as error:
                pool.add_unfinished(error.result.images)
                raise
            if result.interrupted:
                pool.add_unfinished(result.images)
                raise Interrupted(
                    f"interrupted after {result.iterations} iterations: the unfinished images of "
                    f"this batch are in {pool.where}/{UNFINISHED}; --resume starts the batch again"
                )
            same = {"kind": kind, "iterations": result.iterations, "seed": seed}
            same |= {"versions": versions()}
            records = [
                {"label": first + i, "activation": activation, **same}
                for i, activation in enumerate(_activations(inverter, result, wanted))
            ]
            loss: dict[str, Any] = {"stops": [*inverter.schedule.at], "history": result.history}
            pool.add(result.images, result.masks, records, loss=loss, seconds=result.seconds)
            draw_loss(pool)


@torch.no_grad()
def _activations(inverter: SparseInverter, result: InversionResult, neurons: Tensor) -> list[float]:
    """The activation of each image's neuron by its kept patches, without jitter."""
    teacher, (neuron,) = inverter.teacher, inverter.settings.objectives
    assert isinstance(neuron, NeuronTarget)
    taps = teacher(
        inverter.settings.space.normalize(result.images),
        result.kept,
        taps=neuron.taps(teacher.depth),
        until=teacher.depth,
    ).taps
    found: list[float] = neuron.activation(taps, neurons, teacher).tolist()
    return found
