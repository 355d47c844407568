"""The package as a whole: its public names, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smi_fast

STUB = Path(smi_fast.__file__).with_name("__init__.pyi")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True)


def test_the_stub_has_the_public_names() -> None:
    names = []
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            # Without "as" a name of a stub is private to it.
            assert all(alias.asname == alias.name for alias in node.names)
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.AnnAssign):
            names.append(node.target.id)
    assert sorted(names) == sorted(smi_fast.__all__)
    assert len(set(names)) == len(names)


def test_the_stub_and_the_table_name_the_same_modules() -> None:
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                scope: dict[str, object] = {}
                exec(f"from {node.module} import {alias.name}", scope)
                assert getattr(smi_fast, alias.name) is scope[alias.name]


def test_every_public_name_resolves_after_a_plain_import() -> None:
    code = (
        "import smi_fast; names = smi_fast.__all__;"
        "assert sorted(names) == dir(smi_fast);"
        "print(*(name for name in names if getattr(smi_fast, name) is not None))"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(smi_fast.__all__)


FIRST_NAMES = [*(names[0] for names in smi_fast._NAMES.values()), *smi_fast._MODULES]


@pytest.mark.parametrize("name", FIRST_NAMES)
def test_every_home_can_be_imported_first(name: str) -> None:
    done = python("-c", f"from smi_fast import {name}")
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'smi_fast' has no attribute 'Nonesuch'"):
        _ = smi_fast.Nonesuch
    assert not hasattr(smi_fast, "__wrapped__")


@pytest.mark.parametrize(
    "module", ["torch", "numpy", "triton", "matplotlib", "timm", "torchvision"]
)
def test_cold_import_is_light(module: str) -> None:
    code = f"import sys, smi_fast; sys.exit({module!r} in sys.modules)"
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize("module", ["transformers", "open_clip"])
def test_converters_import_no_library_whose_models_they_take(module: str) -> None:
    code = f"import sys, smi_fast.convert; sys.exit({module!r} in sys.modules)"
    assert python("-c", code).returncode == 0


def test_the_command_knows_its_version_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['smi-fast', '--version']; from smi_fast import cli\n"
        "try: cli.main()\n"
        "except SystemExit as done: sys.exit(bool(done.code) or 'torch' in sys.modules)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, f"smi_fast {smi_fast.__version__}\n"), done.stderr


def test_the_module_is_the_command() -> None:
    done = python("-m", "smi_fast", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"smi_fast {smi_fast.__version__}\n"
