"""Find the CUDA toolkit and the GPU architectures to build for, or say why it can't.

setup.py loads this file by its path: it is no part of the package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import NamedTuple

import torch

LEAST = 80  # cp.async and the bfloat16 tensor cores need compute capability 8.0
DEFAULT = ("8.0", "9.0", "10.0")  # compiled for where no GPU is visible


class Unbuildable(Exception):
    """The CUDA kernels can't be built here; the message says why."""


class Toolkit(NamedTuple):
    """An nvcc, the root of its toolkit, and one -gencode option for each architecture."""

    nvcc: str
    root: str
    targets: tuple[str, ...]


def find() -> Toolkit:
    """Find the toolkit in CUDA_HOME, else on the path, else in /usr/local/cuda.

    Raises:
        Unbuildable: torch has no CUDA; there is no nvcc, it doesn't work, or its major version is
            not torch's; or TORCH_CUDA_ARCH_LIST or the visible GPUs name no architecture that the
            kernels can be compiled for.
    """
    if torch.version.cuda is None:
        raise Unbuildable(f"torch {torch.__version__} is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else path)
    if nvcc is None:
        raise Unbuildable(f"there is no nvcc in {home or 'PATH or /usr/local/cuda'}")
    # An nvcc on the path may be a script or a link, so nvcc itself is asked for the root.
    command = [nvcc, "-v", "-E", "-Xcompiler=-dM", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    root = re.search(r"TOP=(.+)", said.stderr)
    version = re.search(r"define CUDART_VERSION (\d+)", said.stdout)
    if said.returncode or root is None or version is None:
        last = said.stderr.strip().rpartition("\n")[2]
        raise Unbuildable(f"{nvcc} can't compile an empty file ({last})")
    major, minor = int(version[1]) // 1000, int(version[1]) % 1000 // 10
    if str(major) != torch.version.cuda.split(".")[0]:
        raise Unbuildable(
            f"torch {torch.__version__} needs CUDA {torch.version.cuda.split('.')[0]}, "
            f"but {nvcc} belongs to CUDA {major}.{minor}"
        )
    return Toolkit(nvcc, os.path.realpath(root[1]), _targets(nvcc))


def _targets(nvcc: str) -> tuple[str, ...]:
    """The -gencode options for the architectures of the environment, the GPUs or the default."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    known = re.findall(r"compute_(\d+)", listed)
    asked = re.split(r"[; ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "))
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if asked != [""]:
        source, wanted = "TORCH_CUDA_ARCH_LIST", asked
    elif visible:
        source, wanted = "the visible GPUs", [f"{a}.{b}" for a, b in sorted(visible)]
    else:
        source = "the default"
        wanted = [arch for arch in DEFAULT if arch.replace(".", "") in known]
        wanted[-1] += "+PTX"
    options = []
    for arch in wanted:
        parts = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", arch)
        if parts is None:
            raise Unbuildable(f"expected {source} such as 8.0;9.0;10.0+PTX, got {arch!r} in it")
        number = parts[1] + parts[2]
        if int(number) < LEAST:
            continue
        if number not in known:
            raise Unbuildable(f"{nvcc} doesn't compile for {arch}, which {source} named")
        code = f"[sm_{number},compute_{number}]" if parts[3] else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    if not options:
        raise Unbuildable(
            f"the kernels need compute capability {LEAST / 10} or more, "
            f"and {source} named {', '.join(wanted)}"
        )
    return tuple(options)
