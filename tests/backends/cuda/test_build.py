"""The wheel with the CUDA kernels: its machine code, its symbols, what it does without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SPEC = spec_from_file_location("find_cuda", ROOT / "csrc" / "find_cuda.py")
find_cuda = module_from_spec(SPEC)
SPEC.loader.exec_module(find_cuda)


def why_not() -> str | None:
    """Why the CUDA kernels can't be built here, or None."""
    try:
        find_cuda.find()
    except find_cuda.Unbuildable as reason:
        return str(reason)
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"needs CUDA's compiler: {why_not()}")
ARCHITECTURES = ("80", "90", "100")
SHARED_OF_BLOCK = 48 * 1024
WIDTHS = (32, 64, 80, 128)

# Most registers of a thread. Attention has one number for each width of a head.
REGISTERS = {
    "gather_patches_fwd": 40,
    "gather_patches_bwd": 40,
    "gather_sigmoid_patches_fwd": 48,
    "gather_sigmoid_patches_bwd": 48,
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
    """What one kernel takes, in bytes but for registers."""

    name: str
    width: int | None
    registers: int
    stack: int
    shared: int
    local: int


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a user builds it, for no GPU in particular; what setup.py has compiled is taken."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"SMI_FAST_CPP": "1", "SMI_FAST_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the installed wheel and nothing else."""
    folder = wheel.parent / "installed"
    command = ["-m", "pip", "install", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def library(installed: Path) -> Path:
    return installed / "smi_fast" / "_C_cuda.abi3.so"


def disassembler() -> str:
    """The toolkit's cuobjdump, or the one that comes with Triton."""
    places = [str(Path(find_cuda.find().root) / "bin"), os.environ.get("PATH", "")]
    try:
        import triton
    except ImportError:
        pass
    else:
        places.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    tool = shutil.which("cuobjdump", path=os.pathsep.join(places))
    return tool or pytest.skip("machine code is read by cuobjdump, of the toolkit or of Triton")


@cache
def dump(library: Path, *arguments: str) -> str:
    command = [disassembler(), *arguments, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernels(library: Path, arch: str) -> list[Kernel]:
    found = []
    text = dump(library, "-res-usage", "-arch", f"sm_{arch}")
    for mangled, *numbers in re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text
    ):
        name = re.search(r"\d+_([a-z_]+)(I.*)?E", mangled[mangled.rindex("_cu_") + 11 :])
        assert name is not None, mangled
        width = re.search(r"Li(\d+)E", mangled)
        found.append(Kernel(name[1], int(width[1]) if width else None, *(int(n) for n in numbers)))
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_resources_are_within_the_budget(library: Path, arch: str) -> None:
    found = kernels(library, arch)
    assert {kernel.name for kernel in found} == REGISTERS.keys()
    for kernel in found:
        assert kernel.stack == kernel.local == 0, f"spills: {kernel}"
        assert kernel.shared <= SHARED_OF_BLOCK, kernel
        budget = REGISTERS[kernel.name]
        most = budget if isinstance(budget, int) else budget[kernel.width or 0]
        assert kernel.registers <= most, kernel


def instructions(library: Path, arch: str) -> dict[str, str]:
    """The assembly of each kernel, by its mangled name."""
    parts = dump(library, "-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]
    return {part.split("\n")[0]: part for part in parts}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_attention_uses_tensor_cores_and_wide_copies(
    library: Path, direction: str, arch: str
) -> None:
    codes = {
        name: code
        for name, code in instructions(library, arch).items()
        if f"_gather_attention_{direction}I" in name
    }
    assert len(codes) == 3 * len(WIDTHS)
    for name, code in codes.items():
        assert re.search(r"LDGSTS\S*\.128", code), name
        if f"_{direction}If" in name:
            assert "HMMA" not in code and "FFMA" in code and re.search(r"LDS\.128", code), name
        else:
            assert "HMMA.16816.F32" in code, name
            assert re.search(r"LDSM\.16\.M88\.4", code), name
            assert re.search(r"LDSM\.16\.MT88\.4", code), name
            assert re.search(r"STG\.E\.64", code), name


def test_nothing_adds_atomically(library: Path) -> None:
    for name, code in instructions(library, "90").items():
        assert not re.search(r"\b(RED|ATOM|ATOMG|ATOMS)\b", code), name


def test_it_holds_code_for_every_architecture(library: Path) -> None:
    machine = re.findall(r"sm_(\d+)\.cubin", dump(library, "--list-elf"))
    assert set(machine) == set(ARCHITECTURES)
    assert set(re.findall(r"sm_(\d+)\.ptx", dump(library, "--list-ptx"))) == {"100"}


# Of Python's limited API, and of the C interface that torch keeps stable.
STABLE = re.compile(r"PyModule_Create2|aoti_(torch|record_function)_\w+|torch_\w+")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_it_needs_only_stable_symbols(installed: Path, name: str) -> None:
    """Of torch and Python, so that one wheel serves each torch from 2.10 and Python from 3.10."""
    path = installed / "smi_fast" / f"_C_{name}.abi3.so"
    needed = subprocess.run(
        ["nm", "-D", "--undefined-only", "--demangle", "--format=just-symbols", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    ours = [
        symbol for symbol in needed if re.search(r"\b(c10|at|caffe2|torch)::|torch|^_?Py", symbol)
    ]
    assert any(symbol.startswith("aoti_torch_") for symbol in ours)
    assert [symbol for symbol in ours if not STABLE.fullmatch(symbol)] == []
    assert (name == "cuda") == any(symbol.startswith("cuda") for symbol in needed)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_it_has_no_debug_information(installed: Path, name: str) -> None:
    path = installed / "smi_fast" / f"_C_{name}.abi3.so"
    command = ["readelf", "--wide", "--sections", str(path)]
    sections = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert ".text" in sections and "debug" not in sections
    assert name != "cpu" or path.stat().st_size < 2_000_000


def test_one_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"smi_fast/_C_cpu.abi3.so", "smi_fast/_C_cuda.abi3.so"} <= set(names)
    assert "smi_fast/kernels/gather_attention.py" in names


def run(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code with the installed wheel on a machine without a GPU."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


# Tensors of the CPU, handed to the kernels of CUDA past the choice by device.
LAUNCH = """
import torch
from smi_fast.ops import native
from smi_fast import ops
assert native.WHY_NO_CUDA is None, native.WHY_NO_CUDA
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
images, kept, one = torch.ones(1, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(())
qkv, channel = torch.ones(1, 4, 3, 1, 8), torch.ones(3)
jitter = kept, torch.zeros(1, 2, dtype=torch.int64), torch.tensor([False]), 4
adam = torch.tensor(1), one.double(), 0.5, 0.9, 0.0
calls = {
    "gather_patches": (images, *jitter),
    "gather_patches_backward": (torch.ones(1, 1, 48), *jitter, 8, 8),
    "gather_sigmoid_patches": (images, *jitter[:3], channel, channel, None, None, 4),
    "gather_sigmoid_patches_backward": (
        torch.ones(1, 1, 48), images, *jitter[:3], channel, None, 4
    ),
    "gather_attention": (qkv, None, None, False),
    "gather_attention_backward": (torch.ones(1, 4, 8), qkv, None, None),
    "total_variation": (images, None, 1),
    "total_variation_backward": (one, one, images, None, 1, torch.ones(3, 4)),
    "batch_norm_matching": (images, channel, channel, channel, channel, 1e-5),
    "batch_norm_matching_backward": (images, images, channel, channel, 1e-5, channel, channel),
    "adam_clamp_": (images, images, images, images, *adam, channel, channel, None, 1),
}
for name, arguments in calls.items():
    try:
        getattr(torch.ops.smi_fast, name).default.redispatch(cuda, *arguments)
    except RuntimeError as error:
        print(f"{name}: {str(error).splitlines()[0]}")
"""


def test_without_a_gpu_it_loads_and_a_launch_says_what_is_missing(installed: Path) -> None:
    done = run(installed, LAUNCH)
    assert done.returncode == 0, done.stderr[-4000:]
    said = done.stdout.splitlines()
    assert len(said) == 11
    for line in said:
        assert re.search(r"CUDA error: (CUDA driver version is insufficient|no CUDA-capable)", line)


WITHOUT_CUDA = """
import sys, torch
torch.version.cuda = None
from smi_fast.ops import backends, reference
from smi_fast import cli, ops
reason = backends.report(torch.device("cuda"))["cuda"]
print(reason)
images, kept = torch.randn(2, 3, 8, 8), torch.tensor([[0, 3], [1, 2]])
jitter = torch.tensor([[3, -2], [3, -2]]), torch.tensor([True, True])
assert backends.choose("gather_patches", images.device, images.dtype).name == "cpp"
assert torch.equal(
    ops.gather_patches(images, kept, (3, -2), True, patch_size=4)[0],
    reference.gather_patches(images, kept, *jitter, 4)[0],
)
try:
    ops.total_variation(images, backend="cuda")
except backends.BackendUnavailable as error:
    assert reason in str(error)
sys.argv = ["smi-fast", "info"]
cli.main()
"""


def test_beside_a_torch_without_cuda_it_says_so_and_the_cpu_works(
    installed: Path, tmp_path: Path
) -> None:
    """That torch brings none of the libraries of CUDA: here they have names that nothing has."""
    shutil.copytree(installed, tmp_path / "installed")
    library = tmp_path / "installed" / "smi_fast" / "_C_cuda.abi3.so"
    content = library.read_bytes()
    for name in (b"libtorch_cuda.so", b"libcudart.so"):
        assert name in content
        content = content.replace(name, name.replace(b"cuda", b"none"))
    library.write_bytes(content)
    done = run(tmp_path / "installed", WITHOUT_CUDA)
    assert done.returncode == 0, done.stderr[-4000:]
    reason = re.compile(
        r"torch \S+ is built without CUDA: smi_fast._C_cuda can't be loaded"
        r" \(lib\w*none\w*\.so\S*: cannot open shared object file"
    )
    assert len(reason.findall(done.stdout)) >= 2, done.stdout
    assert re.search(r"gather_patches +cpp\n", done.stdout)
