"""Gradients of pixels that are collected, against those that autograd adds up."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smi_fast import ops
from smi_fast.ops import backends
from smi_fast.ops.collected import Collected, collected
from smi_fast.verify.cases import SPECIFICATION, random_kept

F64 = torch.float64
CALLS: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _the_backend_is_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name of the backend that collects; it counts what it runs."""

    def counted(name: str) -> Any:
        def run(*arguments: Any) -> Any:
            CALLS[name] += 1
            return getattr(SPECIFICATION, name)(*arguments)

        return run

    triton = backends.by_name("triton")
    functions = SimpleNamespace(**{name: counted(name) for name in vars(SPECIFICATION)})
    monkeypatch.setitem(triton.__dict__, "why_not", lambda *_: None)
    monkeypatch.setitem(triton.__dict__, "functions", functions)
    CALLS.clear()


def terms(images: Tensor, windows: Tensor | None, active: Tensor | None) -> Tensor:
    """A loss that reads windows of these patches, and the variation of those."""
    loss = images[0, 0, 0, 0] * 0
    if windows is not None:
        shift = torch.tensor([3, -5])
        patches, _ = ops.gather_patches(images, windows, shift, patch_size=4, backend="triton")
        loss = loss + patches.sin().sum()
    if active is not None:
        l1, l2 = ops.total_variation(images, active, patch_size=4, backend="triton")
        loss = loss + 0.3 * l1 + l2
    return loss


def gradient(loss: Tensor, images: Tensor, collector: Collected) -> Tensor:
    with collector.collecting():
        (rest,) = torch.autograd.grad(loss, images)
    found = collector.gradient(rest)
    assert found is not None
    return found


KEPT, OTHERS = random_kept(2, 4, 6), random_kept(2, 3, 6)


@pytest.mark.parametrize(
    ("windows", "active", "kernels"),
    [
        (KEPT, KEPT, {"pixel_gradient": 1}),
        (KEPT, OTHERS, {"gather_patches_backward": 1, "total_variation_backward": 1}),
        (KEPT, None, {"gather_patches_backward": 1}),
        (None, KEPT, {"total_variation_backward": 1}),
    ],
)
def test_the_gradient_is_that_of_autograd(
    windows: Tensor | None, active: Tensor | None, kernels: dict[str, int]
) -> None:
    images = torch.randn(2, 3, 8, 12, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(terms(images, windows, active), images)
    with collected(images) as collector:
        loss = terms(images, windows, active)
    CALLS.clear()
    torch.testing.assert_close(gradient(loss, images, collector), expected)
    assert kernels == CALLS


def test_a_second_term_of_a_kind_and_other_images_go_the_common_way() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=F64, requires_grad=True)

    def twice() -> Tensor:
        return terms(images, KEPT, KEPT) + terms(images, OTHERS, KEPT) + terms(-images, KEPT, KEPT)

    (expected,) = torch.autograd.grad(twice(), images)
    with collected(images) as collector:
        loss = twice()
    torch.testing.assert_close(gradient(loss, images, collector), expected)


def test_a_gradient_that_an_objective_asks_for_is_whole() -> None:
    images = torch.randn(2, 3, 8, 12, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(terms(images, KEPT, KEPT), images)
    with collected(images) as collector:
        loss = terms(images, KEPT, KEPT)
        (inner,) = torch.autograd.grad(loss, images, retain_graph=True)
    torch.testing.assert_close(inner, expected)
    torch.testing.assert_close(gradient(loss, images, collector), expected)
    outside = terms(images, KEPT, KEPT)
    with collector.collecting():
        torch.testing.assert_close(torch.autograd.grad(outside, images)[0], expected)


def test_nothing_has_no_gradient() -> None:
    with collected(torch.zeros(1, 3, 8, 8)) as collector:
        pass
    assert collector.gradient(None) is None
