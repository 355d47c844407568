"""adam_clamp_ against torch's own Adam and a clamp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.verify.cases import random_kept

pytestmark = pytest.mark.usefixtures("each_backend")


F64 = torch.float64


def adam_state(*shape: int) -> dict[str, Tensor]:
    return {
        "images": torch.randn(*shape, dtype=F64),
        "exp_avg": torch.zeros(*shape, dtype=F64),
        "exp_avg_sq": torch.zeros(*shape, dtype=F64),
    }


BOUNDS = {
    "low": torch.tensor([-0.5, -1.0, -2.0], dtype=F64),
    "high": torch.tensor([0.5, 1.0, 0.25], dtype=F64),
}


RATE = {"lr": 0.25, "betas": (0.5, 0.99)}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.Adam, {}), (torch.optim.AdamW, {"weight_decay": 0.3})],
)
def test_adam_clamp_is_a_step_of_torch_and_a_clamp(optimizer: type, options: dict) -> None:
    state = adam_state(2, 3, 8, 12)
    pixels = state["images"].clone().requires_grad_()
    adam = optimizer([pixels], **RATE, **options)
    for step in range(1, 6):
        pixels.grad = torch.randn_like(pixels)
        ops.adam_clamp_(grad=pixels.grad, step=step, **state, **BOUNDS, **RATE, **options)
        adam.step()
        with torch.no_grad():
            pixels.copy_(torch.clamp(pixels, *(b[:, None, None] for b in BOUNDS.values())))
        torch.testing.assert_close(state["images"], pixels.detach(), rtol=1e-13, atol=1e-13)


def test_adam_clamp_takes_its_step_and_its_rate_from_tensors(each_backend: str) -> None:
    states = [adam_state(2, 3, 8, 12) for _ in range(2)]
    states[1]["images"].copy_(states[0]["images"])
    grad = torch.randn(2, 3, 8, 12, dtype=F64)
    options = {"grad": grad, "betas": (0.5, 0.99), "weight_decay": 0.3, **BOUNDS}
    for step, lr in ((1, 0.25), (700, 0.0125)):
        tensors = {"step": torch.tensor(step), "lr": torch.tensor(lr, dtype=F64)}
        for state, numbers in zip(states, ({"step": step, "lr": lr}, tensors), strict=True):
            ops.adam_clamp_(**numbers, **state, **options)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_adam_clamp_touches_active_patches_only() -> None:
    state, dense = adam_state(2, 3, 8, 12), adam_state(2, 3, 8, 12)
    dense["images"].copy_(state["images"])
    before = state["images"].clone()
    active, grad = random_kept(2, 3, 6), torch.randn(2, 3, 8, 12, dtype=F64)
    for step in (1, 2):
        arguments = {"grad": grad, "step": step, **BOUNDS, **RATE}
        ops.adam_clamp_(active=active, patch_size=4, **state, **arguments)
        ops.adam_clamp_(**dense, **arguments)
    mask = torch.zeros(2, 6, dtype=torch.bool).scatter(1, active, True).reshape(2, 1, 2, 3)
    mask = mask.repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(before)
    for name, tensor in state.items():
        assert torch.equal(tensor[mask], dense[name][mask])
    assert torch.equal(state["images"][~mask], before[~mask])
    assert not state["exp_avg"][~mask].any() and not state["exp_avg_sq"][~mask].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 3, 8, 9)}, r"grad like images, torch.float32 \[2, 3, 8, 8\]"),
        ({"exp_avg": torch.zeros(2, 3, 8, 8, dtype=F64)}, "exp_avg like images"),
        ({"low": torch.zeros(2)}, r"low torch.float32 \[3\], got torch.float32 \[2\]"),
        ({"step": 0}, "step >= 1, got 0"),
        ({"step": torch.tensor([1])}, r"step int64 \[\], got torch.int64 \[1\]"),
        ({"step": torch.tensor(1, device="meta")}, "tensors on cpu, got one on meta"),
        ({"lr": -0.1}, "a finite lr >= 0, got -0.1"),
        ({"lr": torch.nan}, "a finite lr >= 0, got nan"),
        ({"lr": torch.tensor(0.1)}, r"lr float64 \[\], got torch.float32 \[\]"),
        ({"lr": torch.ones(1, dtype=F64)}, r"lr float64 \[\], got torch.float64 \[1\]"),
        ({"lr": torch.ones((), dtype=F64, device="meta")}, "tensors on cpu, got one on meta"),
        ({"weight_decay": -1e-4}, "a finite weight_decay >= 0, got -0.0001"),
        ({"weight_decay": torch.inf}, "a finite weight_decay >= 0, got inf"),
        (
            {"active": torch.zeros(2, 3, dtype=torch.int64), "patch_size": 3},
            "patch size 3, got 8 x 8",
        ),
    ],
)
def test_bad_adam_input_is_refused(change: dict, message: str) -> None:
    names = ("images", "grad", "exp_avg", "exp_avg_sq")
    good = {name: torch.zeros(2, 3, 8, 8) for name in names}
    good |= {"low": torch.zeros(3), "high": torch.ones(3), "step": 1, **RATE}
    with pytest.raises(ValueError, match=message):
        ops.adam_clamp_(**(good | change))
