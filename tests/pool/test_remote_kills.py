"""Processes without a common folder make one pool at a URL, also when they are killed by -9."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the processes limit the size of their files by it")

from tests.helpers.command import run_group
from tests.helpers.pools import files

SEED = int(os.environ.get("SMI_FAST_TEST_SEED", "0"))
KILLS = int(os.environ.get("SMI_FAST_TEST_KILLS", "3"))
# What the other process gets; see test_group_kills.
KINDS = {"a worker": signal.SIGTERM, "all of them": signal.SIGKILL, "one of a machine": None}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arguments(pool: str) -> list[str]:
    """Three images for each kill, in batches of one, two iterations each."""
    found = ["invert", "--out", pool, "--schedule", "dense", "--iterations", "2", "--resume"]
    return [*found, "--classes", "0-2", "--per-class", str(KILLS), "--batch-size", "1", "--quiet"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the pool that one process makes in a folder."""
    pool = tmp_path_factory.mktemp("pools") / "one"
    (ended,) = run_group(arguments(str(pool)), pool, 1)
    assert ended.code == 0, ended.errors
    return files(pool)


def test_two_processes_make_the_pool_of_one(tmp_path: Path, expected: dict[str, bytes]) -> None:
    pool = tmp_path / "pool"
    for ended in run_group(arguments(f"file://{pool}"), pool, 2):
        assert (ended.code, ended.errors) == (0, "")
    assert files(pool) == expected


def test_killed_processes_are_resumed_to_the_same_pool(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    print(f"to repeat it: SMI_FAST_TEST_SEED={SEED} SMI_FAST_TEST_KILLS={KILLS}")
    draw = random.Random(SEED)
    kills, pools = dict.fromkeys(KINDS, 0), 0
    while sum(kills.values()) < KILLS:
        pools += 1
        pool = tmp_path / str(pools)
        done = False
        while not done:
            size, kind = draw.choice((1, 2)), draw.choice(list(KINDS))
            victim = draw.randrange(size) if sum(kills.values()) < KILLS else None
            access = draw.randint(1, 60)  # of more than 200 that a whole pool takes
            ended = run_group(
                arguments(f"file://{pool}"),
                pool,
                size,
                victim=victim,
                access=access,
                last_rites=KINDS[kind],
            )
            where = f"process {victim} of {size} before access {access}, {kind}: {ended}"
            for each in ended:
                if each.code == 2:  # process 0 has ended
                    assert each.errors.startswith("smi-fast: the group has lost its store"), where
            done = all(each.code == 0 for each in ended)
            if not done:
                assert victim is not None and ended[victim].code == -signal.SIGKILL, where
                kills[kind] += 1
        assert files(pool) == expected, where
    print(f"{pools} pools, {kills}")
