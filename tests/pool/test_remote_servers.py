"""Pools on real servers: FTP, and S3 and SFTP where their packages are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from smi_fast.pool import Pool, PoolError, lease
from smi_fast.pool.pictures import draw_sheet
from smi_fast.pool.remote import RemotePool, local_copy
from smi_fast.pool.store import Store
from tests.helpers.pools import NAMES, SETTINGS, batch, files
from tests.helpers.stores import files_at, ftp_server, s3_server, sftp_server

# The packages that each needs, of the server and of fsspec.
SERVERS = {
    "ftp": (ftp_server, "pyftpdlib"),
    "sftp": (sftp_server, "asyncssh paramiko"),
    "s3": (s3_server, "moto.server s3fs"),
}


@pytest.fixture(scope="module", params=SERVERS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    serve, packages = SERVERS[request.param]
    for package in packages.split():
        pytest.importorskip(package)
    with serve(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def url(server: str, request: pytest.FixtureRequest) -> str:
    """A place of its own for each test."""
    return f"{server}/{request.function.__name__}/pool"


def add(pool: Pool, seed: int) -> None:
    loss = {"stops": [], "history": {"l": [1.0]}}
    pool.add(*batch(3, seed), loss=loss, seconds=1.0)


def test_the_files_are_those_of_a_pool_in_a_folder(url: str, tmp_path: Path) -> None:
    with Pool.create(tmp_path / "here", SETTINGS, NAMES) as here:
        for seed in range(3):
            add(here, seed)
        here.add_unfinished(batch(2)[0])
        draw_sheet(here)
    killed = RemotePool.create(url, SETTINGS, NAMES)
    add(killed, 0)
    add(killed, 1)
    assert killed._lease is not None
    killed._lease.release()  # and no close()
    Store(url).write({"images/0001/000007.png": b"of a batch that was not complete"})
    assert RemotePool(url).records == []
    with RemotePool.resume(url, SETTINGS, NAMES) as there:
        assert len(there.records) == 6
        add(there, 2)
        there.add_unfinished(batch(2)[0])
        draw_sheet(there)
    assert files_at(url) == files(tmp_path / "here")
    with local_copy(url) as copy:
        assert files(copy) == files(tmp_path / "here")
    with RemotePool.resume(url, SETTINGS, NAMES) as there:
        assert len(there.records) == 9
    assert files_at(url) == files(tmp_path / "here")


def test_a_second_writer_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEWAL", 0.1)
    with RemotePool.create(url, SETTINGS, NAMES) as pool:
        with pytest.raises(PoolError, match=r"^another process adds images to \S+/pool$"):
            RemotePool.resume(url, SETTINGS, NAMES)
        add(pool, 0)
    with RemotePool.create(url, {"seed": 7}, NAMES, overwrite=True) as pool:
        assert pool.records == []
    assert set(files_at(url)) == {"settings.json", "classes.txt", "README.md"}


def test_a_place_that_takes_no_files_is_one_sentence(server: str) -> None:
    """A reader's account, a folder that nobody may write to, a bucket that doesn't exist."""
    url = {
        "ftp": server.replace("user", "reader") + "/denied",
        "sftp": "sftp://nobody:wrong@" + server.partition("@")[2] + "/denied",
        "s3": "s3://missing-bucket/pool",
    }[server.partition(":")[0]]
    with pytest.raises(PoolError, match=r"(writing|opening it|listing it) failed: \S") as error:
        RemotePool.create(url, SETTINGS, NAMES)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    print(error.value)
