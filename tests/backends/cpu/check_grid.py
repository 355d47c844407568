"""Checks every third call on the C++ kernels: for every instruction set, and under sanitizers.

The first argument is a folder whose ``_C_cpu`` replaces the installed one. With
``--planted-fault`` the planted fault of a sanitized one is called first.
"""

from __future__ import annotations

import sys

import smi_fast

if len(sys.argv) > 1:
    smi_fast.__path__.insert(0, sys.argv[1])

import torch

from smi_fast.ops import native, schemas  # noqa: F401  (schemas defines the ops)
from smi_fast.verify.call_grid import op_calls
from smi_fast.verify.engine_grid import engine_calls
from tests.backends.planted import rounded_nans

if native.WHY_NO_CPU is not None:
    raise SystemExit(native.WHY_NO_CPU)
if "--planted-fault" in sys.argv:
    torch.ops.smi_fast_planted.read_past_end(torch.zeros(4))
chosen = [*op_calls(), *engine_calls()][::3]
for call in chosen:
    call.check(torch.ops.smi_fast, torch.float32)
    call.check(torch.ops.smi_fast, torch.float64)
for call in engine_calls()[::3]:
    call.check(torch.ops.smi_fast, torch.bfloat16)
if not all(result.isnan().all() for result in rounded_nans()):
    raise SystemExit("rounding turns a NaN into a number")
print(f"{len(chosen)} calls within their budget, by {sys.modules['smi_fast._C_cpu'].__file__}")
