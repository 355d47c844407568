"""Random small ViTs and random ways to change them, as strategies of hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from timm.layers import GluMlp, LayerScale, RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.helpers.layers import Adapter, Times, conv, layer_scale, linear, norm

Draw = Callable[[st.SearchStrategy[Any]], Any]

MLPS = {"mlp_layer": GluMlp}, {"mlp_layer": SwiGLU}
NORMS = (
    {"norm_layer": RmsNorm},
    {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    {"norm_layer": partial(nn.LayerNorm, elementwise_affine=False)},
    {"norm_layer": partial(nn.LayerNorm, bias=False)},
)
ACTIVATIONS = tuple({"act_layer": kind} for kind in (nn.ReLU, nn.SiLU, partial(nn.GELU, "tanh")))
OPTIONS = (
    {"qk_norm": True},
    {"init_values": 0.3},
    {"pre_norm": True},
    {"final_norm": False},
    {"fc_norm": True},
    {"fc_norm": False},
    {"qkv_bias": False},
    {"proj_bias": False},
    {"no_embed_class": True},
    {"pos_embed": "none"},
    {"pool_include_prefix": True},
    {"scale_attn_norm": True},
    {"scale_mlp_norm": True},
    {"mlp_ratio": 1.7},
    {"drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2, "patch_drop_rate": 0.2},
    {"dynamic_img_size": True},
    {"dynamic_img_pad": True},
    {"img_size": 33},
)


@st.composite
def teachers(draw: Draw) -> VisionTransformer:
    """A teacher of random geometry and options, whose every parameter is random."""
    patch, heads = draw(st.sampled_from([8, 4, 7])), draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "img_size": tuple(patch * draw(st.integers(1, 4)) for _ in range(2)),
        "patch_size": patch,
        "in_chans": draw(st.sampled_from([3, 1, 4])),
        "num_classes": draw(st.sampled_from([5, 1, 0])),
        "embed_dim": heads * draw(st.sampled_from([8, 16, 4])),
        "depth": draw(st.integers(1, 3)),
        "num_heads": heads,
        "reg_tokens": draw(st.sampled_from([0, 0, 1, 3])),
        "global_pool": draw(st.sampled_from(["token", "token", "avg", "max", "avgmax", "map"])),
    }
    options["class_token"] = options["global_pool"] == "token" or draw(st.booleans())
    kind = draw(st.sampled_from([VisionTransformer] * 5 + [VisionTransformerDistilled]))
    for group in (OPTIONS, OPTIONS, MLPS, NORMS, ACTIVATIONS):
        options |= draw(st.one_of(st.just({}), st.sampled_from(group)))
    # timm makes a distilled teacher without positions for prefix tokens, and can't run it.
    assume(kind is VisionTransformer or not options.get("no_embed_class"))
    try:
        teacher = kind(**options)
    except (AssertionError, TypeError, ValueError):
        assume(False)  # timm has no such combination
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    with torch.no_grad():
        for weight in teacher.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * noise if weight.dim() > 1 else 1 + 0.2 * noise)
    teacher.train(draw(st.booleans()))
    return teacher.to(draw(st.sampled_from([torch.float64, torch.float32])))


def _paths(teacher: VisionTransformer, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in teacher.named_modules() if isinstance(module, kinds)]


def _replace(
    teacher: VisionTransformer, draw: Draw, make: Callable[[Any], nn.Module], *kinds: type
) -> None:
    """Puts another module in the place of one of these kinds."""
    paths = _paths(teacher, *kinds)
    assume(paths)
    path = draw(st.sampled_from(paths))
    old = teacher.get_submodule(path)
    new = make(old).to(teacher.patch_embed.proj.weight.dtype)
    teacher.set_submodule(path, new.train(teacher.training))


def _any_module(teacher: VisionTransformer, draw: Draw) -> nn.Module:
    return draw(st.sampled_from(list(teacher.modules())))


def _replace_forward(teacher: VisionTransformer, draw: Draw) -> None:
    module = _any_module(teacher, draw)
    own = module.forward
    module.forward = lambda *given, **named: 1.1 * own(*given, **named)


def _hook(teacher: VisionTransformer, draw: Draw) -> None:
    module = _any_module(teacher, draw)
    kind = draw(st.sampled_from(["forward", "pre", "backward", "harmless"]))
    if kind == "forward":
        module.register_forward_hook(lambda module, given, result: 1.1 * result)
    elif kind == "pre":
        module.register_forward_pre_hook(lambda module, given: (1.1 * given[0], *given[1:]))
    elif kind == "backward":
        module.register_full_backward_hook(lambda module, inner, outer: (1.1 * inner[0],))
    else:
        module.register_forward_hook(lambda module, given, result: None)


def _published_block(teacher: VisionTransformer, draw: Draw) -> None:
    factor = draw(st.sampled_from([1.1, 1.0, 0.0]))

    def vit_block_forward(self: nn.Module, x: Tensor, *rest: object, **named: object) -> Tensor:
        return type(self).forward(self, factor * x)

    block = draw(st.sampled_from(list(teacher.blocks)))
    block.forward = MethodType(vit_block_forward, block)


def _published_teacher(teacher: VisionTransformer, draw: Draw) -> None:
    changes = (lambda x: x, lambda x: 1.1 * x, lambda x: x.detach() + 0 * x)
    change = draw(st.sampled_from(changes))

    def vit_forward(self: VisionTransformer, x: Tensor, *indices: Tensor) -> tuple[Tensor, list]:
        return type(self).forward(self, change(x)), []

    teacher.forward = MethodType(vit_forward, teacher)


def _subclass(teacher: VisionTransformer, draw: Draw) -> None:
    method = draw(st.sampled_from(["forward", "forward_features", "forward_head", "pool"]))
    own = getattr(type(teacher), method)

    def louder(self: VisionTransformer, *given: object, **named: object) -> Tensor:
        return 1.1 * own(self, *given, **named)

    teacher.__class__ = type("Fork", (type(teacher),), {method: louder})


def _attribute(teacher: VisionTransformer, draw: Draw) -> None:
    """Attributes that users set after timm has made the model."""
    name, value = draw(
        st.sampled_from(
            [
                ("global_pool", "avg"),
                ("global_pool", "max"),
                ("global_pool", ""),
                ("global_pool", "token"),
                ("no_embed_class", True),
                ("no_embed_class", False),
                ("pool_include_prefix", True),
                ("num_prefix_tokens", 2),
                ("fc_norm", nn.Identity()),
                ("distilled_training", True),
                ("training", True),
                ("grad_checkpointing", True),
            ]
        )
    )
    setattr(teacher, name, value)


def _attention(teacher: VisionTransformer, draw: Draw) -> None:
    attention = draw(st.sampled_from(list(teacher.blocks))).attn
    name, value = draw(
        st.sampled_from([("scale", 0.7), ("fused_attn", False), ("num_heads", 1), ("head_dim", 8)])
    )
    setattr(attention, name, value)


def _tie(teacher: VisionTransformer, draw: Draw) -> None:
    teacher.blocks[-1] = teacher.blocks[0]


def _reparametrize(teacher: VisionTransformer, draw: Draw) -> None:
    way = draw(
        st.sampled_from(
            [
                parametrizations.weight_norm,
                parametrizations.spectral_norm,
                partial(prune.l1_unstructured, name="weight", amount=0.3),
            ]
        )
    )
    layer = teacher.get_submodule(draw(st.sampled_from(_paths(teacher, nn.Linear))))
    assume("weight" in layer._parameters)  # it has not been reparametrized before
    way(layer)


def _without_bias(teacher: VisionTransformer, draw: Draw) -> None:
    teacher.get_submodule(draw(st.sampled_from(_paths(teacher, nn.Linear)))).bias = None


# A change of a teacher that isn't wrapped yet, by its name.
CHANGES: dict[str, Callable[[VisionTransformer, Draw], object]] = {
    "subclass of Linear": lambda t, draw: _replace(t, draw, linear, nn.Linear),
    "subclass of LayerNorm": lambda t, draw: _replace(t, draw, norm, nn.LayerNorm),
    "subclass of Conv2d": lambda t, draw: _replace(t, draw, conv, nn.Conv2d),
    "subclass of LayerScale": lambda t, draw: _replace(t, draw, layer_scale, LayerScale),
    "adapter": lambda t, draw: _replace(t, draw, Adapter, nn.Linear),
    "sequence": lambda t, draw: _replace(t, draw, nn.Sequential, nn.Linear, nn.LayerNorm),
    "idle module that isn't": lambda t, draw: _replace(
        t, draw, lambda old: Times(), nn.Identity, nn.Dropout
    ),
    "activation": lambda t, draw: _replace(t, draw, lambda old: nn.Tanh(), nn.GELU, nn.SiLU),
    "head": lambda t, draw: setattr(
        t, "head", nn.Linear(t.embed_dim, 17).to(t.patch_embed.proj.weight.dtype)
    ),
    "forward": _replace_forward,
    "hook": _hook,
    "published name of a block": _published_block,
    "published name of the teacher": _published_teacher,
    "subclass of the teacher": _subclass,
    "attribute": _attribute,
    "attribute of attention": _attention,
    "tied blocks": _tie,
    "parametrization": _reparametrize,
    "no bias": _without_bias,
    "frozen": lambda t, draw: t.requires_grad_(False),
}
