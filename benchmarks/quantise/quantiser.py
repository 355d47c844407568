"""Post-training quantisation to any number of bits, with torchao's PT2E.

torchao is the library of the extra ``quantise`` already, and its specifications take any range of
integers of at most 8 bits, so one quantiser serves all widths. Its fake quantisers round as the
converted network does, and stay in the network, which can then be calibrated again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantize
from torchao.quantization.pt2e.observer import (
    HistogramObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from typing_extensions import Self

LINEAR = torch.ops.aten.linear.default
CONVOLUTION = torch.ops.aten.conv2d.default
PRODUCT = torch.ops.aten.matmul.default


class LeastSquares(HistogramObserver):
    """A histogram observer that knows how many integers there are.

    It cuts off what is far out, where that makes the squared error smaller. torchao's own looks for
    the range of 256 integers, whatever is asked for.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.dst_nbins = self.quant_max - self.quant_min + 1


OBSERVERS = {"min-max": MinMaxObserver, "least squares": LeastSquares}


class Rounding(FakeQuantize):
    """torchao's fake quantiser, in vectorised passes once its range is found.

    Both round alike. PyTorch's own op also makes a mask for gradients, which takes the time of a
    forward pass of this teacher.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.observer_enabled[0] == 1:
            observed: Tensor = super().forward(x)
            return observed
        shape = [1] * x.ndim
        if self.is_per_channel:
            shape[self.ch_axis] = -1
        scale, zero = self.scale.view(shape), self.zero_point.view(shape)
        integers = (x * (1 / scale)).round_().add_(zero).clamp_(self.quant_min, self.quant_max)
        return integers.sub_(zero).mul_(scale)


@dataclass(frozen=True)
class Widths:
    """How many bits there are, and how ranges of activations are found.

    Attributes:
        weights, activations: bits, from 2 to 8.
        observer: a key of OBSERVERS.
    """

    weights: int
    activations: int
    observer: str = "min-max"

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}, {self.observer}"

    def of_weights(self) -> QuantizationSpec:
        """Symmetric; each output channel has the range of its own values."""
        half = 2 ** (self.weights - 1)
        scheme = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}
        return _spec(PerChannelMinMaxObserver, torch.int8, -half, half - 1, **scheme)

    def of_activations(self) -> QuantizationSpec:
        """Affine, with one range for a tensor."""
        observer, last = OBSERVERS[self.observer], 2**self.activations - 1
        return _spec(observer, torch.uint8, 0, last, qscheme=torch.per_tensor_affine)


def _spec(
    observer: type[nn.Module], dtype: torch.dtype, low: int, high: int, **scheme: Any
) -> QuantizationSpec:
    options = {"dtype": dtype, "quant_min": low, "quant_max": high, **scheme}
    made = Rounding.with_args(observer=observer, **options)
    return QuantizationSpec(observer_or_fake_quant_ctr=made, **options)


class ProductQuantizer(Quantizer):
    """Quantises all that is multiplied: in the convolution, the linear layers and attention.

    These are the tensors that PSAQ-ViT quantises. Norms, softmax, GELU and sums stay in float32.
    """

    def __init__(self, widths: Widths) -> None:
        self._weights, self._activations = widths.of_weights(), widths.of_activations()

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            if node.target in (LINEAR, CONVOLUTION, PRODUCT):
                left, right = node.args[:2]
                of_right = self._activations if node.target == PRODUCT else self._weights
                node.meta["quantization_annotation"] = QuantizationAnnotation(
                    {left: self._activations, right: of_right}, _annotated=True
                )
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Every graph will do: what has no product stays as it is."""


def exported(vit: VisionTransformer) -> fx.GraphModule:
    """The graph of a ViT of any number of images, with the products of attention in it."""
    vit = copy.deepcopy(vit)
    for block in vit.blocks:
        block.attn.fused_attn = False
    example = (torch.zeros(2, 3, *vit.patch_embed.img_size),)
    made = torch.export.export(vit, example, dynamic_shapes=({0: torch.export.Dim("images")},))
    graph = made.module()
    assert isinstance(graph, fx.GraphModule)
    return graph


class Network(nn.Module):
    """An exported ViT, whose linear layers are oneDNN's.

    MKL, which torch takes otherwise, uses half of the vectors of processors that are not Intel's.
    The op is that which torch.compile takes.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        for node in graph.graph.nodes:
            if node.target == LINEAR:
                node.target = torch.ops.mkldnn._linear_pointwise.default
                node.args = (*node.args, "none", [], "")
        graph.recompile()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.graph(images)
        return logits

    def train(self, mode: bool = True) -> Self:
        """Does nothing: an exported network has one mode, that of the ViT."""
        return self


class Simulated(Network):
    """A ViT whose products read integers of few bits, which can be calibrated again and again.

    Args:
        vit: the network; it stays as it is.
        widths: the bits.
    """

    def __init__(self, vit: VisionTransformer, widths: Widths) -> None:
        super().__init__(prepare_pt2e(exported(vit), ProductQuantizer(widths)))
        self._quantisers = [m for m in self.graph.modules() if isinstance(m, Rounding)]
        self._fresh = [copy.deepcopy(q.activation_post_process) for q in self._quantisers]

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> Self:
        """Find all ranges anew, on normalised images [N, 3, H, W]."""
        for quantiser, observer in zip(self._quantisers, self._fresh, strict=True):
            quantiser.activation_post_process = copy.deepcopy(observer)
            quantiser.enable_observer()
            quantiser.disable_fake_quant()
        self(images)
        for quantiser in self._quantisers:
            quantiser.disable_observer()
            quantiser.enable_fake_quant()
        return self
