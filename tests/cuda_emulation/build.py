"""Compiles the CUDA kernels for the host, with ninja, into an importable module.

The build directory is outside of git and keeps objects between runs. ``python build.py`` builds every
variant ahead of the tests.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"
BUILD = HERE.parent.parent / "build" / "cuda_emulation"

# How the kernels, but not the emulation itself, are compiled.
VARIANTS = {
    "plain": "-O2 -march=native -ffp-contract=off",
    "memory": "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    # Its calls end in races.cpp; ThreadSanitizer's library isn't linked.
    "races": "-O1 -g -fsanitize=thread",
}
LINK = {"memory": "-fsanitize=address,undefined"}


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


def build(variant: str = "plain", fault: tuple[str, str, str] | None = None, tag: str = "") -> Path:
    """Builds one variant and returns the path of the module.

    Args:
        variant: a key of :data:`VARIANTS`.
        fault: file, text and replacement: a fault to plant into a copy of the kernels.
        tag: tells apart the modules of different faults.
    """
    import pybind11

    name = f"emulated_{variant}{tag}"
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    sources = KERNELS if fault is None else _planted(folder / "kernels", *fault)
    includes = " ".join(
        f"-I{path}"
        for path in (HERE, sources, pybind11.get_include(), sysconfig.get_paths()["include"])
    )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    lines = [
        f"flags = -x c++ -std=c++20 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wno-unknown-pragmas {includes}",
        "rule compile",
        "  command = nice g++ $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ -shared $in {LINK.get(variant, '')} -o $out",
    ]
    objects = []
    for source in [*sorted(sources.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]:
        kernel = source.suffix == ".cu"
        extra = VARIANTS[variant] if kernel else f"-O2 -DMODULE_NAME={name}"
        # The emulation itself is the same in every variant, but for the module's name.
        shared = not kernel and source.stem != "module"
        target = BUILD / f"{source.stem}.o" if shared else folder / f"{source.stem}.o"
        lines += [f"build {target}: compile {source}", f"  extra = {extra if not shared else '-O2'}"]
        objects.append(str(target))
    module = folder / f"{name}{suffix}"
    lines.append(f"build {module}: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [str(ninja()), "-C", str(folder), "-f", "build.ninja"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return module


def load(module: Path) -> ModuleType:
    """Imports a module that :func:`build` made."""
    spec = importlib.util.spec_from_file_location(module.name.partition(".")[0], module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _planted(folder: Path, file: str, text: str, replacement: str) -> Path:
    """A copy of the kernels with one change; files that stay the same keep their time."""
    folder.mkdir(exist_ok=True)
    for source in KERNELS.iterdir():
        content = source.read_text()
        if source.name == file:
            assert text in content, f"{file} has no {text!r} to plant a fault into"
            content = content.replace(text, replacement, 1)
        target = folder / source.name
        if not target.exists() or target.read_text() != content:
            target.write_text(content)
    return folder


if __name__ == "__main__":
    for wanted in VARIANTS:
        print(build(wanted))
