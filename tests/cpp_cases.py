"""Checks a reduced grid on the C++ kernels: for every instruction set, and under sanitizers.

Its argument is a folder with the ``_C_cpu`` to check in place of the installed one; a sanitized one
has a planted fault, for ``--planted-fault``.
"""

from __future__ import annotations

import sys

import smi_fast

if len(sys.argv) > 1:
    smi_fast.__path__.insert(0, sys.argv[1])

import torch

from smi_fast.ops import native, schemas  # noqa: F401  (_schemas defines the ops)
from smi_fast.verify.cases import all_cases, block_cases

if native.WHY_NO_CPU is not None:
    raise SystemExit(native.WHY_NO_CPU)
if "--planted-fault" in sys.argv:
    torch.ops.smi_fast_planted.read_past_end(torch.zeros(4))
checked = 0
for case in [*all_cases(), *block_cases()][::3]:
    case.check(torch.ops.smi_fast, torch.float32)
    case.check(torch.ops.smi_fast, torch.float64)
    checked += 1
print(f"{checked} calls within their budget, by {sys.modules['smi_fast._C_cpu'].__file__}")
