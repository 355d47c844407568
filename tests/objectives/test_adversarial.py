"""AdversarialJS against the published divergence, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import smi_fast
from smi_fast.objectives.adversarial import clamped_js
from tests.helpers.loss_inputs import F64, compare, loss_inputs


def published_js(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (s, t))
        m = torch.clamp(0.5 * (p + q), 0.01, 0.99)
        p, q = torch.clamp(p, 0.01, 0.99), torch.clamp(q, 0.01, 0.99)
        total = total + 0.5 * (m * torch.log(m / p)).sum() + 0.5 * (m * torch.log(m / q)).sum()
    return total / len(student)


def test_adversarial() -> None:
    student, teacher = 3 * torch.randn(2, 4, 6, dtype=F64)
    compare(lambda x: clamped_js(x, teacher, 3.0), lambda x: published_js(x, teacher, 3.0), student)
    compare(lambda x: clamped_js(student, x, 2.0), lambda x: published_js(student, x, 2.0), teacher)
    # The mean of two sure predictions is outside of the bounds too.
    sure, other = 30 * student, 30 * teacher
    compare(lambda x: clamped_js(x, other, 3.0), lambda x: published_js(x, other, 3.0), sure)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clamped_js(student, x, 3.0), teacher)


def test_adversarial_student_sees_the_jittered_image() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 12, 5)).double().eval()
    images, logits = torch.randn(2, 3, 8, 12, dtype=F64), torch.randn(2, 5, dtype=F64)
    jitter = (torch.tensor([2, -3]), torch.tensor(True))
    given = loss_inputs(images, logits, jitter=jitter)
    js = published_js(network(images.roll((2, -3), (2, 3)).flip(3)), logits, 3.0)
    torch.testing.assert_close(smi_fast.AdversarialJS(network)(given), 1 - js)
    torch.testing.assert_close(smi_fast.AdversarialJS(network, bounded=False)(given), -js)
    with pytest.raises(ValueError, match="in eval mode"):
        smi_fast.AdversarialJS(network.train())(given)
    assert network.training
