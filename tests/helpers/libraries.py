"""Optional libraries whose models are converted."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn


def library(name: str) -> Any:
    """A module of that name; a test that asks for an absent one is skipped."""
    # transformers uses a package "kernels" when there is one, and would take this repository's
    # folder for it, because the tests run with the repository on their path.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    module: ModuleType = pytest.importorskip(name)
    return module


def with_random_weights(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """The same model, every parameter random: zero-initialised ones would hide mistakes.

    A ``scale`` that is large for the width makes attention so sharp that rounding grows.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model
