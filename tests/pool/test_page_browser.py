"""A browser opens the page about a pool without an error, and shows its images."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from smi_fast.pool import Pool
from smi_fast.pool.page import write_page
from tests.helpers.pools import NAMES, SETTINGS, read

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is there")
PINK, GREEN = (255, 0, 128), (0, 200, 80)


def show(page: Path, picture: Path) -> list[str]:
    """Takes a screenshot of a page, and returns what it wrote to the console."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={picture.parent / 'profile'}", "--window-size=1200,2400"]
    command += [f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return re.findall(r":CONSOLE[:(]\d+\)?\] (.*)", done.stderr)


def test_the_page_opens_without_an_error(tmp_path: Path) -> None:
    images = torch.tensor([PINK, GREEN])[:, :, None, None].expand(2, 3, 16, 24) / 255
    with Pool.create(tmp_path / "pool", SETTINGS, ["<b>bold & 'cat'", *NAMES]) as pool:
        records = [{"label": label, "confidence": 0.9} for label in range(2)]
        loss = {"stops": [1], "history": {"l": [1.0, 0.5]}}
        pool.add(images, torch.ones(2, 2, 3).bool(), records, loss=loss, seconds=1.0)
    assert show(write_page(tmp_path / "pool"), tmp_path / "page.png") == []
    pixels = read(tmp_path / "page.png")[..., :3]
    for colour in (PINK, GREEN):
        shown = (pixels == np.array(colour)).all(-1).sum()
        assert shown > 2 * 112 * 112  # the whole image and its kept patches, 112 pixels high


def test_errors_of_a_page_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('planted'); throw Error('thrown')</script>")
    planted, thrown = show(page, tmp_path / "page.png")
    assert planted.startswith('"planted"') and "Uncaught Error: thrown" in thrown
