"""The CUDA kernels compile for every architecture, within a budget, to the right instructions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from cuda_emulation.build import KERNELS, ninja

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(
    NVCC is None or ninja() is None, reason="compiling the CUDA kernels needs nvcc and ninja"
)
BUILD = KERNELS.parent.parent / "build" / "cuda_cubins"
ARCHITECTURES = ("80", "90", "100")
REGISTERS_OF_SM, SHARED_OF_BLOCK = 65536, 48 * 1024
WIDTHS = (32, 64, 80, 128)

# Most registers of a thread. Attention has one number for each width of a head.
REGISTERS = {
    "gather_patches_fwd": 40,
    "gather_patches_bwd": 40,
    "mark_patches": 24,
    "total_variation_fwd": 64,
    "total_variation_bwd": 64,
    "total_variation_sum": 40,
    "batch_norm_matching_fwd": 40,
    "batch_norm_matching_bwd": 32,
    "batch_norm_statistics": 40,
    "adam_clamp_planes": 48,
    "adam_clamp_patches": 48,
    "mean_over_heads": 32,
    "gather_attention_fwd": dict(zip(WIDTHS, (104, 128, 136, 168), strict=True)),
    "gather_attention_bwd": dict(zip(WIDTHS, (128, 168, 184, 255), strict=True)),
}


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    width: int | None
    float32: bool
    registers: int
    shared: int
    spilled: int


def source_names() -> list[str]:
    return sorted(source.stem for source in KERNELS.glob("*.cu"))


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All files for all architectures, in one run of ninja."""
    lines = [
        "rule nvcc",
        f"  command = {NVCC} -std=c++20 -O3 -arch=sm_$arch -cubin -Xptxas -v -MD -MF $out.d"
        " $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for arch in ARCHITECTURES:
        for name in source_names():
            lines.append(f"build {name}.{arch}.cubin: nvcc {KERNELS / name}.cu")
            lines.append(f"  arch = {arch}")
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [str(ninja()), "-C", str(BUILD)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@cache
def report(name: str, arch: str) -> tuple[Kernel, ...]:
    log = (BUILD / f"{name}.{arch}.cubin.log").read_text()
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        mangled = entry.split("'")[0]
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", entry)))
        registers = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        found = re.search(r"\d+_([a-z_]+)(I.*)?E", mangled[mangled.rindex("_cu_") + 11 :])
        assert found is not None and registers is not None, mangled
        width = re.search(r"Li(\d+)E", mangled)
        kernels.append(
            Kernel(
                found.group(1),
                int(width.group(1)) if width else None,
                found.group(2) is not None and found.group(2).startswith("If"),
                int(registers.group(1)),
                int(shared.group(1)) if shared else 0,
                spills,
            )
        )
    assert kernels, log
    return tuple(kernels)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", source_names())
def test_resources_are_within_the_budget(name: str, arch: str) -> None:
    for kernel in report(name, arch):
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= SHARED_OF_BLOCK, kernel
        budget = REGISTERS[kernel.name]
        most = budget if isinstance(budget, int) else budget[kernel.width or 0]
        assert kernel.registers <= most, kernel


def disassembler() -> str | None:
    """The toolkit's cuobjdump, or the one that comes with Triton."""
    assert NVCC is not None
    places = [str(Path(NVCC).parent), os.environ.get("PATH", "")]
    try:
        import triton
    except ImportError:
        pass
    else:
        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def instructions(name: str, arch: str) -> dict[str, str]:
    """The assembly of each kernel of a file, by its mangled name."""
    tool = disassembler()
    if tool is None:
        pytest.skip("reading machine code needs cuobjdump, of the toolkit or of Triton")
    cubin = BUILD / f"{name}.{arch}.cubin"
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    parts = text.stdout.split("Function : ")[1:]
    return {part.split("\n")[0]: part for part in parts}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_attention_uses_tensor_cores_and_wide_copies(direction: str, arch: str) -> None:
    kernels = {
        name: code
        for name, code in instructions(f"gather_attention_{direction}", arch).items()
        if f"_gather_attention_{direction}I" in name
    }
    assert len(kernels) == 3 * len(WIDTHS)
    for name, code in kernels.items():
        assert re.search(r"LDGSTS\S*\.128", code), name
        if f"_{direction}If" in name:
            assert "HMMA" not in code and "FFMA" in code and re.search(r"LDS\.128", code), name
        else:
            assert "HMMA.16816.F32" in code, name
            assert re.search(r"LDSM\.16\.M88\.4", code), name
            assert re.search(r"LDSM\.16\.MT88\.4", code), name
            assert re.search(r"STG\.E\.64", code), name


@pytest.mark.parametrize("name", source_names())
def test_nothing_adds_atomically(name: str) -> None:
    for kernel, code in instructions(name, "90").items():
        assert not re.search(r"\b(RED|ATOM|ATOMG|ATOMS)\b", code), kernel
