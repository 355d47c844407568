"""The CUDA kernels, emulated on the CPU: values, memory, races, and that faults are caught."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from smi_fast.ops import reference
from smi_fast.ops.limits import most_tokens
from smi_fast.verify.call_grid import FLOATS
from smi_fast.verify.cases import EXACT, OpCall, WrongResult
from tests.backends.cuda.emulation import build, check
from tests.backends.cuda.emulation.backend import Emulated
from tests.backends.cuda.emulation.build import Fault
from tests.backends.planted import CALL_OF_EACH_OP, CALLS_WITH_FACTORS, Factor, ScaledResults

PATCHES = [c for c in check.selection(elements=10_000) if c.op in EXACT]

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))

FAULTS = (
    Fault(
        "out_of_bounds",
        "memory",
        "gather_attention.cuh",
        "if (source >= 0 && source < rows)",
        "if (source >= 0)",
        "gather_attention_fwd.cu",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "shared_memory_too_small",
        "memory",
        "gather_attention.cuh",
        ": 3 * row);",
        ": 3 * row - 2);",
        "gather_attention_fwd.cu",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "missing_barrier",
        "races",
        "gather_attention_bwd.cu",
        "  }\n  __syncthreads();\n",
        "  }\n",
        "gather_attention_bwd.cu",
        "race: a read after a write",
    ),
    Fault(
        "missing_barrier_of_sum",
        "races",
        "common.cuh",
        "  __syncthreads();\n",
        "",
        "batch_norm_matching.cu",
        "race: a read after a write",
    ),
    Fault(
        "barrier_of_one_warp",
        "plain",
        "gather_attention_bwd.cu",
        "  }\n  __syncthreads();\n",
        "  }\n  if (warp() == 0) __syncthreads();\n",
        "gather_attention_bwd.cu",
        "deadlock|exited",
    ),
    Fault(
        "wrong_lane",
        "plain",
        "warp_tiles.cuh",
        "b + (lane() / 16 * 8 + lane() % 8) * kRow",
        "b + lane() % 16 * kRow",
        "gather_attention_fwd.cu",
        "WrongResult|AssertionError",
    ),
    Fault(
        "missing_wait",
        "plain",
        "gather_attention_fwd.cu",
        "  wait_for_copies();\n",
        "",
        "gather_attention_fwd.cu",
        "WrongResult|AssertionError",
    ),
    Fault(
        "patch_beyond_the_mask",
        "memory",
        "total_variation.cu",
        "|| active[i] >= patches) return;",
        "|| active[i] > patches) return;",
        "total_variation.cu",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    Fault(
        "unwritten_output",
        "plain",
        "total_variation.cu",
        "x < plane.width; x += kWarp) {\n      const bool active = plane.active(y, x);\n"
        "      const float here = plane.at(y, x);\n      float",
        "x + 1 < plane.width; x += kWarp) {\n      const bool active = plane.active(y, x);\n"
        "      const float here = plane.at(y, x);\n      float",
        "total_variation.cu",
        "WrongResult: .*error nan",
    ),
)


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    build.build(build.VARIANTS, FAULTS)


@pytest.fixture(scope="module")
def backend(_built: None) -> Emulated:
    return Emulated(build.load(build.module_path("plain")))


def run_alone(module: Path, variant: str) -> subprocess.CompletedProcess[str]:
    """Runs the short selection in a process that loads the sanitizers first."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    if variant == "memory":
        libraries = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment["LD_PRELOAD"] = " ".join(libraries)
        # Fibers have stacks of their own, and Python never frees all it has.
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0"
    return subprocess.run(
        [sys.executable, check.__file__, str(module)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )


Run = Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, _built: None) -> Iterator[dict[str | Fault, Run]]:
    """Runs the modules that the selected tests ask for, two at a time."""
    items = [item for item in request.session.items if item.path == request.path]
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    variants = {p["variant"] for p in parameters if "variant" in p}
    faults = {p["fault"] for p in parameters if "fault" in p}
    with ThreadPoolExecutor(2) as pool:
        yield {
            **{v: pool.submit(run_alone, build.module_path(v), v) for v in variants},
            **{
                f: pool.submit(run_alone, build.module_path(f.variant, f), f.variant)
                for f in faults
            },
        }


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_short_selection_is_clean(runs: dict[str | Fault, Run], variant: str) -> None:
    done = runs[variant].result()
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(runs: dict[str | Fault, Run], fault: Fault) -> None:
    done = runs[fault].result()
    assert done.returncode != 0
    assert re.search(fault.caught, done.stderr), done.stderr[-4000:]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("call", check.selection(elements=400_000), ids=str)
def test_error_is_within_its_budget(backend: Emulated, call: OpCall, dtype: torch.dtype) -> None:
    if not check.fits(call, dtype):
        with pytest.raises(RuntimeError, match=r"cudaError_t|no GPU accepts"):
            call.converted(dtype).run(backend)
    else:
        call.check(backend, dtype)


@pytest.mark.parametrize("call", CALLS_WITH_FACTORS, ids=str)
@pytest.mark.parametrize("part", "qkv")
def test_budget_catches_a_factor(backend: Emulated, call: OpCall, part: str) -> None:
    for dtype, factor in ((torch.bfloat16, 1.005), (torch.float16, 1.001)):
        with pytest.raises(WrongResult, match="error"):
            call.check(Factor(backend, part, factor), dtype)


@pytest.mark.parametrize("call", CALL_OF_EACH_OP, ids=str)
def test_budget_catches_a_scaled_result(backend: Emulated, call: OpCall) -> None:
    for dtype, factor in ((torch.float32, 1 + 1e-5), (torch.bfloat16, 1.02)):
        with pytest.raises(WrongResult):
            call.check(ScaledResults(backend, factor), dtype)


def test_gradient_that_does_not_fit_is_refused(backend: Emulated) -> None:
    """The launch asks for more shared memory than the limit that the kernel was given."""
    qkv, grad = torch.randn(1, 161, 3, 1, 80), torch.randn(1, 161, 80)
    with pytest.raises(RuntimeError, match=r"cudaError_t 1$"):  # cudaErrorInvalidValue
        backend.gather_attention_backward(grad, qkv, None, None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("gradient", [False, True])
def test_limit_of_tokens_is_known_before_the_launch(
    backend: Emulated, gradient: bool, dtype: torch.dtype
) -> None:
    for width in range(8, 129, 8):
        most = most_tokens(width, dtype.itemsize, gradient, 227 * 1024)
        assert most == backend.max_tokens(dtype, width, gradient)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lengths_out_of_range_are_clamped(backend: Emulated, dtype: torch.dtype) -> None:
    qkv = torch.randn(3, 40, 3, 2, 32).to(dtype)
    outputs = [
        backend.gather_attention(qkv, None, torch.tensor(lengths), True)
        for lengths in ([17, -3, 41], [17, 0, 40])
    ]
    assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_outside_of_the_rows_read_as_nan(backend: Emulated, dtype: torch.dtype) -> None:
    check.check_missing_tokens(backend, dtype)


@pytest.mark.parametrize("shape", [(1, 300, 3, 1, 128), (1, 5, 3, 1, 12), (1, 5, 3, 1, 136)])
def test_what_does_not_fit_is_refused(backend: Emulated, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"cudaError_t|no GPU accepts"):
        backend.gather_attention(torch.randn(shape), None, None, False)


@pytest.mark.parametrize("call", PATCHES, ids=str)
def test_patches_in_float64(backend: Emulated, call: OpCall) -> None:
    call.check(backend, torch.float64)


def test_patches_outside_of_the_grid(backend: Emulated) -> None:
    check.check_missing_patches(backend)


def test_limit_of_shared_memory_is_set_once_for_a_kernel_and_a_device(backend: Emulated) -> None:
    def attend(tokens: int) -> None:
        backend.gather_attention(torch.randn(1, tokens, 3, 1, 72), None, None, False)

    attend(5)
    before = backend.kernels.limits_set()
    for tokens in (160, 5, 160):
        attend(tokens)
    assert backend.kernels.limits_set() == before
    backend.kernels.use_device(1)
    try:
        attend(5)
        attend(160)
    finally:
        backend.kernels.use_device(0)
    assert backend.kernels.limits_set() == before + 1


def test_sums_of_float16_images_are_finite(backend: Emulated) -> None:
    """The number of differences of one image, and their sum, exceed the largest float16."""
    images = torch.randn(1, 3, 224, 224).half()
    exact = reference.total_variation(images.double(), None, 1)
    sums = backend.total_variation(images, None, 1)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)


def test_adam_clamp_lets_nan_through(backend: Emulated) -> None:
    state = [torch.zeros(1, 3, 4, 4) for _ in range(4)]
    state[1][0, 0, 0, 0] = torch.nan
    backend.adam_clamp_(*state, *check.RATES, *check.BOUNDS, None, 1)
    assert state[0].isnan().sum() == 1


def test_runs_repeat_bit_for_bit(backend: Emulated) -> None:
    qkv, images = torch.randn(1, 47, 3, 1, 32).bfloat16(), torch.randn(2, 3, 33, 37)
    outputs = [
        (*backend.gather_attention(qkv, None, None, True), backend.total_variation(images, None, 1))
        for _ in range(2)
    ]
    assert all(map(torch.equal, *outputs))
