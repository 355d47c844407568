"""A fill that is interrupted, stopped or loses a process, and goes on where it stood."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from timm.models.vision_transformer import VisionTransformer
from torch.distributed import HashStore

from smi_fast import (
    PatchRebirth,
)
from smi_fast.fill import Interrupted, Stopped
from smi_fast.group import Group
from smi_fast.job_progress import Tally
from smi_fast.pool import Pool, PoolError
from tests.helpers.fills import REBIRTH, filled, interrupting, quick, stopping
from tests.helpers.inversions import make
from tests.helpers.pools import SETTINGS, files


@quick
def test_an_interrupted_fill_goes_on_where_it_stood(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "whole", make(teacher), seed=1)
    inverter = make(teacher)
    with monkeypatch.context() as patch:
        interrupting(patch, inverter, batch=1)
        with pytest.raises(Interrupted, match=r"after 3 iterations: .*unfinished; --resume starts"):
            filled(tmp_path / "parts", inverter, seed=1)
    assert len(Pool(tmp_path / "parts").records) == 2
    unfinished = sorted((tmp_path / "parts" / "unfinished").iterdir())
    assert [path.name for path in unfinished] == ["000002.png", "000003.png"]
    filled(tmp_path / "parts", inverter, seed=1)
    whole, parts = (files(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts


@quick
def test_an_interrupted_fill_of_trajectories_goes_on(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "whole", make(teacher, schedule=PatchRebirth(3)), labels=REBIRTH)
    inverter = make(teacher, schedule=PatchRebirth(3))
    with monkeypatch.context() as patch:
        interrupting(patch, inverter, batch=1)
        with pytest.raises(Interrupted):
            filled(tmp_path / "parts", inverter, labels=REBIRTH)
    assert len(Pool(tmp_path / "parts").records) == 5
    filled(tmp_path / "parts", inverter, labels=REBIRTH)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


@quick
def test_an_interrupted_group_goes_on_where_it_stood(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "alone", make(teacher), batch_size=1).close()
    expected = files(tmp_path / "alone")
    inverter, store = make(teacher), HashStore()
    store.add("next", 2)  # another process has taken the first turns of five
    with monkeypatch.context() as patch:
        interrupting(patch, inverter, batch=1)
        with pytest.raises(Interrupted, match="after 3 iterations"):
            filled(tmp_path / "group", inverter, batch_size=1, group=Group(store, 0, 1))
    assert (tmp_path / "group/unfinished/000003.png").exists()
    with Pool.resume(tmp_path / "group", SETTINGS, list("abcde")) as begun:
        assert (begun.records, begun.ahead) == ([], {2: range(2, 3)})
    with pytest.raises(PoolError, match=r"expected batch 2 of 2 trajectories .* the images 2 to 2"):
        filled(tmp_path / "group", make(teacher))
    shutil.copytree(tmp_path / "group", tmp_path / "resumed")
    filled(tmp_path / "resumed", make(teacher), batch_size=1).close()
    assert files(tmp_path / "resumed") == expected
    group = Group(HashStore(), 0, 1)
    filled(tmp_path / "group", make(teacher), batch_size=1, group=group).close()
    assert files(tmp_path / "group") == expected


@quick
def test_batches_of_a_dead_process_are_made_by_the_first(
    teacher: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "alone", make(teacher)).close()
    store = HashStore()
    dead = Group(store, 1, 2)
    dead.begin()
    assert dead.next() == 0
    dead.hold()  # and its end has released the lock
    dead.report(Tally(1, frozenset({4}), 0.5).to_json())
    group = Group(store, 0, 2)
    filled(tmp_path / "group", make(teacher), group=group, progress=True).close()
    assert files(tmp_path / "group") == files(tmp_path / "alone")
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 5 images, " in line]
    assert [line[0] for line in lines] == ["3", "4", "5"]


@quick
@pytest.mark.parametrize("store", [None, HashStore()])
def test_the_first_ctrl_c_lets_the_batch_end(
    teacher: VisionTransformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    store: HashStore | None,
) -> None:
    inverter, group = make(teacher), None if store is None else Group(store, 0, 1)
    with monkeypatch.context() as patch:
        stopping(inverter, patch, times=1)
        with pytest.raises(
            Stopped, match=r"stopped: .* has 2 of 5 images; --resume makes the rest"
        ):
            filled(tmp_path, inverter, group=group)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopping after this batch; Ctrl-C again ends it at once" in capfd.readouterr().err
    assert len(Pool(tmp_path).records) == 2 and not (tmp_path / "unfinished").exists()
    if store is not None:
        assert Group(store, 1, 2).stopped  # the other processes stop too


@quick
def test_the_second_ctrl_c_ends_the_batch(
    teacher: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverter = make(teacher)
    stopping(inverter, monkeypatch, times=2)
    with pytest.raises(Interrupted, match="after 3 iterations: the unfinished images"):
        filled(tmp_path, inverter)
    assert len(list((tmp_path / "unfinished").iterdir())) == 2


@quick
def test_a_handler_of_the_program_stays(teacher: VisionTransformer, tmp_path: Path) -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        inverter = make(teacher)
        with pytest.MonkeyPatch.context() as patch:
            stopping(inverter, patch, times=1)
            assert len(filled(tmp_path, inverter).records) == 5
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 3
