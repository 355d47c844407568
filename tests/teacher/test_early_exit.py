"""Early exit: the same taps from as few blocks as they need, and the loop that chooses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smi_fast import (
    CrossEntropy,
    Fourier,
    NeuronTarget,
    Objective,
    SparseInverter,
    SparseViT,
    TotalVariation,
)
from smi_fast.objectives import LossInputs
from smi_fast.verify.cases import random_kept
from tests.helpers.teachers import make_teacher, random_images

SPACE = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
TAPS = ("block.2.tokens", "attention.2", "attention.2.q", "attention.2.output", "mlp.2.hidden",
        "attention.2.row")  # fmt: skip
BACKENDS = ("reference", "cpp")


class Products(TorchDispatchMode):
    """Counts the matrix products of linear layers, also those inside of the engine."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::mm", "aten::addmm") or name.startswith("smi_fast::embed_patches"):
            self.count += 1
        elif name.startswith("smi_fast::run_"):
            self.count += len(args[1]) // 3  # matrix, its transpose and bias of each product
        return func(*args, **(kwargs or {}))


@contextmanager
def products() -> Iterator[Products]:
    with Products() as mode:
        yield mode


def deep_teacher(name: str = "deit_tiny_patch16_224") -> Any:
    return make_teacher(name, depth=12, img_size=64, embed_dim=24, num_heads=2)


def count_of(teacher: SparseViT, objective: Objective, iteration: int = 0) -> int:
    """Products of linear layers in one iteration of an inversion, forward and backward."""
    inverter = SparseInverter(teacher, objectives=[objective], iterations=30, **SPACE)
    given = {"targets": [1, 2]} if isinstance(objective, CrossEntropy) else {"batch": 2}
    state = inverter.start(**given, generator=torch.Generator().manual_seed(0))
    with products() as counted:
        state.evaluate(number=iteration)
    return counted.count


def embedding_products() -> int:
    """Products that are no part of a block: the embedding, forward and backward."""
    return 2


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_runs_the_blocks_that_it_reads(backend: str, name: str) -> None:
    """A loss of the tokens after block 3 of 12 runs a quarter of them, forward and backward.

    A block has four layers: q, k and v together, the projection, and two of the MLP.
    """
    teacher = SparseViT(deep_teacher(name), backend=backend)
    in_blocks = {
        block: count_of(teacher, NeuronTarget(block, channel=1)) - embedding_products()
        for block in (0, 2, 3, 11)
    }
    assert in_blocks == {block: 2 * 4 * (block + 1) for block in in_blocks}
    assert in_blocks[2] / in_blocks[11] == 0.25 and in_blocks[3] / in_blocks[11] <= 0.35


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tap", TAPS)
def test_an_early_exit_gives_the_same_tap_and_gradient(tap: str, backend: str, name: str) -> None:
    teacher = deep_teacher(name).double()
    sparse = SparseViT(teacher, backend=backend)
    images, kept = random_images(teacher).double().requires_grad_(), random_kept(2, 7, 16)
    jitter = (3, -5), True
    early = sparse(images, kept, jitter=jitter, taps=[tap], until=3)
    assert early.logits is None and early.importance is None and list(early.taps) == [tap]
    found = [early.taps[tap], sparse(images, kept, jitter=jitter, taps=[tap]).taps[tap]]
    weights = torch.randn_like(found[0])
    gradients = [torch.autograd.grad((x * weights).sum(), images)[0] for x in found]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*gradients)


def test_nothing_runs_that_the_last_tap_does_not_need() -> None:
    teacher = SparseViT(deep_teacher(), backend="reference")
    images, counts = random_images(teacher.vit), {}
    for tap in TAPS:
        with products() as counted, torch.no_grad():
            teacher(images, taps=[tap], until=3)
        counts[tap] = counted.count - 1 - 2 * 4
    rows = {"attention.2.row": 2}  # queries of one row, and keys
    whole = {"block.2.tokens": 4, "mlp.2.hidden": 3, "attention.2.q": 1}
    assert counts == {**whole, **rows, "attention.2": 1, "attention.2.output": 1}


def test_earlier_taps_are_those_of_a_whole_pass() -> None:
    teacher = deep_teacher()
    sparse, images = SparseViT(teacher), random_images(teacher)
    taps = ["block.0.tokens", "attention.1.row", "mlp.2.hidden", "block.3.tokens"]
    early, whole = sparse(images, taps=taps, until=6).taps, sparse(images, taps=taps).taps
    torch.testing.assert_close(early, whole)


def test_iterations_that_read_logits_or_score_run_every_block() -> None:
    teacher = SparseViT(deep_teacher(), backend="reference")
    inverter = SparseInverter(
        teacher, objectives=[NeuronTarget(0, channel=1)], iterations=30, **SPACE
    )
    state = inverter.start(batch=1, generator=torch.Generator().manual_seed(0))
    importance = state.evaluate(score=True).importance
    assert importance is not None and importance.shape == (1, 16)

    class Seldom(CrossEntropy):
        every = 2

    both = [NeuronTarget(0, channel=1, weight=0.5), Seldom()]
    seen: list[int | None] = []
    teacher.register_forward_pre_hook(
        lambda module, given, options: seen.append(options["until"]), with_kwargs=True
    )
    state = SparseInverter(teacher, objectives=both, iterations=30, **SPACE).start([1])
    for number in range(2):
        state.evaluate(number=number)
    assert seen == [None, 1]


def test_a_loss_of_pixels_alone_runs_no_block() -> None:
    teacher = SparseViT(deep_teacher(), backend="reference")
    assert count_of(teacher, TotalVariation()) == 0


def test_a_whole_inversion_is_the_one_with_logits() -> None:
    """A second objective of weight 0 reads the logits, so that each iteration runs every block."""

    class Idle(CrossEntropy):
        weight = 0.0

    teacher, found = deep_teacher().double(), []
    for objectives in ([NeuronTarget(2, channel=1)], [NeuronTarget(2, channel=1), Idle(0.0)]):
        inverter = SparseInverter(
            teacher, objectives=objectives, iterations=20, parametrization=Fourier(), **SPACE
        )
        given = {"batch": 2} if len(objectives) == 1 else {"targets": [1, 2]}
        generator = torch.Generator().manual_seed(0)
        found.append(inverter.invert(**given, generator=generator, progress=False))
    assert torch.equal(found[0].kept, found[1].kept) and found[0].kept.shape[1] < 16
    torch.testing.assert_close(found[0].images, found[1].images)


class Liar(Objective):
    name, weight, reads_logits = "liar", 1.0, False

    def __call__(self, inputs: LossInputs) -> Tensor:
        return inputs.logits.mean()


def test_an_objective_that_reads_logits_unasked_is_refused() -> None:
    inverter = SparseInverter(deep_teacher(), objectives=[Liar()], iterations=30, **SPACE)
    state = inverter.start(batch=1)
    with pytest.raises(RuntimeError, match=r"reads_logits=False read the logits.* leave"):
        state.evaluate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": 3, "taps": ["block.3.tokens", "attention.5.row"]},
         r"taps of the first 3 blocks, until=3, got \['block.3.tokens', 'attention.5.row'\]"),
        ({"until": 13}, "until, a number of blocks, in 0..12, got 13"),
        ({"until": -1}, "until, a number of blocks, in 0..12, got -1"),
        ({"until": 3, "importance": True}, "until=None with importance, got until=3"),
    ],
)  # fmt: skip
def test_what_is_no_early_exit_is_refused(options: dict[str, Any], message: str) -> None:
    sparse = SparseViT(deep_teacher())
    with pytest.raises(ValueError, match=message):
        sparse(torch.zeros(1, 3, 64, 64), **options)
