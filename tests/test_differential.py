"""Random calls and random teachers: the C++ ops against the reference, SparseViT against timm.

The profile ``ci`` draws the same examples in every run, and ``make fuzz`` draws new ones for about
an hour.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from smi_fast import SparseViT, UnsupportedTeacher
from smi_fast.ops import reference
from smi_fast.verify.cases import OpCall, random_kept, strided
from tests.helpers.kernels import needs_cpp
from tests.helpers.random_teachers import CHANGES, Draw, teachers
from tests.helpers.weight_changes import NOTICED, UNCOUNTED

OPTIONS = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **OPTIONS)
settings.register_profile("fuzz", max_examples=3000, **OPTIONS)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# A budget is twice the error of eager PyTorch, which by luck is small in one of thousands of calls.
LUCK = 8
TAPS = ("block.0.tokens", "attention.last", "block.last.tokens")


def laid_out(draw: Draw, tensor: Tensor) -> Tensor:
    """The same values in another layout, or equal ones of a batch that share their memory."""
    layout = draw(st.sampled_from(["dense", "strided", "expanded", "inside"]))
    if layout == "strided":
        return strided(tensor)
    if layout == "expanded" and len(tensor):
        return tensor[:1].expand_as(tensor)
    if layout == "inside":  # a larger tensor, which is NaN or -1 around it
        fill = torch.nan if tensor.is_floating_point() else -1
        around = tensor.new_full([side + 2 for side in tensor.shape], fill)
        middle = around[tuple(slice(1, side + 1) for side in tensor.shape)]
        middle.copy_(tensor)
        return middle
    return tensor


@st.composite
def on_patches(draw: Draw) -> tuple[Tensor, Tensor, int]:
    """Images, patches of them, and the side of a patch."""
    size, rows, columns = (draw(st.integers(1, most)) for most in (17, 6, 6))
    batch, channels = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    images = torch.randn(batch, channels, rows * size, columns * size)
    images = images * draw(st.sampled_from([1.0, 1e-6, 1e6]))
    count = draw(st.integers(0, rows * columns))
    kept = random_kept(batch, count, rows * columns) if batch else torch.zeros(0, count).long()
    return laid_out(draw, images), laid_out(draw, kept), size


def gather_patches(draw: Draw) -> list[tuple[str, tuple[Any, ...]]]:
    images, kept, size = draw(on_patches())
    batch = len(images)
    jitter = torch.randint(-99, 100, (batch, 2)), torch.rand(batch) < 0.5
    if batch and draw(st.booleans()):  # one for all images
        jitter = jitter[0][:1].expand(batch, 2), jitter[1][:1].expand(batch)
    grad = laid_out(draw, torch.randn(*kept.shape, images.shape[1] * size**2))
    backward = (grad, kept, *jitter, size, *images.shape[2:])
    return [("", (images, kept, *jitter, size)), ("_backward", backward)]


def gather_sigmoid_patches(draw: Draw) -> list[tuple[str, tuple[Any, ...]]]:
    field, kept, size = draw(on_patches())
    field = field.clamp(-30, 30)  # beyond, slopes leave the range of float32
    batch, channels, height, width = field.shape
    jitter = torch.randint(-99, 100, (batch, 2)), torch.rand(batch) < 0.5
    mean, std = torch.rand(channels), torch.rand(channels) + 0.2
    background, frozen = None, None
    if draw(st.booleans()):
        background = laid_out(draw, torch.randn(field.shape))
        frozen = torch.rand(batch, height // size, width // size) < 0.5
    grad = laid_out(draw, torch.randn(*kept.shape, channels * size**2))
    forward = (field, kept, *jitter, mean, std, background, frozen, size)
    return [("", forward), ("_backward", (grad, field, kept, *jitter, std, frozen, size))]


def gather_attention(draw: Draw) -> list[tuple[str, tuple[Any, ...]]]:
    batch, heads = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    tokens, width = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    count = draw(st.integers(0, tokens))
    qkv = torch.randn(batch, tokens, 3, heads, width) * draw(st.sampled_from([1.0, 3.0, 1e-3]))
    index = random_kept(batch, count, tokens) if batch and draw(st.booleans()) else None
    count = tokens if index is None else count
    lengths = torch.tensor([draw(st.integers(0, count)) for _ in range(batch)]).long()
    rows = (
        laid_out(draw, qkv),
        None if index is None else laid_out(draw, index),
        lengths if draw(st.booleans()) else None,
    )
    grad = laid_out(draw, torch.randn(batch, count, heads * width))
    return [("", (*rows, draw(st.booleans()))), ("_backward", (grad, *rows))]


def total_variation(draw: Draw) -> list[tuple[str, tuple[Any, ...]]]:
    images, active, size = draw(on_patches())
    rows = (images, active, size) if draw(st.booleans()) else (images, None, 1)
    sums = reference.total_variation(*rows)
    return [("", rows), ("_backward", (torch.tensor(0.7), torch.tensor(-1.3), *rows, sums))]


def batch_norm_matching(draw: Draw) -> list[tuple[str, tuple[Any, ...]]]:
    shape = tuple(draw(st.integers(1, most)) for most in (4, 9, 20, 20))
    x = laid_out(draw, torch.randn(shape) + draw(st.sampled_from([0.0, 3.0])))
    mean, bias, offset, slope = torch.randn(4, shape[1])
    var, weight = torch.rand(2, shape[1]) + 0.5
    grad = laid_out(draw, torch.randn(shape))
    backward = (grad, x, var, weight, 1e-5, offset, slope)
    return [("", (x, mean, var, weight, bias, 1e-5)), ("_backward", backward)]


def adam_clamp(draw: Draw) -> list[tuple[str, tuple[Any, ...]]]:
    images, active, size = draw(on_patches())
    images = images.clamp(-3, 3).contiguous()  # it is changed, so it has memory of its own
    grad, moments = torch.randn(images.shape), (torch.randn(images.shape), torch.rand(images.shape))
    bounds = (-torch.rand(images.shape[1]), torch.rand(images.shape[1]))
    step, lr = torch.tensor(draw(st.integers(1, 5000))), torch.tensor(0.25, dtype=torch.float64)
    numbers = (step, lr, 0.5, 0.99, draw(st.sampled_from([0.0, 0.1])))
    where = (active, size) if draw(st.booleans()) else (None, 1)
    return [("_", (images, laid_out(draw, grad), *moments, *numbers, *bounds, *where))]


OPS = {
    "gather_patches": gather_patches,
    "gather_sigmoid_patches": gather_sigmoid_patches,
    "gather_attention": gather_attention,
    "total_variation": total_variation,
    "batch_norm_matching": batch_norm_matching,
    "adam_clamp": adam_clamp,
}


@needs_cpp
@pytest.mark.parametrize("op", OPS)
def test_the_kernels_equal_the_reference(op: str) -> None:
    @PROFILE
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        torch.manual_seed(data.draw(st.integers(0, 2**16)))
        for suffix, arguments in OPS[op](data.draw):
            for dtype in (torch.float32, torch.float64):
                case = OpCall("random", op + suffix, arguments)
                for error in case.errors(torch.ops.smi_fast, dtype):
                    assert error.value <= LUCK * error.budget, f"{case}: {error}"

    check()


def own_forward(teacher: VisionTransformer, images: Tensor) -> Tensor:
    """Logits of the teacher itself; with a published name it takes indices, and returns more."""
    if "forward" in vars(teacher):
        return teacher(images, None, None)[0]
    return teacher(images)


def logits_and_gradient(forward: Any, images: Tensor) -> list[Tensor]:
    images = images.detach().requires_grad_()
    logits = forward(images)
    direction = torch.linspace(-1, 1.5, logits.numel(), dtype=logits.dtype).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), images)
    return [logits.detach(), gradient]


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """The greatest relative error of logits and gradient."""
    errors = []
    for ours, own in zip(found, exact, strict=True):
        assert ours.shape == own.shape
        largest = float(own.abs().max())
        errors.append(float((ours - own).abs().max()) / largest if largest else float(ours.any()))
    return max(errors)


def is_finite(found: list[Tensor]) -> bool:
    return all(bool(each.isfinite().all()) for each in found)


def compare(teacher: VisionTransformer, sparse: SparseViT) -> None:
    """The teacher's own forward in float64 defines what is right, in float32 also how exact.

    A second pair of images decides where the first differs: the derivative of ReLU jumps at 0, and
    rounding may take one of thousands of values to the other side.
    """
    errors = [errors_of_images(teacher, sparse)]
    if errors[0][0] > errors[0][1]:
        errors.append(errors_of_images(teacher, sparse))
    error, allowed = min(errors, key=lambda pair: pair[0] / pair[1])
    assert error <= allowed, f"silently wrong: {error:.2g} where {allowed:.2g} is allowed"


def errors_of_images(teacher: VisionTransformer, sparse: SparseViT) -> tuple[float, float]:
    """The error on two new images, and what is allowed."""
    images = torch.randn(2, sparse.channels, *sparse.image_size, dtype=sparse.dtype)
    ours = logits_and_gradient(lambda x: sparse(x).logits, images)
    own = logits_and_gradient(lambda x: own_forward(teacher, x), images)
    if not is_finite(own):
        event("the teacher itself isn't finite")
        assert not is_finite(ours), "silently wrong: finite numbers of an overflow"
        return 0.0, 1.0
    allowed = 1e-8
    if sparse.dtype == torch.float32:
        exact_teacher = copy.deepcopy(teacher).double()
        exact = logits_and_gradient(lambda x: own_forward(exact_teacher, x), images.double())
        allowed = 10 * worst([each.double() for each in own], exact) + 1e-5
        ours, own = [each.double() for each in ours], exact
    return worst(ours, own), allowed


@PROFILE
@given(data=st.data())
def test_a_teacher_is_exact_or_refused(data: st.DataObject) -> None:
    teacher = data.draw(teachers(), label="teacher")
    names = data.draw(st.lists(st.sampled_from(list(CHANGES)), max_size=2), label="changes")
    torch.manual_seed(0)
    for name in names:
        CHANGES[name](teacher, data.draw)
    try:
        sparse = SparseViT(teacher)
    except UnsupportedTeacher:
        event("refused")
        return
    event("exact")
    teacher.eval()
    compare(teacher, sparse)


@PROFILE
@given(data=st.data())
def test_changed_weights_are_followed(data: st.DataObject) -> None:
    teacher = data.draw(teachers(), label="teacher")
    try:
        sparse = SparseViT(teacher, probe=False)
    except UnsupportedTeacher:
        return
    teacher.eval()
    images = torch.randn(1, sparse.channels, *sparse.image_size, dtype=sparse.dtype)
    changes = NOTICED | UNCOUNTED
    names = data.draw(st.lists(st.sampled_from(list(changes)), min_size=1, max_size=3))
    torch.manual_seed(0)
    for name in names:
        sparse(images.to(sparse.dtype))
        try:
            changes[name](teacher, sparse)
        except AttributeError:  # such as a class token that the teacher doesn't have
            event("no such weight")
        if name in {*UNCOUNTED, "half and back", "double"}:
            sparse.refresh()
    compare(teacher, sparse)


@needs_cpp
@PROFILE
@given(data=st.data())
def test_backends_agree_on_kept_patches(data: st.DataObject) -> None:
    teacher = data.draw(teachers(), label="teacher").double()
    try:
        pair = [SparseViT(teacher, backend=name, probe=False) for name in ("cpp", "reference")]
    except UnsupportedTeacher:
        return
    first = pair[0]
    torch.manual_seed(0)
    count = data.draw(st.integers(1, first.num_patches))
    kept = random_kept(2, count, first.num_patches)
    images = torch.randn(2, first.channels, *first.image_size, dtype=first.dtype)
    shift = data.draw(st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
    options = {
        "jitter": (shift, data.draw(st.booleans())),
        "taps": data.draw(st.sets(st.sampled_from(TAPS))),
        "importance": True,
    }
    results = []
    for sparse in pair:
        leaf = images.clone().requires_grad_()
        output = sparse(leaf, kept, **options)
        read = [output.logits, *output.taps.values()]
        (gradient,) = torch.autograd.grad(sum(each.square().sum() for each in read), leaf)
        results.append([output.logits.detach(), output.importance, gradient])
    assert worst(*results) <= 1e-8
