"""What the loop asks of an objective, and one sentence for each objective that lacks it."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from smi_fast import AdversarialJS, CrossEntropy, Dense, Objective, UserTerm
from smi_fast.objectives import LossInputs, as_objectives
from tests.helpers.inversions import TARGETS, make, run


class Brightness(Objective):
    name, weight = "brightness", 1.0

    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)

    def __call__(self, inputs: LossInputs) -> Tensor:
        return inputs.images.mean()


class Nameless(Brightness):
    name = None


class Weightless(Brightness):
    weight = None


class Unfinished(Objective):
    def __call__(self, inputs: LossInputs) -> Tensor:
        return inputs.images.mean()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([Unfinished()], TypeError, "objective Unfinished to have a name, as name = 'unfinished'"),
        ([Nameless()], TypeError, "objective Nameless to have a name"),
        ([Weightless()], TypeError, "objective Weightless to have a weight, as weight = 1.0"),
        ([Brightness(every=0)], ValueError, "every of the objective brightness .* from 1, got 0"),
        ([Brightness(every=2.0)], ValueError, "a whole number from 1, got 2.0"),
        (
            CrossEntropy(),
            TypeError,
            r"a list of objectives, \[CrossEntropy\(\)\], got Cross",
        ),
        (CrossEntropy, TypeError, "a list of objectives"),
        (lambda images, logits: images.mean(), TypeError, "a list of objectives"),
        ("cross_entropy", TypeError, "a list of objectives"),
        ([CrossEntropy], TypeError, "an objective, got the class CrossEntropy: call it"),
        ([lambda x, y: x.mean(), lambda x, y: y.mean()], ValueError, r"UserTerm\(function, name\)"),
    ],
)
def test_what_an_objective_lacks_is_named(given: object, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        as_objectives(given)


def test_a_tensor_may_be_the_weight(teacher: VisionTransformer) -> None:
    heavy = run(teacher, objectives=[Brightness(weight=torch.tensor(2.0))])
    assert torch.equal(heavy.images, run(teacher, objectives=[Brightness(weight=2.0)]).images)


def test_an_objective_is_called_when_it_is_due(teacher: VisionTransformer) -> None:
    calls = []

    class Seldom(Brightness):
        every = 4

        def taps(self, depth: int) -> tuple[str, ...]:
            return ("block.0.tokens",)

        def __call__(self, inputs: LossInputs) -> Tensor:
            calls.append((inputs.iteration, list(inputs.taps)))
            return inputs.images.mean() + 1

    history = run(teacher, objectives=[CrossEntropy(), Seldom()]).history["brightness"]
    assert calls == [(t, ["block.0.tokens"]) for t in (0, 4, 8)]
    assert [value != 0 for value in history] == [t % 4 == 0 for t in range(10)]


def test_iterations_in_which_nothing_is_due_follow_the_momentum(
    teacher: VisionTransformer,
) -> None:
    images: list[Tensor] = []
    make(teacher, objectives=[Brightness(every=2)], schedule=Dense(), iterations=2).invert(
        TARGETS,
        progress=False,
        init=torch.zeros(2, 3, 32, 48, dtype=torch.float64),
        callback=lambda iteration, pixels, kept: images.append(pixels.clone()),
    )
    # Adam's mean of gradients 1 and 0 with beta 0.5 is 1/3 after its correction, and the root of
    # the mean of their squares with beta 0.99 is sqrt(0.99 / 1.99).
    expected = 0.25 * (1 / 3) / (0.99 / 1.99) ** 0.5
    torch.testing.assert_close(
        images[0] - images[1], torch.full_like(images[0], expected), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("value", "got"), [(lambda x: 1.0, "float"), (lambda x: x.mean((2, 3)), r"\[2, 3\]")]
)
def test_a_value_that_is_no_scalar_is_refused(
    teacher: VisionTransformer, value: object, got: str
) -> None:
    class Odd(Brightness):
        def __call__(self, inputs: LossInputs) -> Tensor:
            return value(inputs.images)

    message = f"objective brightness to return a scalar tensor, got {got}"
    with pytest.raises(ValueError, match=message):
        run(teacher, objectives=[Odd()])


def test_objectives_without_a_gradient_are_named(teacher: VisionTransformer) -> None:
    def detached(images: Tensor, logits: Tensor) -> Tensor:
        return logits.detach().sum()

    message = "no objective depends on the images: the gradient of detached, other was cut off"
    with pytest.raises(ValueError, match=message):
        run(teacher, objectives=[detached, UserTerm(detached, "other")])
    # A value that has a gradient, but not of the images.
    with pytest.raises(ValueError, match="no objective depends on the images"):
        run(teacher, objectives=[UserTerm(lambda x, y: nn.Linear(2, 1)(torch.ones(2)), "other")])
    run(teacher, objectives=[CrossEntropy(), detached])


def test_a_student_in_training_mode_is_named(teacher: VisionTransformer) -> None:
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 48, 5)).double()
    with pytest.raises(ValueError, match=r"call student\.eval\(\)"):
        run(teacher, objectives=[AdversarialJS(student)])


def test_objectives_are_checked_when_an_inverter_is_made(teacher: VisionTransformer) -> None:
    with pytest.raises(TypeError, match="a list of objectives"):
        make(teacher, objectives=CrossEntropy())
