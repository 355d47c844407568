"""NaN and infinity where nothing should read them, and indices out of range: one rule each."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.objectives import PatchSeamTV
from smi_fast.ops import reference
from smi_fast.verify.cases import random_kept
from tests.helpers.kernels import needs_cpp
from tests.helpers.loss_inputs import loss_inputs

NAN = torch.nan
F64 = torch.float64


def attended(qkv: Tensor, grad: Tensor, *index: Tensor | None) -> tuple[Tensor, ...]:
    leaf = qkv.clone().requires_grad_()
    out, importance = ops.gather_attention(leaf, *index, importance=True)
    (gradient,) = torch.autograd.grad(out, leaf, grad)
    return out.detach(), importance, gradient


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("gathered", [False, True])
def test_rows_past_the_lengths_are_not_read(gathered: bool) -> None:
    qkv, lengths = torch.randn(3, 9, 3, 2, 8, dtype=F64), torch.tensor([4, 0, 6])
    index = random_kept(3, 6, 9) if gathered else None
    spoilt, count = qkv.clone(), 6 if gathered else 9
    grad = torch.randn(3, count, 16, dtype=F64)
    spoilt_grad = grad.clone()
    for image, length in enumerate(lengths.tolist()):
        beyond = range(length, 9) if index is None else index[image, length:].tolist()
        spoilt[image, list(beyond)] = NAN
        spoilt_grad[image, length:] = NAN
    expected = attended(qkv, grad, index, lengths)
    for ours, plain in zip(attended(spoilt, spoilt_grad, index, lengths), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.usefixtures("each_backend")
def test_no_tokens_have_an_empty_importance() -> None:
    qkv, none = torch.randn(2, 5, 3, 2, 8), torch.zeros(2, 0, dtype=torch.int64)
    out, importance = ops.gather_attention(qkv, none, importance=True)
    assert out.shape == (2, 0, 16) and importance.shape == (2, 0)


def far_from(active: Tensor, images: Tensor) -> Tensor:
    """The images with NaN in the last patch, which no active patch touches."""
    assert int(active.max()) < 9
    spoilt = images.clone()
    spoilt[..., -4:, -4:] = NAN
    return spoilt


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("objective", ["total_variation", "patch_seams"])
def test_pixels_of_stopped_patches_are_not_read(objective: str) -> None:
    images, active = torch.randn(2, 3, 16, 16, dtype=F64), random_kept(2, 4, 9)

    def value(pixels: Tensor) -> Tensor:
        if objective == "total_variation":
            return sum(ops.total_variation(pixels, active, patch_size=4))
        return PatchSeamTV()(loss_inputs(pixels, active=active))

    results = []
    for given in (images, far_from(active, images)):
        leaf = given.clone().requires_grad_()
        total = value(leaf)
        results.append((total.detach(), torch.autograd.grad(total, leaf)[0]))
    assert all(map(torch.equal, *results))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("beta", [0.5, 0.1, 0.9])
def test_an_infinite_gradient_gives_an_infinite_mean_and_nan_pixels(beta: float) -> None:
    images, grad, exp_avg, exp_avg_sq = (torch.zeros(1, 1, 4, 4) for _ in range(4))
    grad[..., 1, 2] = torch.inf
    bounds = {"low": -torch.ones(1), "high": torch.ones(1)}
    ops.adam_clamp_(images, grad, exp_avg, exp_avg_sq, step=1, lr=0.1, betas=(beta, 0.9), **bounds)
    at = [[0, 0, 1, 2]]
    assert exp_avg.isinf().nonzero().tolist() == exp_avg_sq.isinf().nonzero().tolist() == at
    assert images.isnan().nonzero().tolist() == at


@needs_cpp
@pytest.mark.parametrize("bad", [-1, 12])
def test_an_index_out_of_range_is_a_value_error_of_one_sentence(bad: int) -> None:
    index = torch.tensor([[0, 1], [bad, 2]])
    images = torch.zeros(2, 3, 12, 16)
    moments = [torch.zeros_like(images) for _ in range(3)]
    bounds = {"low": -torch.ones(3), "high": torch.ones(3)}
    calls = {
        "kept": lambda: ops.gather_patches(images, index, patch_size=4),
        "token_index": lambda: ops.gather_attention(torch.zeros(2, 12, 3, 2, 8), index),
        "active": lambda: ops.total_variation(images, index, patch_size=4),
        "active ": lambda: ops.adam_clamp_(
            images, *moments, step=1, lr=0.1, betas=(0, 0), **bounds, active=index, patch_size=4
        ),
    }
    for name, call in calls.items():
        sentence = re.escape(f"expected {name.strip()} in [0, 12), got {bad} at [1, 0]")
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            call()


def test_other_errors_of_kernels_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reference, "total_variation", failing)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        ops.total_variation(torch.zeros(1, 3, 8, 8), backend="reference")
