"""Which blocks the engine of the CPU computes, by family, norm and GELU, as timm does."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast import SparseViT
from smi_fast.engine import choose
from smi_fast.engine.cpu import CpuEngine
from smi_fast.engine.folding import foldable
from smi_fast.ops import native
from smi_fast.verify.cases import random_kept
from tests.helpers.kernels import needs_cpp
from tests.helpers.teachers import EVA, make_teacher, random_images, relative_error, with_gradient

pytestmark = needs_cpp


@pytest.fixture
def teacher() -> VisionTransformer:
    return make_teacher("vit_tiny_patch16_224", img_size=64, depth=4, init_values=0.3)


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({}, True),
        ({"init_values": 1e-5, "qkv_bias": False}, True),
        ({"reg_tokens": 4, "global_pool": "avg"}, True),
        ({"qk_norm": True}, False),
        ({"act_layer": "gelu"}, True),
        ({"act_layer": "quick_gelu"}, True),
        ({"act_layer": "gelu_tanh"}, True),
        ({"act_layer": partial(nn.GELU, approximate="tanh")}, True),
        ({"act_layer": "silu"}, False),
        ({"mlp_layer": timm.layers.SwiGLU}, False),
        ({"norm_layer": "rmsnorm"}, True),
        ({"norm_layer": partial(timm.layers.RmsNorm, affine=False)}, False),
        ({"norm_layer": "rmsnormfp32"}, False),
        ({"norm_layer": "simplenorm"}, False),
        ({"scale_attn_norm": True, "init_values": 0.3}, True),
        ({"scale_mlp_norm": True}, True),
        ({"scale_mlp_norm": True, "scale_attn_norm": True, "norm_layer": "rmsnorm"}, True),
    ],
)
def test_other_blocks_are_left_to_the_ops(options: dict, computed: bool) -> None:
    model = make_teacher("vit_tiny_patch16_224", img_size=32, depth=2, **options)
    assert all(foldable(block) == computed for block in model.blocks)
    images, sparse = random_images(model), SparseViT(model, backend="cpp")
    candidate = CpuEngine(sparse.vit.blocks)
    chosen = choose([candidate], sparse.device, sparse.dtype, "cpp")
    assert chosen is (candidate if computed else None)
    for ours, theirs in zip(
        with_gradient(sparse, images), with_gradient(model, images), strict=True
    ):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("name", "computed"),
    [
        ("eva02_tiny_patch14_224", True),
        ("eva02_base_patch16_clip_224", True),  # a norm inside of attention, and one of the MLP
        ("eva02_base_patch14_224", True),  # one inside of the MLP
        ("eva_giant_patch14_clip_224", True),  # without rotary positions
        ("vit_small_patch16_dinov3", True),
        ("vit_small_plus_patch16_dinov3_qkvb", True),
        ("vit_small_patch16_rope_mixed_224", True),
        ("vit_small_patch16_rope_224 three layers", True),
        ("vit_small_patch16_rope_224 grouped queries", False),
        ("vit_small_patch16_rope_224 query and key norm", False),
    ],
)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_blocks_of_eva(name: str, computed: bool, pool: str) -> None:
    """On a kept subset in motion, in float64; with token pooling the last block has one row."""
    sizes = {} if name in EVA else {"img_size": 84}
    teacher = make_teacher(name, depth=3, global_pool=pool, **sizes).double()
    ours, plain = (SparseViT(teacher, backend=backend) for backend in ("cpp", "reference"))
    assert all(foldable(block) == computed for block in teacher.blocks)
    candidate = CpuEngine(ours.vit.blocks)
    chosen = choose([candidate], ours.device, ours.dtype, "cpp")
    assert chosen is (candidate if computed else None)
    images, kept = random_images(teacher).double(), random_kept(2, 7, ours.num_patches)
    importance = [model(images, kept, importance=True).importance for model in (ours, plain)]
    torch.testing.assert_close(*importance, rtol=1e-9, atol=1e-12)
    found, expected = (with_gradient(model, images, kept) for model in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"class_token": True, "global_pool": "token"}])
def test_blocks_of_aimv2(options: dict) -> None:
    """RMSNorm with an eps of its own, SwiGLU in two layers, and no bias, in float64."""
    teacher = make_teacher("aimv2_huge_patch14_224", **options).double()
    assert {teacher.blocks[0].norm1.eps, teacher.blocks[0].norm2.eps} == {1e-5}
    ours, plain = (SparseViT(teacher, backend=backend) for backend in ("cpp", "reference"))
    assert all(foldable(block) for block in teacher.blocks)
    images, kept = random_images(teacher).double(), random_kept(2, 7, ours.num_patches)
    found, expected = (with_gradient(model, images, kept) for model in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for got, timms in zip(with_gradient(ours, images), with_gradient(teacher, images), strict=True):
        assert relative_error(got, timms) < 1e-12


@pytest.mark.parametrize(
    "act", ["gelu", "quick_gelu", "gelu_tanh", partial(nn.GELU, approximate="tanh")]
)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_each_gelu(act: object, pool: str) -> None:
    """In float64 each is that of timm, and they differ from each other by more."""
    options = {"img_size": 64, "depth": 3, "act_layer": act, "global_pool": pool}
    teacher = make_teacher("vit_tiny_patch16_224", **options).double()
    ours, images = SparseViT(teacher, backend="cpp"), random_images(teacher).double()
    candidate = CpuEngine(ours.vit.blocks)
    assert choose([candidate], ours.device, ours.dtype, "cpp") is candidate
    found, expected = with_gradient(ours, images), with_gradient(teacher, images)
    for got, timms in zip(found, expected, strict=True):
        assert relative_error(got, timms) < 1e-12


def test_another_gelu_is_left_to_the_ops(teacher: VisionTransformer) -> None:
    teacher.blocks[2].mlp.act = nn.GELU(approximate="tanh")
    reason = CpuEngine(teacher.blocks).why_not(torch.device("cpu"), torch.float32)
    assert reason is not None and reason.startswith("blocks.2 has ")
    x = torch.zeros(1, 2)
    with pytest.raises(RuntimeError, match="expected approximate none, tanh or sigmoid, got erf"):
        torch.ops.smi_fast.gelu_(x, torch.zeros(2), x.clone(), "erf")


@pytest.mark.parametrize("rms", ["norm1", "norm2", "both"])
def test_norms_of_one_kind_run_together(teacher: VisionTransformer, rms: str) -> None:
    for name in ("norm1", "norm2") if rms == "both" else (rms,):
        setattr(teacher.blocks[1], name, timm.layers.RmsNorm(192))
    assert foldable(teacher.blocks[1]) == (rms == "both")
    reason = CpuEngine(teacher.blocks).why_not(torch.device("cpu"), torch.float32)
    assert reason is not None and reason.startswith("blocks.1 has more than LayerNorm or RMSNorm")


def test_swiglu_without_rotary_positions(teacher: VisionTransformer) -> None:
    options = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 4}
    model = make_teacher("vit_tiny_patch16_224", img_size=32, depth=3, **options)
    assert all(foldable(block) for block in model.blocks)
    images, sparse = random_images(model), SparseViT(model, backend="cpp")
    found, expected = with_gradient(sparse, images), with_gradient(model, images)
    assert relative_error(found[0], expected[0]) < 1e-5
    assert relative_error(found[1], expected[1]) < 1e-4


@pytest.mark.parametrize("name", ["attn", "mlp"])
def test_blocks_with_and_without_an_inner_norm_are_left_to_the_ops(name: str) -> None:
    options = {"img_size": 32, "depth": 2, "scale_attn_norm": True, "scale_mlp_norm": True}
    model = make_teacher("vit_tiny_patch16_224", **options)
    getattr(model.blocks[1], name).norm = nn.Identity()
    reason = CpuEngine(model.blocks).why_not(torch.device("cpu"), torch.float32)
    assert reason is not None and reason.startswith("blocks.1 has ")


def test_a_gate_that_comes_last_is_left_to_the_ops() -> None:
    gated = partial(timm.layers.GluMlp, act_layer=nn.SiLU)
    options = {"img_size": 32, "depth": 1, "mlp_layer": gated, "act_layer": nn.SiLU}
    for last in (True, False):
        model = make_teacher("vit_tiny_patch16_224", **options)
        model.blocks[0].mlp.gate_last = last
        assert foldable(model.blocks[0]) != last


def test_kernels_of_an_older_version_leave_eva_to_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_cpu_kernel", lambda name: False)
    for name, runs in (("vit_small_patch16_dinov3", False), ("deit_tiny_patch16_224", True)):
        candidate = CpuEngine(make_teacher(name, img_size=64, depth=1).blocks)
        reason = candidate.why_not(torch.device("cpu"), torch.float32)
        assert (reason is None) == runs
        assert runs or "older version, without the steps of Eva: build anew" in str(reason)
