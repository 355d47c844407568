"""The small CNN that comes trained with this package, a prior beside the embedded teacher."""

from __future__ import annotations

from torch import nn


def small_cnn(classes: int) -> nn.Sequential:
    """Five convolutions with BatchNorm and a global mean: 45 million multiply-adds at 64 px."""
    layers: list[nn.Module] = []
    widths = ((3, 32, 2, 5), (32, 64, 2, 3), (64, 128, 1, 3), (128, 128, 2, 3), (128, 192, 1, 3))
    for inputs, outputs, stride, size in widths:
        layers += [
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, classes))
