"""The package as a whole: its public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["triton", "matplotlib", "timm", "torchvision"])
def test_cold_import_is_light(module: str) -> None:
    code = f"import sys, smi_fast; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
