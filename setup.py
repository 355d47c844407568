"""The compiled extensions are declared here; everything else is in pyproject.toml.

SMI_FAST_CPP=0 builds without the C++ kernels: every op then runs as plain PyTorch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

TORCH_FLOOR = (2, 10)  # the oldest torch whose stable ABI the kernels use
PYTHON_TAG = "cp310"  # the oldest Python that the one wheel serves


def abi(major: int, minor: int) -> str:
    """A torch version as TORCH_TARGET_VERSION wants it: one byte for each part, from the left."""
    return f"0x{major << 56 | minor << 48:016x}"


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    root = Path("csrc/cpu")
    return CppExtension(
        "smi_fast._C_cpu",
        sorted(map(str, root.glob("*.cpp"))),
        depends=sorted(map(str, root.glob("*.h"))),
        define_macros=[("TORCH_TARGET_VERSION", abi(*TORCH_FLOOR))],
        # Vectors of sums need -fopenmp-simd, of square roots -fno-math-errno. No instruction set is
        # named here, because it is chosen when the library runs (csrc/cpu/per_isa.h).
        extra_compile_args=[
            *("-O3", "-fopenmp-simd", "-fno-math-errno", "-ffp-contract=fast"),
            *("-fvisibility=hidden", "-Wall", "-Wextra"),
        ],
        py_limited_api=True,
    )


def options() -> dict[str, Any]:
    """What setup() needs to build the extensions that were asked for."""
    extensions = []
    if os.environ.get("SMI_FAST_CPP", "1") != "0":
        try:
            extensions.append(cpu_extension())
        except ImportError as error:
            raise SystemExit(
                "Building the C++ kernels needs torch: install it first and build with "
                "--no-build-isolation, or set SMI_FAST_CPP=0 to go without them."
            ) from error
    if not extensions:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**options())
