from __future__ import annotations

import itertools

import pytest
import torch
from conftest import random_kept
from torch import Tensor

from smi_fast import ops

pytestmark = pytest.mark.usefixtures("each_backend")

F64 = torch.float64


def differences(x: Tensor) -> list[Tensor]:
    return [
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., :-1, :-1] - x[..., 1:, 1:],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    ]


def test_total_variation_is_the_published_formula() -> None:
    images = torch.randn(2, 3, 9, 7, dtype=F64)
    l1, l2 = ops.total_variation(images)
    torch.testing.assert_close(l1, sum(d.abs().mean() for d in differences(images)))
    torch.testing.assert_close(l2, sum(torch.norm(d) for d in differences(images)))


def test_total_variation_of_kept_patches_counts_pairs_one_by_one() -> None:
    images, kept, size = torch.randn(2, 2, 6, 8, dtype=F64), random_kept(2, 4, 12), 2
    l1, l2 = ops.total_variation(images, kept, patch_size=size)
    expected_l1 = expected_l2 = 0.0
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        found = []
        for b, c, y, x in itertools.product(range(2), range(2), range(6), range(8)):
            v, u = y + down, x + right
            if v >= 6 or not 0 <= u < 8:
                continue
            ends = {y // size * 4 + x // size, v // size * 4 + u // size}
            if ends & set(kept[b].tolist()):
                found.append((images[b, c, y, x] - images[b, c, v, u]).item())
        expected_l1 += sum(map(abs, found)) / len(found)
        expected_l2 += sum(d * d for d in found) ** 0.5
    assert l1.item() == pytest.approx(expected_l1, rel=1e-12)
    assert l2.item() == pytest.approx(expected_l2, rel=1e-12)


def test_total_variation_with_every_patch_kept_is_that_of_the_image() -> None:
    images, every = torch.randn(2, 3, 8, 12, dtype=F64), torch.arange(6).expand(2, -1)
    kept = ops.total_variation(images, every, patch_size=4)
    torch.testing.assert_close(kept, ops.total_variation(images))


@pytest.mark.parametrize("masked", [False, True])
def test_total_variation_gradient(masked: bool) -> None:
    images = torch.randn(2, 2, 6, 8, dtype=F64, requires_grad=True)
    kept = random_kept(2, 4, 12) if masked else None
    assert torch.autograd.gradcheck(lambda x: ops.total_variation(x, kept, patch_size=2), images)


def test_total_variation_of_a_constant_has_gradient_zero() -> None:
    images = torch.ones(1, 3, 4, 4, requires_grad=True)
    l1, l2 = ops.total_variation(images)
    (l1 + l2).backward()
    assert l1 == l2 == 0 and not images.grad.any()


def test_total_variation_of_strided_images() -> None:
    images = torch.randn(2, 5, 6, 3, dtype=F64).permute(0, 3, 2, 1).detach().requires_grad_()
    sum(ops.total_variation(images)).backward()
    dense = images.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    sum(ops.total_variation(dense)).backward()
    torch.testing.assert_close(images.grad, dense.grad)


@pytest.mark.parametrize("sides", [(4, 0), (0, 4), (1, 1)])
def test_total_variation_without_neighbours_is_zero(sides: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *sides, dtype=F64, requires_grad=True)
    l1, l2 = ops.total_variation(images)
    (l1 + l2).backward()
    assert l1 == l2 == 0 and images.grad.shape == images.shape and not images.grad.any()


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


def test_adam_clamp_is_torch_adam_then_clamp() -> None:
    state = adam_state(2, 3, 8, 12)
    pixels = state["images"].clone().requires_grad_()
    adam = torch.optim.Adam([pixels], **RATE)
    for step in range(1, 6):
        pixels.grad = torch.randn_like(pixels)
        ops.adam_clamp_(grad=pixels.grad, step=step, **state, **BOUNDS, **RATE)
        adam.step()
        with torch.no_grad():
            pixels.copy_(torch.clamp(pixels, *(b[:, None, None] for b in BOUNDS.values())))
        torch.testing.assert_close(state["images"], pixels.detach(), rtol=1e-13, atol=1e-13)


def test_adam_clamp_takes_its_step_from_a_tensor(each_backend: str) -> None:
    states = [adam_state(2, 3, 8, 12) for _ in range(2)]
    states[1]["images"].copy_(states[0]["images"])
    grad = torch.randn(2, 3, 8, 12, dtype=F64)
    for step in (1, 700):
        for state, number in zip(states, (step, torch.tensor(step)), strict=True):
            ops.adam_clamp_(grad=grad, step=number, **state, **BOUNDS, **RATE)
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


def test_batch_norm_matching_is_batch_norm_and_the_published_term() -> None:
    x = torch.randn(3, 5, 4, 6, dtype=F64, requires_grad=True)
    mean, bias = torch.randn(2, 5, dtype=F64)
    var, weight = torch.rand(2, 5, dtype=F64) + 0.5
    y, loss = ops.batch_norm_matching(x, mean, var, weight, bias, 1e-3)
    expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-3)
    torch.testing.assert_close(y, expected)
    own = x.detach().transpose(0, 1).flatten(1)
    term = torch.norm(own.var(1, correction=0) - var) + torch.norm(own.mean(1) - mean)
    torch.testing.assert_close(loss, term)
    assert torch.autograd.gradcheck(
        lambda x: ops.batch_norm_matching(x, mean, var, weight, bias, 1e-3), x
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(2, 3, 8, 9)}, r"grad like images, torch.float32 \[2, 3, 8, 8\]"),
        ({"exp_avg": torch.zeros(2, 3, 8, 8, dtype=F64)}, "exp_avg like images"),
        ({"low": torch.zeros(2)}, r"low torch.float32 \[3\], got torch.float32 \[2\]"),
        ({"step": 0}, "step >= 1, got 0"),
        ({"step": torch.tensor([1])}, r"step int64 \[\], got torch.int64 \[1\]"),
        ({"step": torch.tensor(1, device="meta")}, "tensors on cpu, got one on meta"),
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


def test_bad_statistics_are_refused() -> None:
    of_four = [torch.ones(4)] * 4
    with pytest.raises(
        ValueError, match=r"running_mean torch.float32 \[3\], got torch.float32 \[4\]"
    ):
        ops.batch_norm_matching(torch.zeros(2, 3, 4, 4), *of_four)
    with pytest.raises(ValueError, match="not empty"):
        ops.batch_norm_matching(torch.zeros(0, 4, 4, 4), *of_four)
