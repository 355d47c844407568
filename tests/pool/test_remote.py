"""Pools at a URL: the files of a folder, whole batches, one writer, one sentence for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from fsspec.registry import known_implementations

from smi_fast import cli_pool
from smi_fast.pool import Pool, PoolError, lease
from smi_fast.pool.pictures import draw_loss, draw_sheet
from smi_fast.pool.remote import RemotePool, local_copy, pool_type
from smi_fast.pool.store import Store
from tests.helpers.pools import ALWAYS, NAMES, SETTINGS, batch, files
from tests.helpers.stores import Torn, files_at

LOSS = {"stops": [2], "history": {"l": [1.0, 0.5]}}
URLS = ("memory://pool", "memory://", "torn://pool", "file://{}/pool", "dir::file://{}")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are renewed and lost in tenths of seconds, and failed requests are repeated at once."""
    monkeypatch.setattr(lease, "_RENEWAL", 0.05)
    monkeypatch.setattr(lease, "_LOOK", 0.05)
    monkeypatch.setattr("smi_fast.pool.store._PAUSES", (0.0, 0.0))


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    yield
    for system in (Torn, Torn.__mro__[1]):
        system.store.clear()
        del system.pseudo_dirs[1:]
    Torn.trouble.clear()
    Torn.written.clear()


def add(pool: Pool, seed: int) -> None:
    images, masks, records = batch(3, seed)
    pool.add(images, masks, records, loss=LOSS, seconds=1.0, moments=[images, images])


@pytest.mark.parametrize("url", URLS)
def test_the_files_are_those_of_a_pool_in_a_folder(tmp_path: Path, url: str) -> None:
    url = url.format(tmp_path / "there")
    (tmp_path / "there").mkdir()
    for kind, where in ((Pool, str(tmp_path / "here")), (RemotePool, url)):
        assert pool_type(where) is kind
        with kind.create(where, SETTINGS, NAMES) as pool:
            add(pool, 0)
            pool.add_unfinished(batch(1)[0])
        with kind.resume(where, SETTINGS, NAMES) as pool:
            assert len(pool.records) == 3
            add(pool, 1)
            add(pool, 2)
            draw_loss(pool)
            draw_sheet(pool)
            assert pool.where == where
    assert files_at(url) == files(tmp_path / "here")
    assert RemotePool(url).records == Pool(tmp_path / "here").records
    assert RemotePool(url).settings == Pool(tmp_path / "here").settings
    assert RemotePool(url).loss == LOSS
    with local_copy(url) as copy:
        assert files(copy) == files(tmp_path / "here")


def test_a_batch_counts_when_its_lines_are_there() -> None:
    with RemotePool.create("torn://pool", SETTINGS, NAMES) as pool:
        Torn.written.clear()
        add(pool, 0)
        written = [name for name in Torn.written if "/.locks/" not in name]
        assert written[-1] == "/pool/parts/.000000.jsonl.part"
        assert sum("/masks/" in name for name in written) == 3
        assert not [name for name in files_at("torn://pool") if name == "metadata.jsonl"]
        assert RemotePool("torn://pool").records == []
    last = [name for name in Torn.written if "/.locks/" not in name][-1]
    assert last == "/pool/.metadata.jsonl.part"
    assert not [name for name in files_at("torn://pool") if name.startswith("parts/")]


def test_what_a_killed_process_left_is_taken_or_deleted(tmp_path: Path) -> None:
    with Pool.create(tmp_path / "whole", SETTINGS, NAMES) as whole:
        for seed in range(3):
            add(whole, seed)
    killed = RemotePool.create("memory://pool", SETTINGS, NAMES)
    add(killed, 0)
    add(killed, 1)
    assert killed._lease is not None
    killed._lease.release()  # and no close()
    left = Store("memory://pool")
    left.write({"images/0001/000007.png": b"torn", "report/progress/000006.png": b"torn"})
    left.write({"images/0001/mine.png": b"not the pool's"})
    with RemotePool.resume("memory://pool", SETTINGS, NAMES) as pool:
        assert pool.batches == 2 and len(pool.records) == 6
        assert set(files_at("memory://pool")) & {"images/0001/000007.png"} == set()
        add(pool, 2)
    left.delete(["images/0001/mine.png"])
    assert files_at("memory://pool") == files(tmp_path / "whole")


@pytest.mark.parametrize("stays", [0, 10, ConnectionResetError("the line was cut")])
def test_a_torn_file_is_written_again(tmp_path: Path, stays: int | Exception) -> None:
    with Pool.create(tmp_path, SETTINGS, NAMES) as whole:
        add(whole, 0)
    with RemotePool.create("torn://pool", SETTINGS, NAMES) as pool:
        first = len(Torn.written)
        Torn.trouble |= {first + number: stays for number in (1, 14)}
        add(pool, 0)
    assert files_at("torn://pool") == files(tmp_path)


def test_a_file_that_stays_torn_is_an_error_and_the_pool_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with RemotePool.create("torn://pool", SETTINGS, NAMES) as pool:
        add(pool, 0)
        before = files_at("torn://pool")
        Torn.trouble |= dict.fromkeys(range(len(Torn.written), 1000), 3)
        monkeypatch.setattr(lease, "_RENEWAL", 1000.0)
        with pytest.raises(PoolError, match=r"writing torn://pool/\S+ failed: it has another size"):
            add(pool, 1)
        Torn.trouble.clear()
        after = files_at("torn://pool")
        for files_there in (before, after):
            for name in [name for name in files_there if name.startswith(".locks/")]:
                del files_there[name]
        assert after == before
        add(pool, 1)
        assert len(pool.records) == 6


def test_a_torn_file_replaces_no_whole_one() -> None:
    there = Store("torn://pool")
    there.write({"metadata.jsonl": b"of the last time"})
    Torn.trouble |= dict.fromkeys(range(1000), 3)
    with pytest.raises(PoolError, match=r"metadata.jsonl failed: it has another size there$"):
        there.write({"metadata.jsonl": b"of this time"})
    assert there.read(["metadata.jsonl"]) == {"metadata.jsonl": b"of the last time"}


def test_one_writer_at_a_time() -> None:
    first = RemotePool.create("memory://pool", SETTINGS, NAMES)
    add(first, 0)
    for attempt in (RemotePool.resume, partial(RemotePool.create, overwrite=True)):
        with pytest.raises(PoolError, match=r"^another process adds images to memory://pool$"):
            attempt("memory://pool", SETTINGS, NAMES)
    add(first, 1)
    first.close()
    with RemotePool.resume("memory://pool", SETTINGS, NAMES) as second:
        assert len(second.records) == 6


def test_a_lock_that_nobody_renews_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "PATIENCE", 0.3)
    there = Store("memory://pool")
    there.write({".locks/writer-1.json": b'{"space": "of another machine", "process": 1}'})
    with RemotePool.resume("memory://pool", SETTINGS, NAMES) as pool:
        assert ".locks/writer-1.json" not in there.names()
        said = capsys.readouterr().err
        assert said.startswith("another process may still add images to memory://pool: waiting")
        assert said.count("\n") == 1
        add(pool, 0)
        # As another process does that has seen no renewal.
        there.delete(there.names(".locks"))
        with pytest.raises(PoolError, match="another process has taken over memory://pool"):
            add(pool, 1)
        with pytest.raises(PoolError, match="another process has taken over memory://pool"):
            pool.close()
    with RemotePool.resume("memory://pool", SETTINGS, NAMES) as pool:
        assert len(pool.records) == 3


def test_a_process_that_lost_its_lock_deletes_nothing() -> None:
    late, there = RemotePool.create("memory://pool", SETTINGS, NAMES), Store("memory://pool")
    there.delete(there.names(".locks"))
    with RemotePool.resume("memory://pool", SETTINGS, NAMES) as pool:
        add(pool, 0)
    before = files_at("memory://pool")
    with pytest.raises(PoolError, match="another process has taken over memory://pool"):
        add(late, 1)
    with pytest.raises(PoolError, match="another process has taken over memory://pool"):
        late.close()
    assert files_at("memory://pool") == before


@pytest.mark.parametrize("alone", [True, False])
def test_a_lock_that_is_lost_amid_a_batch_ends_it_before_its_lines(
    monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    pool, there = RemotePool.create("memory://pool", SETTINGS, NAMES), Store("memory://pool")
    part = pool.part(1)
    adding: Any = pool if alone else part
    write = adding._write

    def write_slowly(contents: dict[str, bytes]) -> None:
        write(contents)
        there.delete(there.names(".locks"))

    monkeypatch.setattr(adding, "_write", write_slowly)
    with pytest.raises(PoolError, match="another process has taken over memory://pool"):
        adding.add(*batch(3, 0), **({} if alone else {"batch": 0, "start": 0}))
    part.close()
    assert pool._lease is not None
    pool._lease.release()
    assert there.names("masks") and not there.names("parts")


def test_the_parts_of_several_killed_processes_are_given_up_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, there = RemotePool("memory://pool"), Store("memory://pool")
    there.write({f".locks/part-{rank:04}-x.json": b"{}" for rank in (1, 2, 10)})
    now = 1000.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    assert pool.part_is_held(1)
    assert not pool.part_is_held(3)
    while pool.part_is_held(1):
        now += lease._LOOK
    assert not pool.part_is_held(2)


def test_the_lock_of_a_process_that_has_ended_here_is_taken_at_once() -> None:
    owner = {**lease._this_process(), "process": 2**22 + 1}
    if owner["space"] is None:
        pytest.skip("knows the processes of this machine from /proc")
    Store("memory://pool").write({".locks/writer-1.json": json.dumps(owner).encode()})
    with RemotePool.resume("memory://pool", SETTINGS, NAMES) as pool:
        assert pool.records == []


def test_a_pause_of_the_watcher_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Store("memory://pool")
    there.write({".locks/writer-1.json": b"{}"})
    watch, now = lease.Watch(there), 1000.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    watch.look()
    now += 10 * lease.PATIENCE
    assert watch.look() == {".locks/writer-1.json": None}


@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (partial(RemotePool, "s3:/bucket"), "expected a URL such as s3://bucket/pool, got s3:/b"),
        (
            partial(RemotePool, Path("ftp://me:secret@host/x")),
            r"^expected a URL such as s3://bucket/pool, got ftp:/me:\*\*\*@host/x$",
        ),
        (
            partial(Pool, "ftp://me:se@ret@host/x"),
            r"got the URL ftp://me:\*\*\*@host/x, which is for RemotePool$",
        ),
        (partial(RemotePool, "what://x"), "what://x: opening it failed: Protocol not known: what"),
        (
            partial(RemotePool, "ftp://me:secret@127.0.0.1:1/x"),
            r"^ftp://me:\*\*\*@127.0.0.1:1/x: opening it failed: Connection refused$",
        ),
        (
            lambda: RemotePool("memory://none").settings,
            "^expected a pool in memory://none, got an empty or missing folder$",
        ),
    ],
)
def test_a_url_that_cannot_be_read_is_one_sentence(
    attempt: Callable[[], Any], sentence: str
) -> None:
    with pytest.raises(PoolError, match=sentence) as error:
        attempt()
    assert "\n" not in str(error.value)


def test_a_server_that_lists_files_outside_the_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = {"/pool/../../key": {"size": 1}, "/pool/settings.json": {"size": 1}}
    monkeypatch.setattr(Torn, "find", lambda *_, **__: found)
    with pytest.raises(PoolError, match=r"^torn://pool: listing it failed: .* \.\./key, which"):
        RemotePool("torn://pool").settings  # noqa: B018


def test_a_copy_is_made_of_pools_only_and_errors_say_the_url() -> None:
    Store("memory://thesis").write({"thesis.tex": b"precious"})
    with (
        pytest.raises(PoolError, match=r"^memory://thesis is not empty, and not a pool of"),
        local_copy("memory://thesis"),
    ):
        pass
    with (
        pytest.raises(PoolError, match=r"^expected a pool in memory://none, got an empty or"),
        local_copy("memory://none/") as copy,
    ):
        Pool(copy).settings  # noqa: B018


def test_no_command_prints_a_password(capsys: pytest.CaptureFixture[str]) -> None:
    with RemotePool.create("memory://me:secret@pool", SETTINGS, NAMES) as pool:
        add(pool, 0)
    with pytest.raises(typer.Exit):
        cli_pool.check("memory://me:secret@pool")
    cli_pool.report("memory://me:secret@pool")
    said = capsys.readouterr()
    assert "memory://me:***@pool" in said.out
    contents = b"".join(files_at("memory://me:secret@pool").values())
    assert "secret" not in said.out + said.err + contents.decode(errors="replace")


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        known_implementations,
        "needy",
        {"class": "no_such_package.System", "err": "Install no-such-package to access it"},
    )
    with pytest.raises(PoolError, match="needy://x: opening it failed: Install no-such-package"):
        RemotePool("needy://x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(PoolError, match=r"it needs fsspec: pip install 'smi-fast\[remote\]'"):
        RemotePool("memory://x")


def test_other_settings_and_foreign_files_are_refused() -> None:
    with RemotePool.create("memory://pool", SETTINGS, NAMES) as pool:
        add(pool, 0)
    before = files_at("memory://pool")
    Store("memory://thesis").write({"notes/thesis.tex": b"precious"})
    for url, attempt, sentence in (
        ("memory://pool", RemotePool.create, "^memory://pool is not empty: continue it with --re"),
        (
            "memory://pool",
            lambda url, _, names: RemotePool.resume(url, {**SETTINGS, "seed": 1}, names),
            "^memory://pool can't be resumed: it was made with seed = 0, now it is 1$",
        ),
        ("memory://thesis", RemotePool.resume, "^memory://thesis is not empty, and not a pool of"),
        (
            "memory://thesis",
            partial(RemotePool.create, overwrite=True),
            "^memory://thesis is not empty, and not a pool of this version",
        ),
    ):
        with pytest.raises(PoolError, match=sentence):
            attempt(url, SETTINGS, NAMES)
    assert files_at("memory://pool") == before
    assert files_at("memory://thesis") == {"notes/thesis.tex": b"precious"}


def test_a_pool_whose_process_was_killed_is_not_created_again() -> None:
    killed = RemotePool.create("memory://pool", SETTINGS, NAMES)
    add(killed, 0)
    assert killed._lease is not None
    killed._lease.release()
    with pytest.raises(PoolError, match=r"not empty.*--resume.*--overwrite"):
        RemotePool.create("memory://pool", {"seed": 7}, NAMES)
    with RemotePool.create("memory://pool", {"seed": 7}, NAMES, overwrite=True) as pool:
        assert pool.records == []
    assert set(files_at("memory://pool")) == ALWAYS


def test_overwrite_deletes_the_metadata_first_and_no_other_files(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/pool"
    with RemotePool.create(url, SETTINGS, NAMES) as pool:
        add(pool, 0)
    Store(url).write({"notes.txt": b"", "images/mine.png": b"", "images/0000/1.png": b""})
    with RemotePool.create(url, SETTINGS, NAMES, overwrite=True):
        pass
    assert set(files_at(url)) == {*ALWAYS, "notes.txt", "images/mine.png", "images/0000/1.png"}
    assert not (tmp_path / "pool/masks").exists()  # loaders refuse folders of no images


def test_resume_misses_a_file() -> None:
    with RemotePool.create("memory://pool", SETTINGS, NAMES) as pool:
        add(pool, 0)
    Store("memory://pool").delete(["masks/0001/000001.png"])
    with pytest.raises(PoolError, match=r"^memory://pool/masks/0001/000001.png is missing: put it"):
        RemotePool.resume("memory://pool", SETTINGS, NAMES)
    assert not [name for name in files_at("memory://pool") if name.startswith(".locks")]
