"""What a test needs that was compiled."""

from __future__ import annotations

import pytest

from smi_fast.ops import native

needs_cpp = pytest.mark.skipif(
    native.WHY_NO_CPU is not None, reason=f"needs the C++ kernels: {native.WHY_NO_CPU}"
)
