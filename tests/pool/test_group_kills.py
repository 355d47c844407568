"""Groups of 1, 2 and 4 processes make one pool, also when they are killed by -9 at any moment."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the processes limit the size of their files by it")

from tests.helpers.command import Ended, run_group
from tests.helpers.pools import files

SEED = int(os.environ.get("SMI_FAST_TEST_SEED", "0"))
KILLS = int(os.environ.get("SMI_FAST_TEST_KILLS", "3"))
SIZES = (1, 2, 4)
# What the other processes get: torchrun ends those of its machine, but not those of another one.
KINDS = {"a worker": signal.SIGTERM, "all of them": signal.SIGKILL, "one of a machine": None}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arguments(pool: Path) -> list[str]:
    """Three images for each kill, in batches of one, two iterations each."""
    found = ["invert", "--out", str(pool), "--schedule", "dense", "--iterations", "2", "--resume"]
    return [*found, "--classes", "0-2", "--per-class", str(KILLS), "--batch-size", "1", "--quiet"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Ended]:
    """The files of the pool that one process makes, and how it ended."""
    pool = tmp_path_factory.mktemp("pools") / "one"
    (ended,) = run_group(arguments(pool), pool, 1)
    assert ended.code == 0, ended.errors
    return files(pool), ended


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_group_makes_the_pool_of_one(
    tmp_path: Path, whole: tuple[dict[str, bytes], Ended], size: int
) -> None:
    pool = tmp_path / "pool"
    for ended in run_group(arguments(pool), pool, size):
        assert (ended.code, ended.errors) == (0, "")
    assert files(pool) == whole[0]
    assert not (pool / "parts").exists()


def test_killed_groups_are_resumed_to_the_same_pool(
    tmp_path: Path, whole: tuple[dict[str, bytes], Ended]
) -> None:
    print(f"to repeat it: SMI_FAST_TEST_SEED={SEED} SMI_FAST_TEST_KILLS={KILLS}")
    expected, accesses = whole[0], whole[1].accesses
    draw = random.Random(SEED)
    counts = dict.fromkeys(KINDS, 0)
    pools = 0
    while sum(counts.values()) < KILLS:
        pools += 1
        pool = tmp_path / str(pools)
        done = False
        while not done:
            size, kind = draw.choice(SIZES), draw.choice(list(KINDS))
            victim = draw.randrange(size)
            # Process 0 also opens the pool and completes it. A session makes a batch or two.
            access = draw.randint(1, accesses * 2 // KILLS // (size if victim else 1))
            if sum(counts.values()) == KILLS:
                victim = None
            ended = run_group(
                arguments(pool), pool, size, victim=victim, access=access, last_rites=KINDS[kind]
            )
            where = f"pool {pools}: process {victim} of {size} before access {access}, {kind}"
            for each in ended:
                if each.code == 2:  # process 0 has ended
                    assert each.errors.startswith("smi-fast: the group has lost its store"), where
                    assert each.errors.count("\n") == 1, (where, each.errors)
            done = all(each.code == 0 for each in ended)
            if not done:
                assert victim is not None and ended[victim].code == -signal.SIGKILL, (where, ended)
                counts[kind] += 1
        assert files(pool) == expected, where
        assert not (pool / "parts").exists()
    print(f"{pools} pools, {counts}")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, whole: tuple[dict[str, bytes], Ended], victim: int
) -> None:
    draw = random.Random(SEED)
    for attempt in range(10):  # a process that starts late has few accesses
        pool, access = tmp_path / str(attempt), draw.randint(5, 30)
        full = run_group(
            arguments(pool), pool, 2, victim=victim, access=access, trouble="disk full"
        )[victim]
        if full.code:
            break
    assert full.code == 2 and full.errors.count("\n") == 1, (access, full)
    assert " failed: File too large" in full.errors, (access, full)
    assert all(ended.code == 0 for ended in run_group(arguments(pool), pool, 2))
    assert files(pool) == whole[0]
