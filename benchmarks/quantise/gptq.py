"""GPTQ, which rounds weights so that a layer's output on the calibration images changes least.

It reads how the channels of each layer's input vary together, so it asks more of the images than a
search for ranges does. It is brevitas's, because torchao's runs on GPUs only. Activations stay in
float32.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import brevitas.nn as qnn
import torch
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.inject.enum import ScalingImplType
from brevitas.quant.scaled_int import Int8WeightPerChannelFloatMSE
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.quantise.quantiser import Network, exported


@dataclass(frozen=True)
class Gptq:
    """Weights of few bits, each output channel with the scale of least squared error.

    Attributes:
        weights: bits, from 2 to 8.
    """

    weights: int

    def __str__(self) -> str:
        return f"W{self.weights}, GPTQ"

    @torch.no_grad()
    def network(self, vit: VisionTransformer, images: Tensor) -> Network:
        """The ViT with weights that were rounded on normalised images [N, 3, H, W]."""
        return Network(exported(self.rounded(vit, images)))

    @torch.no_grad()
    def rounded(self, vit: VisionTransformer, images: Tensor) -> VisionTransformer:
        """A copy of the ViT with these weights."""
        options = {
            "weight_quant": Int8WeightPerChannelFloatMSE,
            "weight_bit_width": self.weights,
            "weight_narrow_range": False,
            # The scales are those of the weights as they were: they don't follow the rounding.
            "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
        }
        layers = {nn.Linear: (qnn.QuantLinear, options), nn.Conv2d: (qnn.QuantConv2d, options)}
        model = layerwise_quantize(copy.deepcopy(vit), layers)
        model(images[:1])  # finds the scales
        with gptq_mode(model) as mode:
            for _ in range(mode.num_layers):
                mode.model(images)
                mode.update()
        found = copy.deepcopy(vit)
        for name, layer in found.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.weight.copy_(model.get_submodule(name).quant_weight().value)
        return found
