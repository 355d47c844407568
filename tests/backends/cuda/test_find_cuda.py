"""Finding the CUDA toolkit, and the sentence for each reason not to build the CUDA kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
SPEC = spec_from_file_location("find_cuda", ROOT / "csrc" / "find_cuda.py")
find_cuda = module_from_spec(SPEC)
SPEC.loader.exec_module(find_cuda)
Unbuildable = find_cuda.Unbuildable

MAJOR = "13"


class FakeNvcc:
    """A toolkit whose nvcc is a script that says what a test wants it to say."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nvcc = root / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        self.says()

    def says(self, version: int = 13000, archs: str = "75 80 90 100", fails: str = "") -> None:
        known = "".join(f"compute_{arch}\\n" for arch in archs.split())
        self.nvcc.write_text(
            "#!/bin/sh\n"
            f"if [ \"$1\" = --list-gpu-arch ]; then printf '{known}'; exit; fi\n"
            f"echo '#$ TOP={self.root}/bin/..' >&2\n"
            + (f"echo '{fails}' >&2; exit 1\n" if fails else "")
            + f"echo '#define CUDART_VERSION {version}'\n"
        )
        self.nvcc.chmod(0o755)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvcc:
    """The only toolkit there is, for a torch of its version, on a machine without a GPU."""
    found = FakeNvcc(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(found.root))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", f"{MAJOR}.2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return found


def code_for(*targets: str) -> tuple[str, ...]:
    return tuple(
        f"-gencode=arch=compute_{t.rstrip('+')},"
        f"code={f'[sm_{t[:-1]},compute_{t[:-1]}]' if t.endswith('+') else f'sm_{t}'}"
        for t in targets
    )


def test_without_a_gpu_the_default_is_built_as_far_as_nvcc_knows_it(fake: FakeNvcc) -> None:
    assert find_cuda.find().targets == code_for("80", "90", "100+")
    fake.says(archs="75 80 90")
    assert find_cuda.find().targets == code_for("80", "90+")


def test_visible_gpus_are_what_is_built_for(
    fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = [(9, 0), (7, 5), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: visible[i])
    assert find_cuda.find().targets == code_for("80", "90")
    visible[:] = [(7, 0), (7, 5)]
    with pytest.raises(Unbuildable, match=r"8\.0 or more, and the visible GPUs named 7\.0, 7\.5$"):
        find_cuda.find()


@pytest.mark.parametrize(
    "asked", ["8.0;9.0;10.0+PTX", "7.5 8.0 9.0 10.0+PTX", " 8.0;9.0; 10.0+PTX;"]
)
def test_the_list_of_the_environment_comes_first(
    fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert find_cuda.find().targets == code_for("80", "90", "100+")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("8.0,9.0", r"expected TORCH_CUDA_ARCH_LIST such as 8\.0;9\.0;10\.0\+PTX, got '8\.0,9\.0'"),
        ("8.0;sm_90", r"expected TORCH_CUDA_ARCH_LIST such as .*, got 'sm_90' in it"),
        ("8.0;12.0", r"nvcc doesn't compile for 12\.0, which TORCH_CUDA_ARCH_LIST named"),
        (
            "7.0;7.5",
            r"need compute capability 8\.0 or more, and TORCH_CUDA_ARCH_LIST named 7\.0, 7",
        ),
    ],
)
def test_a_list_that_can_not_be_built_is_named(
    fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch, asked: str, sentence: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(Unbuildable, match=sentence):
        find_cuda.find()


def test_no_toolkit(tmp_path: Path, fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(Unbuildable, match=f"there is no nvcc in {tmp_path}$"):
        find_cuda.find()


def test_toolkit_of_another_major_version(fake: FakeNvcc) -> None:
    fake.says(version=12080)
    with pytest.raises(
        Unbuildable, match=rf"^torch .* needs CUDA 13, but {fake.nvcc} belongs to CUDA 12\.8"
    ):
        find_cuda.find()


def test_torch_without_cuda(fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Unbuildable, match=r"^torch .* is built without CUDA$"):
        find_cuda.find()


def test_broken_toolkit(fake: FakeNvcc) -> None:
    fake.says(fails="fatal error: cuda_runtime.h: No such file or directory")
    with pytest.raises(Unbuildable, match=r"an empty file \(fatal error: cuda_runtime\.h: No such"):
        find_cuda.find()


def test_a_script_on_the_path_leads_to_the_toolkit(
    tmp_path: Path, fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "elsewhere" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {fake.nvcc} "$@"\n')
    script.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join([str(script.parent), os.environ["PATH"]]))
    found = find_cuda.find()
    assert found.nvcc == str(script) and found.root == str(fake.root)


@pytest.mark.parametrize(
    ("wanted", "fails", "said"),
    [
        ("1", True, "The CUDA kernels can't be built: there is no nvcc in /nowhere.\n"),
        ("auto", False, "Building without the CUDA kernels: there is no nvcc in /nowhere.\n"),
        ("0", False, ""),
        ("yes", True, "expected SMI_FAST_CUDA=auto, 0 or 1, got 'yes'\n"),
    ],
)
def test_setup_insists_only_where_it_is_told_to(wanted: str, fails: bool, said: str) -> None:
    """For a CUDA torch; another one has another reason."""
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; sys.argv = ['setup.py', '--name'];"
        "exec(open('setup.py').read())"
    )
    environment = {**os.environ, "SMI_FAST_CUDA": wanted, "CUDA_HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "SMI_FAST_CPP": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stderr
    assert done.stderr.endswith(said) and ("kernels" in done.stderr) == ("kernels" in said)
    assert ("smi-fast" in done.stdout) != fails
