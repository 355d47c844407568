"""A timm ``VisionTransformer`` from weights under timm's names, and the proof that it is right."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from timm.layers import LayerNorm, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import Mlp, VisionTransformer
from torch import Tensor, nn

from smi_fast.teacher import UnsupportedTeacher

# Largest difference of the outputs over the largest output.
TOLERANCE = 1e-4

Weights = dict[str, Tensor]
Vit = TypeVar("Vit", VisionTransformer, Eva)


def class_of(model: object, library: str) -> str:
    """The name of a model's class, or of the first of its bases, in a library.

    A subclass counts as its base, because the proof runs the subclass's own forward.

    Raises:
        UnsupportedTeacher: the model is of no class of this library.
    """
    for base in type(model).__mro__:
        if base.__module__.partition(".")[0] == library:
            return base.__name__
    own = type(model)
    raise UnsupportedTeacher(
        f"expected a model of {library}, got {own.__module__}.{own.__qualname__}"
    )


def renamed(weights: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> Weights:
    """Weights under new names: each rule (pattern, replacement) applies to each name, in order."""
    found: Weights = {}
    for name, weight in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = weight
    return found


def stacked(weights: Weights, parts: Sequence[str], whole: str) -> Weights:
    """Weights in which layers of one input are one layer: their rows, one after the other.

    Args:
        weights: by name.
        parts: names of the layers, such as "attn.q", behind the block's.
        whole: the name of the layer that takes their place.
    """
    first, found = re.compile(rf"(.*\.){re.escape(parts[0])}\.(weight|bias)"), dict(weights)
    for name in weights:
        match = first.fullmatch(name)
        if match is not None:
            block, kind = match.groups()
            rows = [found.pop(f"{block}{part}.{kind}") for part in parts]
            found[f"{block}{whole}.{kind}"] = torch.cat(rows)
    return found


def one_eps(model: nn.Module) -> float:
    """The epsilon of every LayerNorm of a model.

    Raises:
        UnsupportedTeacher: they have different ones.
    """
    found = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(found) != 1:
        raise UnsupportedTeacher(f"expected LayerNorms of one eps, got {sorted(found)}")
    return float(found.pop())


def build(
    weights: Weights,
    *,
    image_size: tuple[int, int],
    heads: int,
    eps: float,
    activation: str,
    pool: str = "token",
) -> VisionTransformer:
    """A timm ``VisionTransformer`` of copies of these weights, in eval mode.

    Its sizes are those of the weights. With ``head_dist`` among them it is a distilled one.

    Args:
        weights: under timm's names, on one device.
        image_size: (height, width) in pixels.
        heads: of attention.
        eps: of each LayerNorm.
        activation: timm's name of the MLP's activation.
        pool: timm's name of the pooling.

    Raises:
        UnsupportedTeacher: a weight that such a model doesn't have, or lacks.
    """
    patch = weights["patch_embed.proj.weight"]
    fc1, fc2 = (weights[f"blocks.0.mlp.{layer}.weight"] for layer in ("fc1", "fc2"))
    width, gated = len(patch), len(fc1) == 2 * fc2.shape[1]
    head, registers = weights.get("head.weight"), weights.get("reg_token")
    kind = VisionTransformerDistilled if "head_dist.weight" in weights else VisionTransformer
    vit = kind(
        img_size=image_size,
        patch_size=tuple(patch.shape[2:]),
        in_chans=patch.shape[1],
        num_classes=0 if head is None else len(head),
        global_pool=pool,
        embed_dim=width,
        depth=sum(name.endswith(".norm1.weight") for name in weights),
        num_heads=heads,
        mlp_ratio=(len(fc1) + 0.5) / width,  # which timm rounds down to the width
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        init_values=1.0 if "blocks.0.ls1.gamma" in weights else None,
        class_token="cls_token" in weights,
        reg_tokens=0 if registers is None else registers.shape[1],
        pre_norm="norm_pre.weight" in weights,
        final_norm="norm.weight" in weights or "fc_norm.weight" in weights,
        fc_norm="fc_norm.weight" in weights,
        norm_layer=partial(LayerNorm, eps=eps),
        act_layer="silu" if gated else activation,
        mlp_layer=SwiGLUPacked if gated else Mlp,
        weight_init="skip",
        device="meta",
    )
    return loaded(vit, weights)


def loaded(vit: Vit, weights: Weights) -> Vit:
    """A timm module with copies of these weights, in eval mode.

    Raises:
        UnsupportedTeacher: a weight that the module doesn't have, or lacks.
    """
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        vit.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())
        raise UnsupportedTeacher(f"the weights aren't those of a plain ViT: {reason}") from None
    return vit.eval()


def prove(
    original: nn.Module,
    converted: VisionTransformer | Eva,
    output: Callable[[Any, Tensor], Tensor] = lambda model, images: model(images),
) -> None:
    """Compare the outputs of a model and of its conversion for two random images.

    The model runs in eval mode, and is left in the modes that it had.

    Args:
        original: the model.
        converted: the timm module.
        output: of the model for images, what the timm module is to return.

    Raises:
        UnsupportedTeacher: the outputs differ, or the model fails.
    """
    weight = converted.patch_embed.proj.weight
    apart = torch.inf
    if weight.dtype in (torch.float32, torch.float64):
        apart = _difference(original, converted, output)
    # Rounding may exceed the tolerance too: float64 tells that from a fault.
    if not apart <= TOLERANCE and weight.dtype != torch.float64:
        wide = copy.deepcopy(original).double(), copy.deepcopy(converted).double()
        apart = _difference(*wide, output)
    if not apart <= TOLERANCE:  # not finite counts as different
        name = f"{type(original).__module__}.{type(original).__qualname__}"
        raise UnsupportedTeacher(
            f"{name} computes something else than timm's ViT with its weights: the outputs of one "
            f"image differ by {apart:.2g}"
        )


@torch.no_grad()
def _difference(
    original: nn.Module,
    converted: VisionTransformer | Eva,
    output: Callable[[Any, Tensor], Tensor],
) -> float:
    """The largest difference of the outputs over the largest output."""
    weight, embed = converted.patch_embed.proj.weight, converted.patch_embed
    shape = (2, weight.shape[1], *embed.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    with _evaluating(original):
        try:
            expected = output(original, images)
        except Exception as error:  # whatever the code of somebody else raises
            raise UnsupportedTeacher(
                f"{type(original).__qualname__} fails on images {list(shape)} "
                f"({type(error).__name__}: {error})"
            ) from error
    found = converted(images)
    if found.shape != expected.shape:
        raise UnsupportedTeacher(
            f"{type(original).__qualname__} returns {list(expected.shape)} for two images, timm's "
            f"ViT with its weights {list(found.shape)}"
        )
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
