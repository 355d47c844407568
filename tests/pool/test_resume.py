"""A pool survives kill -9, Ctrl-C and a full disk at any moment, and --resume completes it."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
from PIL import Image

from smi_fast.pool import Pool

pytest.importorskip("resource", reason="limits the size of files, as a full disk does")

from tests.helpers.command import Ended, run
from tests.helpers.pools import files

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("SMI_FAST_TEST_SEED", "0"))
TROUBLES = 30
FOREIGN = ("notes.txt", "images/0002/holiday.jpg", "unfinished/mine.png")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def invert(pool: Path, *options: str, trouble: str | None = None, access: int = 0) -> Ended:
    """Two images in batches of one, two iterations each."""
    arguments = ["invert", "--out", str(pool), "--schedule", "dense", "--iterations", "2"]
    arguments += ["--classes", "2,7", "--per-class", "1", "--batch-size", "1", "--quiet"]
    return run([*arguments, *options], pool, trouble, access)


def plant(pool: Path) -> None:
    for name in FOREIGN:
        (pool / name).parent.mkdir(parents=True, exist_ok=True)
        (pool / name).write_bytes(b"precious")


def own_files(pool: Path) -> dict[str, bytes]:
    """The files of a pool, once the planted ones are found unchanged."""
    found = files(pool)
    for name in FOREIGN:
        assert found.pop(name) == b"precious"
    return found


def check_whole(pool: Path) -> None:
    """Every image of the metadata can be read."""
    for record in Pool(pool).records:
        for key in ("file_name", "masked_file_name", "mask_file_name"):
            with Image.open(pool / record[key]) as image:
                image.load()


def test_any_end_can_be_resumed_to_the_same_pool(tmp_path: Path) -> None:
    print(f"to repeat it: SMI_FAST_TEST_SEED={SEED}")
    whole = invert(tmp_path / "whole")
    assert whole.code == 0, whole.errors
    expected = files(tmp_path / "whole")
    draw = random.Random(SEED)
    counts = dict.fromkeys(("killed", "interrupted", "disk full"), 0)
    pools = 0
    while sum(counts.values()) < TROUBLES:
        pools += 1
        pool = tmp_path / str(pools)
        while True:
            trouble, access = draw.choice(list(counts)), draw.randint(1, whole.accesses)
            where = f"{trouble} before access {access} of pool {pools}"
            ended = invert(pool, "--resume", trouble=trouble, access=access)
            if (pool / "settings.json").exists():
                plant(pool)
            check_whole(pool)
            assert "Traceback" not in ended.errors, (where, ended.errors)
            if ended.code == 0:
                break
            counts[trouble] += 1
            wanted = {"killed": -signal.SIGKILL, "interrupted": 130, "disk full": 2}
            assert ended.code == wanted[trouble], (where, ended)
            if trouble == "disk full":
                assert ended.errors.count("\n") == 1 and "File too large" in ended.errors, where
        assert own_files(pool) == expected, where
    print(f"{pools} pools, {counts}")
    assert min(counts.values()) > 0

    again = invert(tmp_path / "1", "--overwrite", "--seed", "5")
    assert again.code == 0
    assert own_files(tmp_path / "1").keys() == expected.keys()
    assert own_files(tmp_path / "1") != expected
