"""The compiled extensions are declared here; everything else is in pyproject.toml.

SMI_FAST_CPP and SMI_FAST_CUDA choose the kernels to build. 1 builds them, or ends the build with
one sentence that says why it can't. 0 leaves them out. auto, the default, builds them where it can,
or says in one sentence why it goes on without them. TORCH_CUDA_ARCH_LIST names the GPUs to compile
for, and MAX_JOBS the number of compilers that run at a time.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import Extension, setup

TORCH_FLOOR = (2, 10)  # the oldest torch whose stable ABI the kernels use
PYTHON_TAG = "cp310"  # the oldest Python that the one wheel serves

# Vectorized sums need -fopenmp-simd, and vectorized square roots -fno-math-errno. No instruction
# set is named here, because it is chosen when the library runs (csrc/cpu/isa_dispatch.h).
CXX = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-ffp-contract=fast")
CXX += ("-fvisibility=hidden", "-Wall", "-Wextra")
# setuptools passes the -g that Python was built with; a later -g0 takes it back. Debug information
# makes the CPU module twelve times as large.
CXX += ("-g0",)
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


def wanted(variable: str) -> str:
    """The value of SMI_FAST_CPP or SMI_FAST_CUDA: auto, 0 or 1."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"expected {variable}=auto, 0 or 1, got {value!r}")
    return value


def leave_out(kernels: str, reason: str, forced: bool) -> None:
    """Say why `kernels` are not built, and end the build if they are forced."""
    if forced:
        raise SystemExit(f"The {kernels} kernels can't be built: {reason}.")
    print(f"Building without the {kernels} kernels: {reason}.", file=sys.stderr)


def find_cuda() -> ModuleType:
    """The module csrc/find_cuda.py, which is not installed."""
    spec = importlib.util.spec_from_file_location("find_cuda", "csrc/find_cuda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extensions() -> list[Extension]:
    """The extensions that the environment asks for and that can be built here."""
    asked = {"C++": wanted("SMI_FAST_CPP"), "CUDA": wanted("SMI_FAST_CUDA")}
    names = [name for name, value in asked.items() if value != "0"]
    if not names:
        return []
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        reason = f"torch can't be imported ({error}); to build them, install torch >= 2.10 first"
        reason += " and build with --no-build-isolation"
        leave_out(" and ".join(names), reason, "1" in asked.values())
        return []
    found = [declare(cpp_extension.CppExtension, "cpu")] if "C++" in names else []
    if "CUDA" in names:
        cuda = find_cuda()
        try:
            toolkit = cuda.find()
        except cuda.Unbuildable as reason:
            leave_out("CUDA", str(reason), asked["CUDA"] == "1")
        else:
            cpp_extension.CUDA_HOME = toolkit.root
            kind = cpp_extension.CUDAExtension
            found.append(declare(kind, "cuda", toolkit.targets, USE_CUDA=None))
    return found


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

    # torch looks for ninja on the path, which need not have this environment's.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**options())
