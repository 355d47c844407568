"""What one pass frees, and the code of its products, serve the next pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.kernels import needs_cpp

# The large tensors of a pass are freed together at its end. Only a process of its own has a heap on
# which nothing was freed before.
PASSES = """
import resource
from itertools import pairwise
from statistics import median

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
# The system may take idle pages away at any time, so single passes don't count.
print(median(b - a for a, b in pairwise(faults[-9:])))
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


PRODUCTS = """
import smi_fast.engine
import torch

weight = torch.randn(8, 8)
for _ in range(2):
    print("round", flush=True)
    for rows in range(1, 1200):
        torch.ops.mkldnn._linear_pointwise(torch.zeros(rows, 8), weight, None, "none", [], "")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without it")
def test_code_of_many_products_is_kept() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
    command = [sys.executable, "-c", PRODUCTS]
    for set_by_user in ({}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100"}):
        environment = {**own, **set_by_user, "ONEDNN_VERBOSE": "2"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        _, first, second = ended.stdout.split("round\n")
        assert first.count("cache_miss") >= 1199
        assert (second.count("cache_miss") == 0) == (not set_by_user)
