"""Compiles the CUDA kernels for the host, with ninja, into importable modules.

Objects stay in a build directory outside of git, and only changed sources are compiled again.
``python build.py`` builds every variant ahead of the tests.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
KERNELS = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulation"

# How the kernels, but not the emulation itself, are compiled.
VARIANTS = {
    "plain": "-O2 -march=native -ffp-contract=off",
    "memory": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    # Its calls end in races.cpp; ThreadSanitizer's library isn't linked.
    "races": "-O1 -g1 -fsanitize=thread",
}
LINK = {"memory": "-fsanitize=address,undefined"}


@dataclass(frozen=True)
class Fault:
    """A fault to plant into a copy of the kernels.

    Attributes:
        name: identifier of the fault.
        variant: the variant that catches it.
        file: the file to change.
        text: the text to replace; the file has it once.
        replacement: the fault.
        source: the .cu file that is compiled with the fault; the others stay as they are.
        caught: a regular expression that the output of the run matches.
    """

    name: str
    variant: str
    file: str
    text: str
    replacement: str
    source: str
    caught: str


def why_not() -> str | None:
    """Why the kernels can't be emulated on this machine, or None."""
    if sysconfig.get_platform() != "linux-x86_64":
        return "the emulation is written for Linux on x86-64"
    if shutil.which("g++") is None or ninja() is None:
        return "the emulation needs g++ and ninja"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulation needs pybind11"
    return None


def ninja() -> str | None:
    """The ninja beside this Python, or on the path."""
    return shutil.which(str(Path(sys.executable).parent / "ninja")) or shutil.which("ninja")


def module_path(variant: str, fault: Fault | None = None) -> Path:
    """Where the module of a variant, with a fault or without, is built."""
    name = f"emulated_{variant}" if fault is None else f"emulated_{fault.name}"
    return BUILD / name / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(variants: Iterable[str] = VARIANTS, faults: Iterable[Fault] = ()) -> None:
    """Builds modules, all of them in one run of ninja.

    Raises:
        RuntimeError: with what the compiler said.
    """
    import pybind11

    includes = " ".join(
        f"-I{path}" for path in (HERE, pybind11.get_include(), sysconfig.get_paths()["include"])
    )
    lines = [
        "flags = -x c++ -std=c++20 -fPIC -fvisibility=hidden -fno-strict-aliasing"
        f" -Wall -Wno-unknown-pragmas {includes}",
        "rule compile",
        "  command = g++ $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ -shared $in $extra -o $out",
    ]

    def compile_to(target: Path, source: Path, extra: str) -> str:
        line = f"build {target}: compile {source}"
        if line not in lines:
            lines.extend([line, f"  extra = {extra}"])
        return str(target)

    def kernels_of(variant: str) -> dict[str, str]:
        return {
            source.name: compile_to(
                BUILD / variant / f"{source.stem}.o", source, f"{VARIANTS[variant]} -I{KERNELS}"
            )
            for source in sorted(KERNELS.glob("*.cu"))
        }

    def link(module: Path, variant: str, kernels: Iterable[str]) -> None:
        # The bindings take longest to compile and least to run.
        common = [
            compile_to(
                BUILD / f"{source.stem}.o",
                source,
                f"{'-O0' if source.stem == 'module' else '-O2'} -I{KERNELS}",
            )
            for source in sorted(HERE.glob("*.cpp"))
        ]
        lines.append(f"build {module}: link {' '.join([*kernels, *common])}")
        lines.append(f"  extra = {LINK.get(variant, '')}")

    for variant in variants:
        link(module_path(variant), variant, kernels_of(variant).values())
    for fault in faults:
        module = module_path(fault.variant, fault)
        kernels = kernels_of(fault.variant)
        folder = _plant(fault, module.parent / "kernels")
        # First in the link, so that a template in a header is the one with the fault.
        first = compile_to(
            module.parent / "faulty.o",
            folder / fault.source,
            f"{VARIANTS[fault.variant]} -I{folder}",
        )
        del kernels[fault.source]
        link(module, fault.variant, [first, *kernels.values()])

    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [str(ninja()), "-C", str(BUILD)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def _plant(fault: Fault, folder: Path) -> Path:
    """A copy of the kernels with one change; files that stay the same keep their time."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in [*KERNELS.glob("*.cu"), *KERNELS.glob("*.cuh"), KERNELS / "launchers.h"]:
        content = source.read_text()
        if source.name == fault.file:
            assert content.count(fault.text) == 1, f"{fault.file} has {fault.text!r} once no more"
            content = content.replace(fault.text, fault.replacement)
        target = folder / source.name
        if not target.exists() or target.read_text() != content:
            target.write_text(content)
    return folder


def load(module: Path) -> ModuleType:
    """Imports a module that :func:`build` made."""
    spec = importlib.util.spec_from_file_location("emulated", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    build()
