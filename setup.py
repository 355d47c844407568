"""The compiled extensions are declared here; everything else is in pyproject.toml.

SMI_FAST_CPP=0 builds without the C++ kernels. SMI_FAST_CUDA=1 builds the CUDA kernels or says why
it can't, 0 leaves them out, and auto, the default, builds them where it can. TORCH_CUDA_ARCH_LIST
says for which GPUs, MAX_JOBS how many compilers run at a time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

TORCH_FLOOR = (2, 10)  # the oldest torch whose stable ABI the kernels use
PYTHON_TAG = "cp310"  # the oldest Python that the one wheel serves

# Vectors of sums need -fopenmp-simd, of square roots -fno-math-errno. No instruction set is named
# here, because it is chosen when the library runs (csrc/cpu/isa_dispatch.h).
CXX = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-ffp-contract=fast")
CXX += ("-fvisibility=hidden", "-Wall", "-Wextra")
NVCC = ("-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden")


def abi(major: int, minor: int) -> str:
    """A torch version as TORCH_TARGET_VERSION wants it: one byte for each part, from the left."""
    return f"0x{major << 56 | minor << 48:016x}"


def declare(kind: Any, name: str, nvcc: tuple[str, ...] = (), **macros: str | None) -> Extension:
    """The extension of a folder of csrc."""
    files = sorted(Path("csrc", name).iterdir())
    return kind(
        f"smi_fast._C_{name}",
        [str(file) for file in files if file.suffix in (".cpp", ".cu")],
        depends=[str(file) for file in files if file.suffix in (".h", ".cuh")],
        define_macros=[("TORCH_TARGET_VERSION", abi(*TORCH_FLOOR)), *macros.items()],
        extra_compile_args={"cxx": [*CXX], "nvcc": [*NVCC, *nvcc]},
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """What the environment asks for and can be built."""
    cpp, cuda = os.environ.get("SMI_FAST_CPP", "1"), os.environ.get("SMI_FAST_CUDA", "auto")
    if cuda not in ("auto", "0", "1"):
        raise SystemExit(f"expected SMI_FAST_CUDA=auto, 0 or 1, got {cuda!r}")
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        if cpp == "0" and cuda != "1":
            return []
        raise SystemExit(
            "Building the kernels needs torch: install it first and build with "
            "--no-build-isolation, or set SMI_FAST_CPP=0 and SMI_FAST_CUDA=0 to go without them."
        ) from error
    found = [] if cpp == "0" else [declare(cpp_extension.CppExtension, "cpu")]
    if cuda == "0":
        return found
    sys.path.append("csrc/cuda")
    import toolkit

    try:
        tools = toolkit.find()
    except toolkit.Unbuildable as reason:
        if cuda == "1":
            raise SystemExit(f"The CUDA kernels can't be built: {reason}.") from reason
        print(f"Building without the CUDA kernels: {reason}.", file=sys.stderr)
        return found
    cpp_extension.CUDA_HOME = tools.root
    return [*found, declare(cpp_extension.CUDAExtension, "cuda", tools.targets, USE_CUDA=None)]


def options() -> dict[str, Any]:
    """What setup() needs to build them."""
    modules = extensions()
    if not modules:
        return {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = "build/objects"  # stays, so that the next build compiles what changed

    # ninja is looked for on the path, where that of an environment need not be.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**options())
