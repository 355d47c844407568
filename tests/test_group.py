"""Several processes make the pool that one makes, also when they are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from smi_fast import cli
from smi_fast.group import Group
from smi_fast.plan import Plan, agree
from smi_fast.pool import PoolError
from tests.helpers.pools import files

ROOT = Path(__file__).parents[1]
PROC = Path("/proc")
pytestmark = pytest.mark.skipif(
    not PROC.is_dir(), reason="finds the processes of torchrun in /proc"
)


def arguments(pool: Path, *options: str) -> list[str]:
    """The arguments that make a pool of ten images in batches of one."""
    found = ["invert", "--out", str(pool), "--schedule", "dense", "--quiet"]
    found += [] if "--iterations" in options else ["--iterations", "40"]
    return [*found, "--classes", "0-4", "--per-class", "2", "--batch-size", "1", *options]


def start(pool: Path, *options: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Starts two processes by torchrun."""
    options_of_it = ["--standalone", "--max-restarts", str(restarts), "--nproc-per-node", "2"]
    return torchrun(options_of_it, pool, *options)


def torchrun(options_of_it: list[str], pool: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options_of_it, "-m", "smi_fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments(pool, *options)],
        env={**environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def written(pool: Path) -> int:
    return len(list((pool / "masks").glob("*/*.png")))


def begin(pool: Path, group: subprocess.Popen[str]) -> list[int]:
    """Waits until a group has written three more images, and returns its workers."""
    before = written(pool)
    while written(pool) < before + 3:
        assert group.poll() is None, group.communicate()[1]
        time.sleep(0.01)
    children = (PROC / str(group.pid) / "task" / str(group.pid) / "children").read_text().split()
    assert len(children) == 2
    return [int(child) for child in children]


def kill(pool: Path, *options: str, all_of_it: bool) -> None:
    """Starts a group, and kills a worker or all processes by -9 amid their work."""
    group = start(pool, *options)
    workers = begin(pool, group)
    if all_of_it:
        group.send_signal(signal.SIGKILL)
    for worker in workers if all_of_it else workers[1:]:
        os.kill(worker, signal.SIGKILL)
    group.communicate(timeout=120)
    assert group.returncode != 0


def alone(pool: Path, *options: str) -> None:
    """Fills a pool in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smi-fast", *arguments(pool, *options)])
        with pytest.raises(SystemExit) as done:
            cli.main()
    assert not done.value.code


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the pool that one process makes."""
    path = tmp_path_factory.mktemp("pools") / "one"
    alone(path)
    return files(path)


def test_two_processes_make_the_pool_of_one(tmp_path: Path, expected: dict[str, bytes]) -> None:
    group = start(tmp_path / "two")
    out, err = group.communicate(timeout=300)
    assert group.returncode == 0, err
    assert out.startswith(f"10 images in {tmp_path / 'two'}: ") and out.count("\n") == 2
    assert files(tmp_path / "two") == expected
    assert not (tmp_path / "two/parts").exists()


def test_a_killed_group_can_be_resumed(tmp_path: Path, expected: dict[str, bytes]) -> None:
    pool = tmp_path / "pool"
    kill(pool, all_of_it=False)
    kill(pool, "--resume", all_of_it=True)
    assert written(pool) < 10
    alone(pool, "--resume")
    assert files(pool) == expected


def test_torchrun_restarts_a_group(tmp_path: Path, expected: dict[str, bytes]) -> None:
    pool = tmp_path / "pool"
    group = start(pool, "--overwrite", restarts=1)
    worker = begin(pool, group)[1]
    first = (pool / "masks/0000/000000.png").stat().st_mtime_ns
    os.kill(worker, signal.SIGKILL)
    _, err = group.communicate(timeout=300)
    assert group.returncode == 0, err
    assert files(pool) == expected
    assert (pool / "masks/0000/000000.png").stat().st_mtime_ns == first  # it was not made again


def test_a_machine_joins_a_running_group(tmp_path: Path) -> None:
    """torchrun ends the processes that are at work and starts all of them, which go on."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    elastic += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "last_call_timeout=1"]
    pool, options = tmp_path / "pool", ("--iterations", "150", "--resume")
    machines = [torchrun(elastic, pool, *options)]
    while not pool.is_dir() or not written(pool):
        assert machines[0].poll() is None, machines[0].communicate()[1]
        time.sleep(0.01)
    machines.append(torchrun(elastic, pool, *options))
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert any("SIGTERM" in error for error in errors), "the second came when the first was done"
    alone(tmp_path / "one", *options)
    assert files(pool) == files(tmp_path / "one")


def test_a_store_of_other_processes_is_refused() -> None:
    store = HashStore()
    groups = [Group.new(store, rank, 2) for rank in range(2)]
    assert [group.rank for group in groups] == [0, 1]
    with pytest.raises(ValueError, match="expected process 1 to start once, got a restart"):
        Group.new(store, 1, 2)


def test_numbers_are_given_out_once() -> None:
    store = HashStore()
    groups = [Group(store, rank, 2) for rank in range(2)]
    assert [groups[turn % 2].next() for turn in range(6)] == [0, 1, 2, 3, 4, 5]


def test_a_process_that_would_make_other_images_is_refused() -> None:
    store = HashStore()
    plan = Plan(3, 1, {4: range(12, 15)})
    assert agree(Group(store, 0, 2), plan, {"seed": 1, "at": (1, 2)}) == plan
    assert agree(Group(store, 1, 2), None, {"seed": 1, "at": [1, 2]}) == plan
    with pytest.raises(PoolError, match=r"process 1 would make other images .*: its seed is 2, th"):
        agree(Group(store, 1, 2), None, {"seed": 2, "at": [1, 2]})


def test_a_process_alone_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Group.of_torchrun() is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Group.of_torchrun() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="environment variable MASTER_ADDR expected"):
        Group.of_torchrun()
