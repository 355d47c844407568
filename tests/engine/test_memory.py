"""Memory that one pass frees serves the next pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.kernels import needs_cpp

# The large tensors of a pass are freed together at its end. Only a process of its own has a heap on
# which nothing was freed before.
PASSES = """
import resource
import timm
import torch
from smi_fast.engine.cpu import FoldedRun

torch.manual_seed(0)
vit = timm.create_model("vit_tiny_patch16_224", depth=4).requires_grad_(False)
run, x = FoldedRun(vit.blocks), torch.randn(4, 197, 192, requires_grad=True)
faults = []
for _ in range(12):
    torch.autograd.grad(run(x).sum(), x)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[-9]) / 8)
"""


@needs_cpp
@pytest.mark.skipif(
    "gnu" not in getattr(sys.implementation, "_multiarch", ""), reason="only glibc has the bound"
)
def test_a_pass_reuses_the_memory_of_the_last_one() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PASSES]
    ended = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    assert float(ended.stdout) < 100, f"{ended.stdout.strip()} pages are mapped anew in a pass"
