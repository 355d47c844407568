"""The CNN whose BatchNorm statistics the objective ``bn`` matches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Weights of torchvision's ResNet-50, by their published names.
RESNETS = {"resnet50v1": "IMAGENET1K_V1", "resnet50v2": "IMAGENET1K_V2"}


def load_prior(source: str | nn.Module, device: str | torch.device) -> nn.Module:
    """The CNN of a published name, or the given one, in eval mode.

    Raises:
        ValueError: an unknown name, or weights that can't be loaded.
    """
    if isinstance(source, nn.Module):
        return source.to(device).eval()
    if source not in RESNETS:
        raise ValueError(f"expected bnsource {' or '.join(RESNETS)}, or a CNN, got {source!r}")
    try:
        from torchvision.models import resnet50

        resnet: nn.Module = resnet50(weights=RESNETS[source])
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the weights of {source} can't be loaded ({type(error).__name__}: {error}); "
            "pass a CNN as bnsource"
        ) from error
    return resnet.to(device).eval()


class StatisticsHook:
    """A hook on a BatchNorm that measures how far its input is from the recorded statistics.

    ``synthesize`` runs a copy of the prior without hooks, so only your own calls of the prior are
    measured.

    Attributes:
        module: the BatchNorm.
        r_feature: of the last call, the distance of the variances plus that of the means.
    """

    r_feature: Tensor

    def __init__(self, module: nn.BatchNorm2d) -> None:
        self.module = module
        self.hook = module.register_forward_hook(self._measure)

    def _measure(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        distances = torch.dist(module.running_var, variance), torch.dist(module.running_mean, mean)
        self.r_feature = distances[0] + distances[1]

    def remove(self) -> None:
        """Take the hook off the BatchNorm."""
        self.hook.remove()


def hooks_of(prior: nn.Module) -> list[StatisticsHook]:
    """A hook on each BatchNorm of a CNN."""
    return [StatisticsHook(norm) for norm in prior.modules() if isinstance(norm, nn.BatchNorm2d)]
