"""The C++ kernels against the reference, in every layout and precision, and under sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from smi_fast import ops
from smi_fast.ops import backends, reference
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.cases import OpCall, WrongResult, random_kept, strided
from smi_fast.verify.engine_grid import engine_calls
from tests.backends.planted import (
    CALL_OF_EACH_OP,
    CALLS_WITH_FACTORS,
    STEPS_WITH_A_FACTOR,
    Factor,
    ScaledResults,
    rounded_nans,
)
from tests.helpers.kernels import needs_cpp

pytestmark = needs_cpp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CALLS = [*op_calls(), *engine_calls()]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# From 2.11 on, tensors over memory of others say when they are done with it.
TORCH_LENDS_MEMORY = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_error_is_within_its_budget(call: OpCall, dtype: torch.dtype) -> None:
    call.check(torch.ops.smi_fast, dtype)


@pytest.mark.parametrize("call", engine_calls(), ids=str)
def test_error_of_a_step_in_bfloat16_is_within_its_budget(call: OpCall) -> None:
    call.check(torch.ops.smi_fast, BF16)


@pytest.mark.parametrize("call", STEPS_WITH_A_FACTOR, ids=str)
def test_budget_catches_half_a_percent_in_bfloat16(call: OpCall) -> None:
    with pytest.raises(WrongResult, match="error"):
        call.check(ScaledResults(torch.ops.smi_fast, 1.005), BF16)


def test_every_nan_stays_one_in_bfloat16() -> None:
    assert all(result.isnan().all() for result in rounded_nans())


@pytest.mark.parametrize("call", CALLS_WITH_FACTORS, ids=str)
@pytest.mark.parametrize("part", "qkv")
def test_budget_catches_a_factor(call: OpCall, part: str) -> None:
    for dtype, factor in ((F32, 1 + 1e-5), (F64, 1 + 1e-10)):
        with pytest.raises(WrongResult, match="error"):
            call.check(Factor(torch.ops.smi_fast, part, factor), dtype)


@pytest.mark.parametrize("call", CALL_OF_EACH_OP, ids=str)
def test_budget_catches_a_scaled_result(call: OpCall) -> None:
    for dtype, factor in ((F32, 1 + 1e-5), (F64, 1 + 1e-10)):
        with pytest.raises(WrongResult):
            call.check(ScaledResults(torch.ops.smi_fast, factor), dtype)


def test_budget_catches_one_wrong_element() -> None:
    call = next(c for c in CALLS if str(c) == "gather_attention-46-64")
    for wrong in (1e-5, float("nan"), float("inf")):

        def planted(*arguments: object, wrong: float = wrong) -> tuple[Tensor, Tensor]:
            out, row = reference.gather_attention(*arguments)
            out[1, 45, 127] += wrong
            return out, row

        with pytest.raises(WrongResult, match="error"):
            call.check(SimpleNamespace(gather_attention=planted), F32)
    shifted = next(c for c in CALLS if c.op == "gather_patches")
    doubled = SimpleNamespace(
        gather_patches=lambda images, *rest: reference.gather_patches(images * 2, *rest)
    )
    with pytest.raises(WrongResult, match="isn't a copy"):
        shifted.check(doubled, F32)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    images, kept = torch.randn(3, 3, 224, 224), random_kept(3, 60, 196)
    qkv, lengths = torch.randn(3, 150, 3, 4, 64), torch.tensor([140, 99, 0])
    rows, channels = random_kept(3, 140, 150), torch.rand(4, 3) + 0.5
    state = [torch.rand_like(images) for _ in range(3)]
    on_patches = {"patch_size": 16, "backend": "cpp"}
    frozen = torch.rand(3, 14, 14) < 0.5

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = images.clone().requires_grad_(), qkv.clone().requires_grad_()
        patches, _ = ops.gather_patches(leaves[0], kept, (5, -9), True, **on_patches)
        out, importance = ops.gather_attention(
            leaves[1], rows, lengths, importance=True, backend="cpp"
        )
        space = {"mean": channels[0], "std": channels[1], "background": images, "frozen": frozen}
        windows, _ = ops.gather_sigmoid_patches(
            *(leaves[0], kept, (5, -9), True), **space, **on_patches
        )
        parts = [ops.total_variation(leaves[0], k, **on_patches) for k in (None, kept)]
        y, loss = ops.batch_norm_matching(leaves[0], *channels, backend="cpp")
        terms = [patches, windows, out, y, loss, *parts[0], *parts[1]]
        grads = torch.autograd.grad(sum(t.square().sum() for t in terms), leaves)
        changed = [t.clone() for t in (images, *state)]
        rates = {"step": 2, "lr": 0.1, "betas": (0.5, 0.99)}
        for selection in (None, kept):
            bounds = {"low": -channels[0], "high": channels[1], "active": selection}
            ops.adam_clamp_(*changed, **rates, **bounds, **on_patches)
        return [*terms, importance, *grads, *changed]

    before = torch.get_num_threads()
    try:
        one, two = results(1), results(2)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_every_element_of_a_result_is_written() -> None:
    """New memory is filled with nan, and results stay the same."""
    chosen = [call.converted(F32) for call in CALLS[::2]]
    plain = [call.run(torch.ops.smi_fast) for call in chosen]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = [call.run(torch.ops.smi_fast) for call in chosen]
    finally:
        torch.use_deterministic_algorithms(False)
    for call, before, after in zip(chosen, plain, poisoned, strict=True):
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=str(call))


# What each op calls the indices that it is given.
NAMES = {
    "gather_patches": "kept",
    "gather_sigmoid_patches": "kept",
    "total_variation": "active",
    "adam_clamp_": "active",
    "gather_attention": "token_index",
}


@pytest.mark.parametrize("bad", [-1, 12, 2**40])
@pytest.mark.parametrize("op", NAMES)
def test_patches_out_of_range_are_refused_before_anything_is_written(op: str, bad: int) -> None:
    kept = torch.tensor([[0, 1, 2], [3, bad, 5]])
    images, qkv = torch.randn(2, 3, 12, 16), torch.randn(2, 12, 3, 2, 8)
    state = [torch.randn(2, 3, 12, 16), torch.randn(2, 3, 12, 16), torch.rand(2, 3, 12, 16), images]
    before = [t.clone() for t in state]
    shift, flip = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    bounds = (-torch.ones(3), torch.ones(3))
    rates = (torch.tensor(1), torch.tensor(0.1, dtype=torch.float64), 0.5, 0.99, 0.0)
    grads = {
        "gather_patches": (torch.zeros(2, 3, 48), kept, shift, flip, 4, 12, 16),
        "gather_sigmoid_patches": (
            *(torch.zeros(2, 3, 48), images, kept, shift, flip, bounds[1], None, 4),
        ),
        "total_variation": (torch.ones(()), torch.ones(()), images, kept, 4, torch.ones(3, 4)),
        "gather_attention": (torch.zeros(2, 3, 16), qkv, kept, None),
    }
    forward = {
        "gather_patches": (images, kept, shift, flip, 4),
        "gather_sigmoid_patches": (images, kept, shift, flip, *bounds, None, None, 4),
        "total_variation": (images, kept, 4),
        "gather_attention": (qkv, kept, None, True),
        "adam_clamp_": (images, *state[:3], *rates, *bounds, kept, 4),
    }
    message = rf"expected {NAMES[op]} in \[0, 12\), got {bad} at \[1, 1\]"
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.smi_fast, op)(*forward[op])
    if op in grads:
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.smi_fast, f"{op}_backward")(*grads[op])
    assert all(map(torch.equal, state, before))


def test_memory_of_a_large_result_is_given_out_again_once_it_is_free() -> None:
    """And not before: neither while a view of it lives, nor in another thread."""
    shift, flip = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)

    def patches(value: float) -> Tensor:
        images, kept = torch.full((2, 3, 448, 448), float(value)), torch.arange(784).expand(2, -1)
        return torch.ops.smi_fast.gather_patches(images, kept, shift, flip, 16)[0]

    held = [patches(value) for value in (1.0, 2.0)]
    view = held.pop()[1, 700:]
    with ThreadPoolExecutor(4) as pool:
        held += pool.map(patches, range(3, 9))
    assert len({tensor.data_ptr() for tensor in [view, *held]}) == 8
    assert (view == 2).all()
    assert [tensor.unique().tolist() for tensor in held] == [[1], *([v] for v in range(3, 9))]
    if TORCH_LENDS_MEMORY:
        address = held.pop().data_ptr()
        assert patches(9.0).data_ptr() == address


def test_a_nan_in_a_gradient_reaches_the_pixels() -> None:
    state = [torch.zeros(1, 1, 4, 4) for _ in range(4)]
    state[1][0, 0, 1, 2] = torch.nan
    bounds = {"low": torch.tensor([-1.0]), "high": torch.tensor([1.0])}
    ops.adam_clamp_(*state, step=1, lr=0.1, betas=(0.5, 0.9), **bounds, backend="cpp")
    assert state[0].isnan().nonzero().tolist() == [[0, 0, 1, 2]]


def test_other_types_and_devices_are_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="expected float32 or float64, got Half"):
        torch.ops.smi_fast.total_variation(torch.zeros(1, 3, 8, 8).half(), None, 1)
    with pytest.raises(backends.BackendUnavailable, match=r"cpp: .*or float64, got torch.bfloat16"):
        ops.total_variation(torch.zeros(1, 3, 8, 8).bfloat16(), backend="cpp")
    with pytest.raises(backends.BackendUnavailable, match=r"cpp: .* runs on the CPU, got meta"):
        ops.total_variation(torch.zeros(1, 3, 8, 8, device="meta"), backend="cpp")


def test_it_is_the_automatic_choice_on_the_cpu() -> None:
    for op in backends.OPS:
        assert backends.choose(op, torch.device("cpu"), F32).name == "cpp"
        assert backends.choose(op, torch.device("cpu"), torch.bfloat16).name == "reference"


def test_without_the_library_the_reference_runs_and_the_reason_is_known() -> None:
    code = """
import sys, torch
sys.modules["smi_fast._C_cpu"] = None
from smi_fast.ops import backends
from smi_fast import ops
ops.total_variation(torch.zeros(1, 3, 8, 8))
assert backends.choose("total_variation", torch.device("cpu"), torch.float32).name == "reference"
assert "smi_fast._C_cpu can't be loaded" in backends.report(torch.device("cpu"))["cpp"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def strided_calls() -> list[OpCall]:
    """The first call of each op with strided arguments, small enough for opcheck."""
    found: dict[str, OpCall] = {}
    for call in CALLS:
        if "strided" in call.label:
            found.setdefault(call.op, call)
    return list(found.values())


@pytest.mark.parametrize("call", strided_calls(), ids=str)
def test_opcheck(call: OpCall) -> None:
    torch.library.opcheck(getattr(torch.ops.smi_fast, call.op), call.arguments)


def test_compiles_into_one_graph() -> None:
    kept, rows = random_kept(2, 4, 6), random_kept(2, 5, 9)
    shift, flip = torch.tensor([3, -5]), torch.tensor(True)
    leaves = strided(torch.randn(2, 3, 8, 12)), torch.randn(2, 9, 3, 2, 8)

    def loss(images: Tensor, qkv: Tensor, backend: str) -> Tensor:
        patches, _ = ops.gather_patches(images, kept, shift, flip, patch_size=4, backend=backend)
        out, _ = ops.gather_attention(qkv, rows, importance=True, backend=backend)
        l1, l2 = ops.total_variation(images, kept, patch_size=4, backend=backend)
        y, term = ops.batch_norm_matching(images, *torch.ones(4, 3), backend=backend)
        return patches.square().sum() + out.square().sum() + l1 + l2 + y.square().sum() + term

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = [leaf.requires_grad_() for leaf in leaves]
    ours = torch.autograd.grad(compiled(*inputs, "cpp"), inputs)
    expected = torch.autograd.grad(loss(*inputs, "reference"), inputs)
    torch.testing.assert_close(ours, expected)


def check_grid(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(HERE / "check_grid.py"), *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_lesser_instruction_sets(capability: str) -> None:
    result = check_grid(ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0 and "within their budget" in result.stdout, result.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a _C_cpu under AddressSanitizer and UBSan, and one planted fault more."""
    folder = tmp_path_factory.mktemp("sanitized")
    sources = [*(ROOT / "csrc" / "cpu").glob("*.cpp"), HERE / "planted_fault.cpp"]
    flags = ["-std=c++20", "-fPIC", "-g1", "-O1", "-fopenmp-simd", "-fno-math-errno"]
    flags += [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    flags += [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]

    def compile_one(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", made], check=True)
        return made

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(compile_one, sources))
    libraries = [f"-L{library_paths()[0]}", "-ltorch_cpu", "-lc10"]
    library = str(folder / "_C_cpu.abi3.so")
    subprocess.run(["g++", "-shared", *flags, *objects, *libraries, "-o", library], check=True)
    return folder


def run_sanitized(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # ASan must find the C++ library at its start, to pass on the exceptions of later libraries.
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(libraries)}
    return check_grid(str(folder), *arguments, **options)


def test_no_access_out_of_bounds_and_nothing_undefined(sanitized: Path) -> None:
    result = run_sanitized(sanitized)
    assert result.returncode == 0 and str(sanitized) in result.stdout, result.stderr


def test_sanitizer_catches_a_read_out_of_bounds(sanitized: Path) -> None:
    result = run_sanitized(sanitized, "--planted-fault")
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
