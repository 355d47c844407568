"""Which engine runs the blocks of a teacher, and when none does."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from smi_fast import SparseViT, engine
from smi_fast.engine.cpu import CpuEngine
from smi_fast.engine.gpu import GpuEngine
from smi_fast.ops import backends, native
from smi_fast.ops.backends import BackendUnavailable
from tests.helpers.kernels import needs_cpp
from tests.helpers.teachers import make_teacher

CPU = torch.device("cpu")


def chosen(
    teacher: VisionTransformer,
    backend: str = backends.AUTO,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> engine.Engine | None:
    candidates = engine.candidates(SparseViT(teacher).vit.blocks)
    found = engine.choose(candidates, device, dtype, backend)
    assert found is None or found in candidates
    return found


@needs_cpp
@pytest.mark.parametrize("backend", ["auto", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cpu_engine_is_chosen(
    teacher: VisionTransformer, backend: str, dtype: torch.dtype
) -> None:
    assert isinstance(chosen(teacher, backend, dtype=dtype), CpuEngine)


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_an_engine_of_another_backend_is_not_chosen(
    teacher: VisionTransformer, backend: str
) -> None:
    assert chosen(teacher, backend) is None


@needs_cpp
def test_the_backend_of_the_environment_counts(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    assert chosen(teacher) is None
    assert isinstance(chosen(teacher, "cpp"), CpuEngine)


def test_an_unknown_backend_is_refused(teacher: VisionTransformer) -> None:
    with pytest.raises(BackendUnavailable, match=r"among auto, .*reference, got 'abacus'"):
        chosen(teacher, "abacus")


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda:0", torch.float64, "runs on the CPU, got cuda:0"),
        ("meta", torch.float32, "runs on the CPU, got meta"),
        ("cpu", torch.bfloat16, "takes float32 or float64, got torch.bfloat16"),
        ("cpu", torch.float16, "takes float32 or float64, got torch.float16"),
    ],
)
@needs_cpp
def test_other_tokens_have_no_engine_and_it_says_why(
    teacher: VisionTransformer, device: str, dtype: torch.dtype, reason: str
) -> None:
    candidate = CpuEngine(SparseViT(teacher).vit.blocks)
    why = candidate.why_not(torch.device(device), dtype)
    assert why is not None and why.endswith(reason)
    assert chosen(teacher, device=torch.device(device), dtype=dtype) is None


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_HAS_TRITON", True)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_the_engine_of_gpus_is_chosen(
    teacher: VisionTransformer, triton: None, backend: str, device: str
) -> None:
    assert isinstance(chosen(teacher, backend, torch.device(device)), GpuEngine)
    for other in ("cuda", "cpp", "reference"):
        assert chosen(teacher, other, torch.device(device)) is None


@pytest.mark.parametrize(
    ("name", "options", "device", "dtype", "reason"),
    [
        ("vit_tiny_patch16_224", {}, "cpu", torch.float32, "run on CUDA devices, got cpu"),
        (
            *("vit_tiny_patch16_224", {}, "cuda", torch.bfloat16),
            "the engine takes a teacher in float32, got torch.bfloat16",
        ),
        ("vit_tiny_patch16_224", {}, "cuda", torch.float64, "or float16, got torch.float64"),
        *(
            (name, options, "cuda", torch.float32, "blocks.0 has more than LayerNorm or RMSNorm")
            for name, options in (
                ("vit_tiny_patch16_224", {"act_layer": "relu"}),
                ("vit_tiny_patch16_224", {"qk_norm": True}),
                ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU}),
            )
        ),
    ],
)
def test_the_engine_of_gpus_says_what_it_does_not_run(
    triton: None, name: str, options: dict, device: str, dtype: torch.dtype, reason: str
) -> None:
    blocks = make_teacher(name, **{"img_size": 32, "depth": 2, **options}).blocks
    found = GpuEngine(blocks).why_not(torch.device(device), dtype)
    assert found is not None and reason in found


def test_without_triton_a_gpu_has_no_engine(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    assert chosen(teacher, device=torch.device("cuda")) is None
    found = GpuEngine(teacher.blocks).why_not(torch.device("cuda"), torch.float32)
    assert found == "triton isn't installed"


def test_without_kernels_there_is_no_engine(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "WHY_NO_CPU", "smi_fast._C_cpu can't be loaded (for a test)")
    candidate = CpuEngine(SparseViT(teacher).vit.blocks)
    assert candidate.why_not(CPU, torch.float32) == native.WHY_NO_CPU
    assert chosen(teacher) is None


def test_a_block_that_cannot_be_folded_is_named() -> None:
    teacher = make_teacher("vit_tiny_patch16_224", img_size=32, depth=3)
    teacher.blocks[1].mlp.act = torch.nn.ReLU()
    candidate = CpuEngine(SparseViT(teacher).vit.blocks)
    reason = candidate.why_not(CPU, torch.float32)
    assert reason == "blocks.1 has more than LayerNorm or RMSNorm, GELU or SwiGLU, and LayerScale"
    assert chosen(teacher) is None and chosen(teacher, "cpp") is None


@needs_cpp
def test_a_compiler_sees_the_blocks_themselves(
    teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert chosen(teacher) is None and chosen(teacher, "cpp") is None


@needs_cpp
def test_a_forward_asks_once(teacher: VisionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, choose = [], engine.choose
    sparse = SparseViT(teacher)

    def counted(*arguments: object) -> engine.Engine | None:
        asked.append(arguments[1:])
        return choose(*arguments)

    monkeypatch.setattr(engine, "choose", counted)
    taps = ("block.0.tokens", "attention.1.row")
    sparse(torch.zeros(1, 3, 32, 48).double(), importance=True, taps=taps)
    assert asked == [(CPU, torch.float64, "auto", "float32")]
