"""BatchNormMatching against the published hooks in float64: values, gradients, a CNN left alone."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from smi_fast import (
    BatchNormMatching,
    CrossEntropy,
    Dense,
    SparseInverter,
    StopSchedule,
    load_teacher,
)
from tests.helpers.loss_inputs import loss_inputs

F64 = torch.float64


def random_statistics(cnn: nn.Module) -> nn.Module:
    """Statistics and weights that differ between channels, as after training."""
    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 1.5)
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    tensor.data.normal_(std=0.3)
    return cnn.double().eval()


def tiny_cnn() -> nn.Module:
    return random_statistics(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 5, 3, 1, 1),
            nn.BatchNorm2d(5, affine=False, eps=1e-3),
            nn.SiLU(inplace=True),
        )
    )


def published(cnn: nn.Module, images: Tensor, first_weight: float) -> Tensor:
    """The term as the published code takes it, from hooks on every BatchNorm."""
    distances, handles = [], []

    def hook(module: nn.BatchNorm2d, given: tuple[Tensor], _: Tensor) -> None:
        channels = given[0].transpose(0, 1).flatten(1)
        distances.append(
            torch.norm(module.running_var - channels.var(1, unbiased=False))
            + torch.norm(module.running_mean - channels.mean(1))
        )

    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_hook(hook))
    cnn(images)
    for handle in handles:
        handle.remove()
    return first_weight * distances[0] + sum(distances[1:])


CNNS = {
    "sequential": tiny_cnn,
    "residual": lambda: random_statistics(timm.create_model("resnet10t", num_classes=3)),
    "bn and activation": lambda: random_statistics(
        timm.create_model("tf_efficientnet_lite0", num_classes=3)
    ),
    "dense": lambda: random_statistics(timm.create_model("densenet121", num_classes=3)),
}


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("name", CNNS)
def test_is_the_published_term(name: str) -> None:
    cnn = CNNS[name]()
    cnn.pretrained_cfg = {}
    images = torch.randn(2, 3, 32, 32, dtype=F64, requires_grad=True)
    expected = published(cnn, images, 10.0)
    (gradient,) = torch.autograd.grad(expected, images)
    value = BatchNormMatching(cnn)(loss_inputs(images))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, images)[0], gradient)


@pytest.mark.usefixtures("each_backend")
def test_gradient() -> None:
    objective = BatchNormMatching(tiny_cnn(), first_weight=3.0, every=2)
    images = torch.randn(2, 3, 6, 8, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: objective(loss_inputs(x)), images)


@pytest.mark.parametrize("flip", [False, True])
def test_the_cnn_sees_the_jittered_image(flip: bool) -> None:
    cnn, images = tiny_cnn(), torch.randn(2, 3, 8, 10, dtype=F64, requires_grad=True)
    moved = images.roll((-3, 2), (2, 3))
    expected = published(cnn, moved.flip(3) if flip else moved, 10.0)
    jitter = (torch.tensor([-3, 2]), torch.tensor(flip))
    value = BatchNormMatching(cnn)(loss_inputs(images, jitter=jitter))
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(v, images)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients)


def test_images_are_brought_into_the_space_of_the_cnn() -> None:
    cnn, pixels = tiny_cnn(), torch.rand(2, 3, 8, 8, dtype=F64)
    theirs = torch.tensor([0.5, 0.4, 0.3], dtype=F64), torch.tensor([0.5, 0.2, 0.1], dtype=F64)
    ours = torch.tensor([0.1, 0.2, 0.3], dtype=F64), torch.tensor([0.3, 0.4, 0.5], dtype=F64)

    def normalised(mean: Tensor, std: Tensor) -> Tensor:
        return (pixels - mean[:, None, None]) / std[:, None, None]

    expected = published(cnn, normalised(*theirs), 10.0)
    given = loss_inputs(normalised(*ours), mean=ours[0], std=ours[1])
    mean, std = (s.tolist() for s in theirs)
    torch.testing.assert_close(BatchNormMatching(cnn, mean=mean, std=std)(given), expected)
    cnn.pretrained_cfg = {"mean": mean, "std": std}
    torch.testing.assert_close(BatchNormMatching(cnn)(given), expected)
    del cnn.pretrained_cfg
    as_it_is = published(cnn, given.images, 10.0)
    torch.testing.assert_close(BatchNormMatching(cnn)(given), as_it_is)


def test_every_third_iteration_counts_three_times() -> None:
    inputs, cnn = loss_inputs(torch.randn(2, 3, 8, 8, dtype=F64)), tiny_cnn()
    objective, always = BatchNormMatching(cnn, every=3), BatchNormMatching(cnn)
    assert objective(inputs).item() == pytest.approx(3 * always(inputs).item(), rel=1e-12)


def test_a_layer_used_twice_counts_at_each_use() -> None:
    norm = nn.BatchNorm2d(3)
    cnn = random_statistics(nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm))
    images = torch.randn(2, 3, 4, 4, dtype=F64)
    uses = [images, cnn[1](norm(images))]
    expected = sum(published(nn.Sequential(norm), x, 10.0) for x in uses)
    torch.testing.assert_close(BatchNormMatching(cnn)(loss_inputs(images)), expected)


def test_the_cnn_is_left_as_it_was() -> None:
    cnn = tiny_cnn().train()
    state = {name: value.clone() for name, value in cnn.state_dict().items()}
    modules = list(cnn.modules())
    images = torch.randn(2, 3, 8, 8, dtype=F64, requires_grad=True)
    BatchNormMatching(cnn)(loss_inputs(images)).backward()
    assert cnn.training and all(p.requires_grad and p.grad is None for p in cnn.parameters())
    assert list(map(id, cnn.modules())) == list(map(id, modules))
    assert all(torch.equal(value, state[name]) for name, value in cnn.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cnn.modules())


def test_in_the_loop_it_draws_features_to_the_statistics() -> None:
    torch.manual_seed(3)
    cnn = tiny_cnn().float()
    schedule = StopSchedule((3, 6), (0.5, 0.5))
    distances = []
    for weight in (0.0, 1.0):
        prior = BatchNormMatching(cnn, weight=weight)
        inverter = SparseInverter(
            load_teacher("fashion-canvas"),
            objectives=[CrossEntropy(), prior],
            schedule=schedule,
            iterations=20,
        )
        generator = torch.Generator().manual_seed(0)
        result = inverter.invert([0, 1], generator=generator, progress=False)
        distances.append(result.history["batch_norm"])
    assert distances[0][0] == distances[1][0]
    assert distances[1][-1] < 0.75 * distances[0][-1]


def test_autocast_does_not_reach_the_cnn() -> None:
    torch.manual_seed(3)
    prior = BatchNormMatching(tiny_cnn().float())
    options = {"objectives": [CrossEntropy(), prior], "iterations": 3, "schedule": Dense()}

    def history() -> dict[str, list[float]]:
        inverter = SparseInverter(load_teacher("fashion-canvas"), **options)
        generator = torch.Generator().manual_seed(0)
        return inverter.invert([0, 1], generator=generator, progress=False).history

    exact = history()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = history()
    assert rounded["batch_norm"][0] == exact["batch_norm"][0]
    assert rounded["cross_entropy"][0] != exact["cross_entropy"][0]


def test_a_cnn_unlike_the_teacher_is_refused() -> None:
    prior = BatchNormMatching(tiny_cnn())
    inverter = SparseInverter(load_teacher("fashion-canvas"), objectives=[prior], iterations=400)
    with pytest.raises(ValueError, match=r"torch.float32 on cpu, got torch.float64 on cpu"):
        inverter.invert([0], progress=False)


class _Odd(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("cnn", "options", "message"),
    [
        (nn.Conv2d(3, 3, 1), {}, "BatchNorm2d, Conv2d has none"),
        (nn.Sequential(_Odd(3)), {}, "expected 0 to be BatchNorm2d or BatchNormAct2d, got _Odd"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), {}, "running statistics"),
        (nn.Sequential(nn.BatchNorm2d(3)), {"every": 0}, "every 1 or more, got 0"),
        (nn.Sequential(nn.BatchNorm2d(3)), {"mean": (0, 0, 0)}, "mean and std, or neither"),
    ],
)
def test_what_cannot_be_matched_is_refused(cnn: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchNormMatching(cnn, **options)
