"""EmbeddingTarget: its distances, what it reads, what it refuses, and that it finds an image."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import Dense, EmbeddingTarget, Jitter, Pixels, SparseInverter, SparseViT
from tests.helpers.loss_inputs import F64, compare, loss_inputs
from tests.helpers.teachers import tiny_vit

SPACE = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def angle(found: Tensor, wanted: Tensor) -> Tensor:
    return F.cosine_similarity(found, wanted).acos()


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda z, e: 1 - F.cosine_similarity(z, e).mean(),
    "spherical": lambda z, e: (angle(z, e) ** 2 / 2).mean(),
    "l2": lambda z, e: ((z - e) ** 2).sum(1).mean(),
    "infonce": lambda z, e: (
        -(
            F.cosine_similarity(z[:, None], e[None], dim=2)
            .div(0.07)
            .log_softmax(1)
            .diagonal()
            .mean()
        )
    ),
}


@pytest.mark.parametrize("distance", PLAIN)
@pytest.mark.parametrize("given", ["embeddings", "targets"])
def test_each_distance_is_its_formula(distance: str, given: str) -> None:
    wanted = torch.randn(3, 6, dtype=F64)
    objective = EmbeddingTarget(wanted if given == "embeddings" else None, distance)
    options = {"kept": torch.zeros(3, 1, dtype=torch.int64), "targets": wanted}
    compare(
        lambda logits: objective(loss_inputs(logits=logits, **options)),
        lambda logits: PLAIN[distance](logits, wanted),
        torch.randn(3, 6, dtype=F64),
    )


def test_one_embedding_is_for_all_images() -> None:
    wanted, found = torch.randn(6, dtype=F64), torch.randn(3, 6, dtype=F64)
    value = EmbeddingTarget(wanted, "l2")(loss_inputs(logits=found))
    torch.testing.assert_close(value, PLAIN["l2"](found, wanted.expand(3, -1)))


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0])
def test_spherical_has_a_finite_gradient_everywhere(scale: float) -> None:
    wanted = torch.randn(1, 6, dtype=F64)
    found = (scale * wanted).requires_grad_()
    value = EmbeddingTarget(wanted, "spherical")(loss_inputs(logits=found))
    (gradient,) = torch.autograd.grad(value, found)
    assert value.isfinite() and gradient.isfinite().all()


def headless() -> VisionTransformer:
    teacher = tiny_vit()
    teacher.reset_classifier(0)
    return teacher


def invert(teacher: VisionTransformer, objective: EmbeddingTarget, **options: object) -> Tensor:
    inverter = SparseInverter(
        teacher,
        objectives=[objective],
        schedule=Dense(),
        parametrization=Pixels(),
        jitter=Jitter(share=0, flip=False),
        iterations=60,
        **SPACE,
    )
    generator = torch.Generator().manual_seed(0)
    return inverter.invert(**options, generator=generator, progress=False).logits


@pytest.mark.parametrize("distance", PLAIN)
def test_a_headless_teacher_comes_near_the_embedding_of_an_image(distance: str) -> None:
    """Each image comes nearer to its own target than to the other's."""
    teacher = headless()
    wanted = SparseViT(teacher)(torch.randn(2, 3, 32, 48)).logits.detach()
    found = invert(teacher, EmbeddingTarget(wanted, distance), batch=2)
    torch.testing.assert_close(found, invert(teacher, EmbeddingTarget(None, distance),
                                             targets=wanted))  # fmt: skip
    alike = F.cosine_similarity(found[:, None], wanted[None], dim=2)
    assert (alike.argmax(1) == torch.arange(2)).all()
    # infonce only tells the two apart.
    assert distance == "infonce" or (alike.diagonal() > 0.9).all()


def test_a_split_batch_has_its_own_embeddings() -> None:
    teacher, wanted, values = headless(), torch.randn(3, 32), []
    for most in (None, 1):
        inverter = SparseInverter(
            teacher,
            objectives=[EmbeddingTarget(wanted)],
            iterations=10,
            max_batch=most,
            **SPACE,
        )
        state = inverter.start(batch=3, generator=torch.Generator().manual_seed(0))
        state.evaluate()
        values.append(state.record[0])
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="max_batch"):
        SparseInverter(
            teacher, objectives=[EmbeddingTarget(wanted, "infonce")], max_batch=1, **SPACE
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddingTarget(torch.ones(32), "angle"), "distance cosine, .* got 'angle'"),
        (lambda: EmbeddingTarget([1.0]), "embedding as a tensor, got list"),
    ],
)
def test_bad_options_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (
            EmbeddingTarget(torch.ones(31)),
            {"batch": 2},
            r"embedding as torch.float32 \[32\] or \[B, 32\] on cpu, got torch.float32 \[31\]",
        ),
        (EmbeddingTarget(torch.ones(32, dtype=F64)), {"batch": 2}, r"got torch.float64 \[32\]"),
        (
            EmbeddingTarget(torch.ones(3, 32)),
            {"batch": 2},
            r"each of 2 images, got \[3, 32\]",
        ),
        (EmbeddingTarget(torch.zeros(32)), {"batch": 2}, "a direction for cosine, got zeros"),
        (
            EmbeddingTarget(torch.full((32,), torch.nan)),
            {"batch": 2},
            "finite embedding",
        ),
        (EmbeddingTarget(), {"batch": 2}, r"targets as torch.float32 \[B, 32\] on cpu, got none"),
        (EmbeddingTarget(), {"targets": [1, 2]}, r"\[B, 32\] on cpu, got torch.int64 \[2\]"),
        (
            EmbeddingTarget(torch.ones(32), "infonce"),
            {"batch": 2},
            "got one embedding for all",
        ),
        (EmbeddingTarget(torch.ones(1, 32), "infonce"), {"batch": 1}, "got a batch of 1"),
    ],
)
def test_what_is_no_embedding_of_the_teacher_is_refused(
    objective: EmbeddingTarget, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        invert(headless(), objective, **options)
