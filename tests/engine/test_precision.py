"""The engine in bfloat16: its error against float64, and no silent substitute."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import smi_fast.engine.cpu
from smi_fast import Dense, MassSchedule, SparseInverter, SparseViT
from smi_fast.engine import gain
from smi_fast.engine.cpu import FoldedRun, LastBlock
from smi_fast.engine.folding import MATRICES, FoldedBlock
from smi_fast.ops.backends import BackendUnavailable
from smi_fast.verify.budget import Error, errors
from smi_fast.verify.cases import random_kept
from tests.helpers.engine_steps import in_float64, run_by_steps
from tests.helpers.inversions import make
from tests.helpers.kernels import needs_cpp
from tests.helpers.teachers import (
    make_teacher,
    random_images,
    relative_error,
    tiny_vit,
    with_gradient,
)

pytestmark = needs_cpp
ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
# The greatest error, as a share of the largest number. One rounding is off by up to 1/512, and the
# roundings of a few blocks add up.
CLOSE = 0.02


@pytest.fixture
def vit() -> VisionTransformer:
    options = {"img_size": 64, "depth": 4, "init_values": 0.3}
    return make_teacher("vit_tiny_patch16_224", **options).requires_grad_(False)


def folded(vit: VisionTransformer, count: int) -> list[FoldedBlock]:
    return [FoldedBlock.of(block).stored_as(BF16) for block in vit.blocks[:count]]


def errors_of(run: FoldedRun, blocks: list[FoldedBlock], batch: int, count: int) -> Iterator[Error]:
    """The errors of what a run adds to tokens and to their gradient.

    The exact result is computed in float64 from the rounded weights.
    """
    tokens, grad = torch.randn(2, batch, count, 192)
    leaf = tokens.clone().requires_grad_()
    result = run(leaf)
    assert result.dtype == torch.float32
    ours = result.detach(), torch.autograd.grad(result, leaf, grad)[0]
    eager = run_by_steps(blocks, tokens, grad)
    exact = run_by_steps([in_float64(b) for b in blocks], tokens.double(), grad.double())
    for start, *results in zip((tokens, grad), ours, eager, exact, strict=True):
        yield from errors(*(result - start for result in results))


@pytest.mark.parametrize(
    ("batch", "count"), [(2, 7), (1, 17), (3, 1), (1, 1), (8, 47), (2, 130), (2, 0), (0, 5)]
)
def test_a_run_is_within_its_budget(vit: VisionTransformer, batch: int, count: int) -> None:
    blocks, run = folded(vit, 3), FoldedRun(vit.blocks[:3], stored=BF16)
    if not batch * count:
        assert run(torch.randn(batch, count, 192)).shape == (batch, count, 192)
        return
    for error in errors_of(run, blocks, batch, count):
        assert error.allowed, error


@pytest.mark.parametrize("which", range(4), ids=MATRICES)
def test_the_budget_catches_one_percent_of_one_matrix(vit: VisionTransformer, which: int) -> None:
    if MATRICES[which] in ("qkv", "proj"):
        # Random attention is close to uniform, and its output small.
        for layer in (vit.blocks[0].attn.qkv, vit.blocks[0].attn.proj):
            layer.weight.mul_(2)
    blocks, run = folded(vit, 1), FoldedRun(vit.blocks[:1], stored=BF16)
    run.weights[3 * which].mul_(1.01)
    assert not all(error.allowed for error in errors_of(run, blocks, 8, 47))


@pytest.mark.parametrize(("batch", "count", "rows"), [(2, 7, 1), (1, 1, 1), (3, 17, 2), (8, 47, 1)])
def test_first_rows_are_those_of_the_rounded_block(
    vit: VisionTransformer, batch: int, count: int, rows: int
) -> None:
    block, x = vit.blocks[-1], torch.randn(batch, count, 192, requires_grad=True)
    last = LastBlock(block, rows, stored=BF16)
    first, probabilities = last(x)
    assert first.dtype == probabilities.dtype == torch.float32
    exact = LastBlock(block, rows)
    exact.weights = [weight.double() for weight in last.weights]
    y = x.detach().double().requires_grad_()
    expected, expected_probabilities = exact(y)
    assert relative_error(probabilities, expected_probabilities) < CLOSE
    assert relative_error(first, expected) < CLOSE / 2
    grad = torch.randn_like(first)
    (ours,) = torch.autograd.grad(first, x, grad)
    (theirs,) = torch.autograd.grad(expected, y, grad.double())
    assert relative_error(ours, theirs) < CLOSE / 2
    slope = float((ours * theirs).sum() / theirs.square().sum())
    assert abs(slope - 1) < 0.002


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {"depth": 3}),
        ("deit_tiny_patch16_224 rectangle", {}),
        ("vit_tiny_patch16_224 average with class token", {}),
        ("eva02_tiny_patch14_224", {}),
        ("eva02_base_patch14_224", {"depth": 2, "img_size": 84}),  # a norm inside of the MLP
        ("eva02_base_patch16_clip_224", {}),  # and one inside of attention
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("aimv2_huge_patch14_224", {}),
        ("vit_base_patch16_clip_quickgelu_224", {}),
        ("vit_tiny_patch16_224", {"depth": 2, "act_layer": "gelu_tanh"}),
    ],
)
def test_logits_and_gradients_of_teachers(name: str, options: dict) -> None:
    teacher = make_teacher(name, **options)
    ours = SparseViT(teacher, precision="bfloat16")
    kept = random_kept(2, 7, ours.num_patches)
    images = random_images(teacher)
    expected = with_gradient(SparseViT(teacher), images, kept)
    for found, exact in zip(with_gradient(ours, images, kept), expected, strict=True):
        assert found.dtype == torch.float32
        assert 1e-5 < relative_error(found, exact) < 2 * CLOSE


def test_without_a_gradient_nothing_is_saved_and_the_result_is_the_same(
    vit: VisionTransformer,
) -> None:
    run, x = FoldedRun(vit.blocks[:3], stored=BF16), torch.randn(2, 9, 192)
    expected = run(x.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(run(x), expected)
    assert run.free is not None and run.free.hold(18, saves=False)
    stored = {tensor.dtype for tensor in (run.free.attended, run.free.hidden, run.free.d_qkv)}
    assert stored == {BF16}


def test_packed_products_are_the_same(
    vit: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.ops.smi_fast.products_by_onednn(torch.empty(0, dtype=BF16)):
        pytest.skip("only oneDNN packs bfloat16, with AVX-512")
    monkeypatch.setattr(smi_fast.engine.cpu, "_PASSES_UNPACKED", 2)
    run, x = FoldedRun(vit.blocks[:3], stored=BF16), torch.randn(2, 7, 192, requires_grad=True)

    def result() -> tuple[Tensor, Tensor]:
        y = run(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    plain, packed = result(), result()
    assert run.packed_rows == 0 and len(run.packed) == 24
    for one, other in zip(plain, packed, strict=True):
        assert relative_error(one, other) < CLOSE / 4


def test_passes_may_overlap(vit: VisionTransformer) -> None:
    run, a, b = FoldedRun(vit.blocks[:3], stored=BF16), *torch.randn(2, 2, 7, 192)
    for leaf in (a, b):
        leaf.requires_grad_()
    expected = [torch.autograd.grad(run(x).sum(), x)[0] for x in (a, b)]
    of_a, of_b = run(a).sum(), run(b).sum()
    assert torch.equal(torch.autograd.grad(of_a, a, retain_graph=True)[0], expected[0])
    assert torch.equal(torch.autograd.grad(of_b, b)[0], expected[1])
    assert torch.equal(torch.autograd.grad(of_a, a)[0], expected[0])


def test_it_follows_its_teacher_and_copies_of_it(vit: VisionTransformer) -> None:
    sparse, images = SparseViT(vit, precision="bfloat16"), random_images(vit)
    before = sparse(images).logits
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight.mul_(1.5)
    after = sparse(images).logits
    assert relative_error(before, after) > 2e-3
    assert torch.equal(after, SparseViT(vit, precision="bfloat16")(images).logits)
    assert torch.equal(after, copy.deepcopy(sparse)(images).logits)
    assert sparse.at_size((32, 32)).precision == "bfloat16"


def refusal(teacher: object, **options: object) -> str:
    with pytest.raises((ValueError, BackendUnavailable)) as refused:
        SparseViT(teacher, **{"precision": "bfloat16", **options})
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_there_is_no_silent_substitute(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_vit()
    assert refusal(teacher, precision="float16") == (
        "expected precision float32, tf32 or bfloat16, got 'float16'"
    )
    assert refusal(teacher, precision="tf32").startswith(
        "no engine runs in tf32 here: cpp: tf32 is of the tensor cores of a GPU, got cpu; triton: "
    )
    start = "no engine runs in bfloat16 here: "
    assert refusal(teacher, backend="reference") == start + "reference has no engine"
    assert refusal(copy.deepcopy(teacher).double()).startswith(
        start + "cpp: bfloat16 is of a teacher in float32, got torch.float64; triton: "
    )
    other = make_teacher("vit_tiny_patch16_224", img_size=32, depth=1, act_layer="silu")
    assert refusal(other).startswith(start + "cpp: blocks.0 has more than LayerNorm")
    with torch.device("meta"):
        assert "runs on the CPU, got meta" in refusal(tiny_vit())
    sparse, images = SparseViT(teacher, precision="bfloat16"), random_images(teacher)
    with torch.autocast("cpu", BF16), pytest.raises(BackendUnavailable, match="autocast chooses"):
        sparse(images)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(BackendUnavailable, match=r"torch\.compile is to see"):
        sparse(images)


def test_lengths_are_refused() -> None:
    sparse = SparseViT(tiny_vit(), precision="bfloat16")
    images, kept = random_images(sparse.vit), random_kept(2, 7, 24)
    with pytest.raises(ValueError, match="expected precision float32 with lengths, got 'bfloat16'"):
        sparse(images, kept, lengths=torch.tensor([7, 3]))
    with pytest.raises(ValueError, match="expected precision float32 with lengths"):
        make(sparse.vit, schedule=MassSchedule(0.5, (5,)), precision="bfloat16")


def test_an_inversion_says_its_precision() -> None:
    teacher, init = tiny_vit(), torch.randn(2, 3, 32, 48)
    options = {"init": init, "progress": False}
    results = {}
    for precision in ("float32", "bfloat16"):
        inverter = make(teacher, precision=precision)
        assert inverter.teacher.precision == precision
        state = inverter.start([1, 4], init)
        assert all(tensor.dtype == torch.float32 for tensor in (state.images(), state.parameters))
        generator = torch.Generator().manual_seed(0)
        results[precision] = inverter.invert([1, 4], generator=generator, **options)
    assert [result.precision for result in results.values()] == ["float32", "bfloat16"]
    assert make(copy.deepcopy(teacher).double()).invert([1], progress=False).precision == "float64"
    first, second = (result.images for result in results.values())
    assert first.dtype == second.dtype == torch.float32
    assert 0 < (first - second).abs().mean() < 0.1


def test_the_precision_of_a_given_sparse_vit_counts() -> None:
    sparse = SparseViT(tiny_vit(), precision="bfloat16")
    options = {"schedule": Dense(), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert SparseInverter(sparse, **options).teacher.precision == "bfloat16"
    assert SparseInverter(sparse, precision="bfloat16", **options).teacher is sparse
    message = "expected precision 'bfloat16', that of the given SparseViT, got 'float32'"
    with pytest.raises(ValueError, match=message):
        SparseInverter(sparse, precision="float32", **options)


def test_the_gain_is_measured_within_its_time() -> None:
    before = torch.get_rng_state()
    found = gain.times(0.0)
    assert sorted(found) == ["bfloat16", "float32"] and all(0 < t < 60 for t in found.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert set(gain.instructions()) <= {"AVX512-BF16", "AMX"}


@pytest.mark.parametrize(
    "environment",
    [
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    ],
    ids=["default", "avx2", "avx512 without bf16"],
)
def test_processors_without_products_of_bfloat16(environment: dict[str, str]) -> None:
    code = """
import torch
from smi_fast import SparseViT
from tests.helpers.teachers import make_teacher, random_images, relative_error, with_gradient
torch.manual_seed(0)
teacher = make_teacher("vit_tiny_patch16_224", img_size=64, depth=3)
images = random_images(teacher)
assert not torch.ops.smi_fast.products_by_onednn(torch.empty(0, dtype=torch.bfloat16)) or EMULATED
models = (SparseViT(teacher, precision=each) for each in ("bfloat16", "float32"))
for found, exact in zip(*(with_gradient(model, images) for model in models), strict=True):
    assert 1e-5 < relative_error(found, exact) < 0.02, relative_error(found, exact)
"""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    code = code.replace("EMULATED", str("ATEN_CPU_CAPABILITY" not in environment))
    everything = {**os.environ, "PYTHONPATH": paths, **environment}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=everything)
