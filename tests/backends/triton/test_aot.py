"""The Triton kernels, compiled ahead of time for GPUs that aren't there, against a budget.

Each real configuration of DeiT-T, S and B goes through its launcher, so that a kernel is compiled
exactly as on a GPU; what is checked is the machine code. Nothing here is a time.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import pytest

from smi_fast.verify.gpu_engine_grid import GPU_STEPS
from tests.backends.triton.compile import MACHINES, Compiled, compile_op

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("triton", "smi_fast.kernels")),
    reason="needs triton and the installed smi_fast.kernels",
)


@dataclass(frozen=True)
class Budget:
    """What a kernel must have on every target, in every configuration.

    Attributes:
        warps: that a multiprocessor holds at once, at least.
        loads: of 16 bytes, at least one.
        stores: of 16 bytes, at least one.
    """

    warps: int
    loads: bool = False
    stores: bool = False


# Jittered windows start anywhere, so one side of gather_patches moves a pixel at a time.
BUDGET = {
    "_gather_patches_fwd": Budget(48, stores=True),
    "_gather_patches_bwd": Budget(24, loads=True),
    "_gather_sigmoid_patches_fwd": Budget(40, stores=True),
    "_gather_sigmoid_patches_bwd": Budget(16, loads=True),
    "_total_variation_fwd": Budget(32, loads=True),
    "_total_variation_finish": Budget(32),
    "_total_variation_bwd": Budget(16, loads=True, stores=True),
    "_active_variation_fwd": Budget(24, loads=True),
    "_active_variation_bwd": Budget(16, loads=True, stores=True),
    "_batch_norm_matching_fwd": Budget(32, loads=True, stores=True),
    "_batch_norm_matching_finish": Budget(32),
    "_batch_norm_matching_bwd": Budget(32, loads=True, stores=True),
    "_adam_clamp": Budget(32, loads=True, stores=True),
    # Eight warps do all the work of a head from shared memory: more of them would only share it.
    "_gather_attention_fwd": Budget(8, loads=True),
    "_gather_attention_bwd": Budget(8, loads=True, stores=True),
    "_add_normalize": Budget(32, loads=True, stores=True),
    "_normalize_backward": Budget(24, loads=True, stores=True),
    "_gelu": Budget(32, loads=True, stores=True),
    "_multiply": Budget(48, loads=True, stores=True),
    "_swiglu": Budget(32, loads=True, stores=True),
    "_swiglu_backward": Budget(32, loads=True, stores=True),
    "_rotate": Budget(32),
    "_attend_rows_fwd": Budget(16, loads=True),
    "_attend_rows_bwd": Budget(12, loads=True, stores=True),
    "_cross_entropy": Budget(32, loads=True, stores=True),
    "_rows_at": Budget(4),
    "_embed_tokens": Budget(32, loads=True, stores=True),
    # As many warps as share the tiles of a product.
    "_linear_gelu": Budget(8, stores=True),
    "_multiplied_product": Budget(8, stores=True),
}
PRODUCTS = ("linear_gelu_", "multiplied_product_")
ATTENTION = ("gather_attention", "gather_attention_backward")
ACTIVATIONS = ("batch_norm_matching", "batch_norm_matching_backward")
PIXELS = (
    "gather_patches",
    "gather_patches_backward",
    "gather_sigmoid_patches",
    "gather_sigmoid_patches_backward",
    "total_variation",
    "total_variation_backward",
    "adam_clamp_",
)
HALF_PIXELS = (80, "total_variation_backward", "bfloat16")  # once spilled, where registers are few
# The code of sm_120 is that of sm_100 but for its shared memory, so one data type of it is enough.
# Under autocast pixels and moments stay float32. float16 compiles to the code of bfloat16 but for
# the type of its products: two targets show that.
CASES = [
    (target, op, dtype)
    for target in MACHINES
    for ops, dtypes in (
        (ATTENTION, ("bfloat16", "float32", *(("float16",) if target <= 90 else ()))),
        (ACTIVATIONS, ("bfloat16", "float32")),
        (GPU_STEPS, ("bfloat16", "float32")),
        (PIXELS, ("float32",)),
    )
    for op in ops
    for dtype in (dtypes if target < 120 else dtypes[:1])
] + [HALF_PIXELS]
Case = tuple[int, str, str]


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], list[Compiled]]]:
    """Compiles the selected cases in two processes, whose driver knows only its target."""
    wanted = [
        item.callspec.params["case"] for item in request.session.items if item.path == request.path
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            running: dict[Case, Future[list[Compiled]]] = {
                case: pool.submit(compile_op, *case) for case in wanted
            }
            yield lambda case: running[case].result()
            pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"sm_{case[0]}-{case[1]}-{case[2]}")
def test_budget(compiled: Callable[[Case], list[Compiled]], case: Case) -> None:
    target, op, dtype = case
    machine = MACHINES[target]
    kernels = compiled(case)
    assert kernels
    for kernel in kernels:
        budget = BUDGET[kernel.kernel]
        assert kernel.stack == 0 and kernel.count("STL|LDL") == 0, f"spills: {kernel}"
        assert kernel.shared <= machine.shared_of_block, kernel
        assert kernel.resident_warps(machine) >= min(budget.warps, machine.warps), kernel
        wide = case != HALF_PIXELS
        assert not (wide and budget.loads) or kernel.count(r"LDG\S*\.128"), kernel
        assert not (wide and budget.stores) or kernel.count(r"STG\S*\.128"), kernel
        if op in ATTENTION:
            tensor_core = kernel.count("HMMA|HGMMA|UTCHMMA")
            assert (tensor_core > 0) == (dtype != "float32"), kernel
        if op in PRODUCTS:
            assert kernel.count("HMMA|HGMMA|UTC.MMA"), kernel
            assert kernel.count(r"LDGSTS\S*\.128") and not kernel.count(r"LDGSTS\.E$"), kernel
