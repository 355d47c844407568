"""Iterations replayed from CUDA graphs against the same ones taken one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smi_fast import recipes
from smi_fast.engine.precision import PRECISIONS
from smi_fast.inversion import SparseInverter
from smi_fast.inversion.graphs import Graphs
from smi_fast.inversion.loop import Loop
from smi_fast.inversion.progress import Progress
from smi_fast.inversion.state import InversionState
from smi_fast.objectives import BatchNormMatching
from smi_fast.recipes import Recipe
from smi_fast.schedules import Dense, Selection
from smi_fast.verify.isolation import described
from smi_fast.zoo import load_cnn, load_teacher

# Enough for some replays of each graph: in the second batch also of that of several iterations.
ITERATIONS = 110
BATCH = 4
TEACHER = "fashion-canvas"


def send_checks(send: Callable[[object], None], device_name: str) -> None:
    """Send a line for each recipe, dense and sparse, and one for each precision of DeiT-S."""
    import timm

    device = torch.device(device_name)
    teacher = load_teacher(TEACHER).to(device)
    cnn = load_cnn(TEACHER).to(device)
    for recipe in every_recipe(cnn):
        for share in (1.0, 0.5):
            send(check(teacher, recipe, share, device))
    deit = timm.create_model("deit_small_patch16_224").to(device)
    for precision in PRECISIONS:
        for share in (1.0, 46 / 196):
            send(check(deit, recipes.smi(), share, device, precision))


def every_recipe(cnn: nn.Module) -> Iterator[Recipe]:
    """All recipes, and SMI's with a term that isn't due in each iteration."""
    for name in recipes.NAMES:
        yield recipes.by_name(name, cnn if name in recipes.WITH_CNN else None)
    smi = recipes.smi()
    sometimes = BatchNormMatching(cnn, every=3)
    yield replace(smi, name="smi, prior every 3", objectives=(*smi.objectives, sometimes))


def check(
    teacher: nn.Module,
    recipe: Recipe,
    share: float,
    device: torch.device,
    precision: str = PRECISIONS[0],
) -> dict[str, Any]:
    """Compare every bit of two runs, one of them replayed; and look for an iteration that waits.

    Args:
        teacher: on the device.
        recipe: whose objectives and parametrization run, without its schedule.
        share: of the patches that are kept.
        device: of the runs.
        precision: of the teacher's products.

    Returns:
        a line of kind "captured", with a list of "failures".
    """
    failures = []
    plain, replayed = (inverter(teacher, recipe, precision, graph) for graph in (False, True))
    try:
        state = prepared(plain, recipe, share)
        with waits_forbidden(device):
            state.step()
    except Exception as problem:
        failures.append(f"an iteration waits for the device: {described(problem)}")
    try:
        # The second batch takes the graphs of the first one.
        kept = [Graphs(each.settings) for each in (plain, replayed)]
        for seed in range(2):
            runs = [
                finished(prepared(each, recipe, share, seed), graphs)
                for each, graphs in zip((plain, replayed), kept, strict=True)
            ]
            failures += [f"{name} of batch {seed} differs" for name in different(*runs)]
    except Exception as problem:
        failures.append(described(problem))
    return {
        "kind": "captured",
        "recipe": recipe.name,
        "teacher": type(teacher).__name__,
        "share": round(share, 3),
        "precision": precision,
        "failures": failures,
    }


def inverter(teacher: nn.Module, recipe: Recipe, precision: str, graph: bool) -> SparseInverter:
    """An inverter of a recipe without its schedule."""
    return SparseInverter(
        teacher,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        precision=precision,
        graph=graph,
        **recipe.options(schedule=Dense(), iterations=ITERATIONS),
    )


def prepared(
    inverter: SparseInverter, recipe: Recipe, share: float, seed: int = 0
) -> InversionState:
    """The state of a run that has taken one iteration, in which kernels are compiled."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(BATCH) + seed) % inverter.teacher.num_classes
    targets = recipe.targets(labels, inverter.teacher.num_classes, generator)
    state = inverter.start(targets, generator=generator)
    count = max(1, int(inverter.teacher.num_patches * share))
    state.keep(Selection(state.kept[:, :count].contiguous()))
    state.step()
    return state


def finished(state: InversionState, graphs: Graphs) -> dict[str, Tensor]:
    """What a run changes, after its last iteration."""
    display = Progress(ITERATIONS, shown=False)
    Loop(state, frozenset(), display, None, graphs).run(range(1, ITERATIONS))
    names = ("parameters", "exp_avg", "exp_avg_sq", "record", "iteration")
    return {name: getattr(state, name) for name in names}


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that differ in any bit; NaN equals NaN."""
    return [name for name in one if not torch.equal(_bits(one[name]), _bits(other[name]))]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@contextmanager
def waits_forbidden(device: torch.device) -> Iterator[None]:
    """Raise where the host would wait for a CUDA device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
