"""Learning rates: their tables, what is refused, and an inversion that follows one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from smi_fast import Cosine, CrossEntropy, Dense, LearningRate, PerPhase
from smi_fast.inversion import InversionState
from smi_fast.learning_rate import rate_table
from tests.helpers.host_guard import HostGuard
from tests.helpers.inversions import SPACE, STOPS, TARGETS, frames, make, pixels_of

F64 = torch.float64


def published(largest: float, warm_up: int, length: int) -> list[float]:
    """One cycle of DeepInversion and PSAQ-ViT, as their code has it."""
    rates = []
    for i in range(length):
        if i < warm_up:
            rates.append(largest * (i + 1) / warm_up)
        else:
            share = (i - warm_up) / (length - warm_up)
            rates.append(0.5 * (1 + math.cos(math.pi * share)) * largest)
    return rates


@pytest.mark.parametrize(
    ("rate", "iterations", "expected"),
    [
        (Cosine(0.2, warm_up=0.05), 2000, published(0.2, 100, 2000)),
        (Cosine(0.2, warm_up=0.2, restarts=1), 1000, 2 * published(0.2, 100, 500)),
        (Cosine(0.2, restarts=2), 8, [r for n in (3, 2, 3) for r in published(0.2, 0, n)]),
    ],
)
def test_cosine_is_the_published_one(rate: Cosine, iterations: int, expected: list) -> None:
    assert rate.rates(iterations, ()) == pytest.approx(expected, rel=1e-14)


def test_cosine_falls_to_its_final_rate_as_torchs_does() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.001)
    expected = []
    for _ in range(50):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert Cosine(0.1, final=0.001).rates(50, ()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("iterations", range(1, 9))
@pytest.mark.parametrize("warm_up", [0.0, 0.3, 0.99])
def test_a_short_run_has_a_rate_for_each_iteration(iterations: int, warm_up: float) -> None:
    table = rate_table(Cosine(0.2, warm_up=warm_up, restarts=2), iterations, ())
    assert table.shape == (iterations,) and table.dtype == F64
    assert table.min() > 0 and table.max().item() == pytest.approx(0.2)


def test_a_rate_for_each_phase() -> None:
    rates = PerPhase([0.3, 0.2, 0.1])
    assert rates.rates(10, STOPS.at) == [0.3] * 3 + [0.2] * 3 + [0.1] * 4
    with pytest.raises(ValueError, match=r"3 learning rates, one for each .* 2 stops, got 2"):
        PerPhase((0.3, 0.2)).rates(10, STOPS.at)


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.4], np.array([0.1, 0.2, 0.4]), torch.ones(3) / 8])
def test_a_sequence_is_taken_as_it_is_and_copied(values: object) -> None:
    table = rate_table(values, 3, ())
    assert table.tolist() == list(values)
    values[0] = 7.0
    assert table[0] < 1


class Wrong:
    def rates(self, iterations: int, stops: tuple[int, ...]) -> list[float]:
        return [0.1] * (iterations + 1)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (0.0, "lr above 0, got 0.0"),
        (math.nan, "lr above 0, got nan"),
        ("fast", "lr as a number, a LearningRate or 3 numbers, got 'fast'"),
        (None, "lr as a number, a LearningRate or 3 numbers, got None"),
        (torch.ones(3) + 1j, "lr as a number, a LearningRate or 3 numbers, got tensor"),
        (Cosine, "lr as a number, a LearningRate or 3 numbers, got <class"),
        ([0.1, 0.2], r"a learning rate for each of 3 iterations, got \[2\] of them"),
        (torch.ones(3, 1), r"each of 3 iterations, got \[3, 1\] of them"),
        (Wrong(), r"each of 3 iterations, got \[4\] of them"),
        ([0.1, 0.0, 0.2], "learning rates above 0, iteration 1 has 0.0"),
        ([0.1, 0.1, math.inf], "learning rates above 0, iteration 2 has inf"),
    ],
)
def test_what_is_no_learning_rate_is_refused(
    teacher: VisionTransformer, lr: object, message: str
) -> None:
    assert isinstance(Wrong(), LearningRate)
    with pytest.raises(ValueError, match=message):
        make(teacher, schedule=Dense(), iterations=3, lr=lr)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Cosine, {"lr": -1.0}, "lr above 0, got -1.0"),
        (Cosine, {"lr": 0.1, "warm_up": 100}, r"warm_up, a share, in \[0, 1\), got 100"),
        (Cosine, {"lr": 0.1, "final": 0.2}, r"final in \[0, 0.1\], got 0.2"),
        (Cosine, {"lr": 0.1, "restarts": 0.5}, "restarts as a whole number from 0, got 0.5"),
        (PerPhase, {"values": ()}, r"learning rates above 0, \(0.2, 0.1\), got \(\)"),
        (PerPhase, {"values": (0.1, 0.0)}, r"learning rates above 0, .* got \(0.1, 0.0\)"),
        (PerPhase, {"values": 0.1}, "learning rates above 0, .* got 0.1"),
    ],
)
def test_numbers_out_of_range_are_refused(kind: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer adam or adamw, got 'sgd'"),
        ({"weight_decay": 0.1}, "optimizer='adamw' with a weight_decay, got 'adam' with 0.1"),
        ({"optimizer": "adamw", "weight_decay": -0.1}, "finite weight_decay from 0, got -0.1"),
        ({"optimizer": "adamw", "weight_decay": "1"}, "finite weight_decay from 0, got '1'"),
    ],
)
def test_what_is_no_optimizer_is_refused(
    teacher: VisionTransformer, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(teacher, **options)


@pytest.mark.parametrize(
    ("optimizer", "given", "options"),
    [
        ("adam", None, {"weight_decay": 0.0}),
        ("adamw", None, {}),
        ("adamw", 0.6, {"weight_decay": 0.6}),
    ],
)
def test_an_inversion_is_torchs_optimizer_with_a_schedule(
    teacher: VisionTransformer,
    each_backend: str,
    optimizer: str,
    given: float | None,
    options: dict,
) -> None:
    """Iterations are taken as a captured graph takes them: the host says nothing new to one."""
    lr = Cosine(0.25, warm_up=0.2, final=0.05, restarts=1)
    chosen = {"optimizer": optimizer, "weight_decay": given}
    inverter = make(teacher, schedule=Dense(), objectives=[CrossEntropy()], lr=lr, **chosen)
    still = (torch.zeros(10, 2, dtype=torch.int64), torch.zeros(10, dtype=torch.bool))
    init = torch.randn(2, 3, 32, 48, dtype=F64)
    state: InversionState = inverter.start(TARGETS, init, still)

    mean, std = (torch.tensor(SPACE[k], dtype=F64)[:, None, None] for k in SPACE)
    pixels, table = init.clone().requires_grad_(), lr.rates(10, ())
    adam = torch.optim.AdamW([pixels], 1.0, (0.5, 0.99), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: table[min(t, 9)])
    for _ in range(10):
        with HostGuard():
            state.step()
        adam.zero_grad()
        F.cross_entropy(teacher(pixels), torch.tensor(TARGETS)).backward()
        adam.step()
        scheduler.step()
        with torch.no_grad():
            pixels.clamp_(-mean / std, (1 - mean) / std)
        torch.testing.assert_close(state.images(), pixels.detach(), rtol=1e-9, atol=1e-9)


def test_stopped_patches_do_not_decay(teacher: VisionTransformer) -> None:
    images, kept = frames(make(teacher, optimizer="adamw", weight_decay=0.5))
    stopped = ~pixels_of(kept[-1])
    assert torch.equal(images[-1][stopped], images[6][stopped])
    assert not torch.equal(images[-1], images[6])
