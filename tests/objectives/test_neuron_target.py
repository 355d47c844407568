"""NeuronTarget against the block's own modules, what it refuses, and that neurons get excited."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smi_fast import NeuronTarget, SparseInverter, SparseViT, StopSchedule
from tests.helpers.teachers import make_teacher, tiny_vit

SPACE = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
WIDTH = {"tokens": 32, "class_token": 32, "mlp_hidden": 128}


def activations(where: str, images: Tensor, teacher: object) -> Tensor:
    """[B, tokens, F] after the first block of a timm model, from its own modules."""
    block = teacher.blocks[0]
    x = teacher._pos_embed(teacher.patch_embed(images))
    if where == "mlp_hidden":
        x = x + block.attn(block.norm1(x))
        return block.mlp.act(block.mlp.fc1(block.norm2(x)))[:, 1:]
    return block(x)[:, :1] if where == "class_token" else block(x)[:, 1:]


@pytest.mark.parametrize("where", WIDTH)
@pytest.mark.parametrize("neuron", ["channel", "channels", "direction", "directions", "targets"])
def test_the_loss_is_the_negative_activation(where: str, neuron: str) -> None:
    teacher, images = tiny_vit().double(), torch.rand(2, 3, 32, 48, dtype=torch.float64)
    width = WIDTH[where]
    directions = torch.randn(2, width, dtype=torch.float64)
    options, projections = {
        "channel": ({"channel": 5}, F.one_hot(torch.tensor([5, 5]), width)),
        "channels": ({"channel": [3, 5]}, F.one_hot(torch.tensor([3, 5]), width)),
        "direction": ({"direction": directions[0]}, F.normalize(directions[:1], dim=1)),
        "directions": ({"direction": directions}, F.normalize(directions, dim=1)),
        "targets": ({}, F.normalize(directions, dim=1)),
    }[neuron]
    objective = NeuronTarget(0, where=where, **options)
    given = {"targets": directions} if neuron == "targets" else {"batch": 2}
    inverter = SparseInverter(teacher, objectives=[objective], iterations=10, **SPACE)
    state = inverter.start(**given, generator=torch.Generator().manual_seed(0))
    state.shift.zero_(), state.flip.fill_(False)
    images = state.images()
    state.evaluate()
    expected = activations(where, images, teacher) * projections.to(images)[:, None]
    torch.testing.assert_close(state.record[0, 0], -expected.sum(2).mean())


@pytest.mark.parametrize("where", WIDTH)
def test_neurons_are_excited_in_whole_and_in_sparse_images(where: str) -> None:
    teacher = tiny_vit()
    sparse = SparseViT(teacher)
    objective = NeuronTarget(-1, channel=[3, 5], where=where)
    result = SparseInverter(
        sparse, objectives=[objective], iterations=30, schedule=StopSchedule.once(30), **SPACE
    ).invert(batch=2, generator=torch.Generator().manual_seed(0), progress=False)
    values = result.history["neuron"]
    assert values[-1] < values[0] - 0.1
    images, names = (result.images - 0.5) / 0.25, objective.taps(sparse.depth)
    taps = sparse(images, result.kept, taps=names).taps
    found = objective.activation(taps, torch.tensor([3, 5]), sparse)
    swapped = objective.activation(taps, torch.tensor([5, 3]), sparse)
    assert (found.sum() - swapped.sum()) > 0.1


def test_a_class_token_is_not_a_register() -> None:
    teacher = make_teacher("vit_medium_patch16_gap_256", depth=1, reg_tokens=1, class_token=False)
    objective = NeuronTarget(0, channel=1, where="class_token")
    with pytest.raises(ValueError, match="a teacher with a class token"):
        SparseInverter(teacher, objectives=[objective], **SPACE).start(batch=1)


def test_a_split_batch_has_its_own_neurons() -> None:
    teacher, values = tiny_vit(), []
    for most in (None, 1):
        inverter = SparseInverter(
            teacher, objectives=[NeuronTarget(0, channel=[3, 5, 7])], iterations=10, max_batch=most,
            **SPACE,
        )  # fmt: skip
        state = inverter.start(batch=3, generator=torch.Generator().manual_seed(0))
        state.evaluate()
        values.append(state.record[0])
    torch.testing.assert_close(*values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuronTarget(0, 1, where="mlp"), "where tokens, mlp_hidden, .* got 'mlp'"),
        (lambda: NeuronTarget(0, 1, torch.ones(32)), "channel or direction, got both"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "targets", "message"),
    [
        (NeuronTarget(2, 1), None, r"blocks in -2..1, got \(2,\)"),
        (NeuronTarget(0, 32), None, "channel in 0..31, got 32"),
        (NeuronTarget(0, 128, where="mlp_hidden"), None, "channel in 0..127, got 128"),
        (NeuronTarget(0, [1, -1]), None, "channel in 0..31, got -1"),
        (NeuronTarget(0, 1.5), None, r"whole numbers of 0 or 1 dimensions, got torch.float32 \[\]"),
        (NeuronTarget(0, [1, 2, 3]), None, "one for each of 2 images, got 3"),
        (NeuronTarget(0, direction=torch.ones(31)), None, "direction of width 32, got 31"),
        (NeuronTarget(0, direction=torch.zeros(32)), None, "of a length above 0, got others"),
        (NeuronTarget(0, direction=torch.ones(32).int()), None, "got torch.int32"),
        (NeuronTarget(0), None, "one for each image as targets, got none"),
        (NeuronTarget(0), [1, 32], "targets in 0..31, got 32"),
        (NeuronTarget(0), torch.ones(2, 31), "targets of width 32, got 31"),
    ],
)
def test_what_is_no_neuron_of_the_teacher_is_refused(
    objective: NeuronTarget, targets: object, message: str
) -> None:
    inverter = SparseInverter(tiny_vit(), objectives=[objective], **SPACE)
    given = {"batch": 2} if targets is None else {"targets": targets}
    with pytest.raises(ValueError, match=message):
        inverter.start(**given)
