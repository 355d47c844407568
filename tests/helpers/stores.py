"""Files at URLs: in memory, where a test can tear them, and on real servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from smi_fast.pool import SECONDS


def files_at(url: str) -> dict[str, bytes]:
    """Every file below a URL by its relative name, but the times and what fsspec keeps locally."""
    system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    found = system.find(root)
    contents = system.cat(found) if found else {}
    names = {name.removeprefix(root.rstrip("/") + "/"): text for name, text in contents.items()}
    return {name: text for name, text in names.items() if name != SECONDS}


class Torn(MemoryFileSystem):
    """Files in memory, of which some writes are torn or fail, and that notes each write.

    A folder is deleted with all that is in it, as on ``hdfs://``.

    Attributes:
        trouble: an error, or the number of bytes that stay, by the write's number; then none.
        written: the names in the order of their writes.
    """

    protocol = "torn"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    trouble: dict[int, int | Exception] = {}  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.removeprefix("torn://"))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        number = len(self.written)
        self.written.append(path)
        trouble = self.trouble.get(number)
        if isinstance(trouble, Exception):
            raise trouble
        super().pipe_file(path, value[:trouble], mode, **kwargs)

    def rmdir(self, path: str) -> None:
        inside = f"{self._strip_protocol(path)}/"
        for name in [name for name in self.store if name.startswith(inside)]:
            del self.store[name]
        super().rmdir(path)


fsspec.register_implementation("torn", Torn, clobber=True)


@contextmanager
def ftp_server(folder: Path) -> Iterator[str]:
    """The URL of a server of pyftpdlib for this folder."""
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    class Handler(FTPHandler):
        authorizer = DummyAuthorizer()

    Handler.authorizer.add_user("user", "secret", str(folder), perm="elradfmwMT")
    Handler.authorizer.add_user("reader", "secret", str(folder), perm="elr")
    server = ThreadedFTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"ftp://user:secret@127.0.0.1:{server.address[1]}"
    finally:
        server.close_all()
        thread.join(timeout=10)


@contextmanager
def sftp_server(folder: Path) -> Iterator[str]:
    """The URL of a server of asyncssh for this folder."""
    import asyncio

    import asyncssh

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return username != "user"

    async def listen() -> Any:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            server_factory=Server,
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(folder).encode()),
        )

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    try:
        yield f"sftp://user:secret@127.0.0.1:{server.get_port()}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The URL of a bucket of moto's server, which holds it in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"endpoint_url": f"http://{host}:{port}", "key": "user", "secret": "secret"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fsspec.config.conf, "s3", options)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        try:
            yield "s3://bucket"
        finally:
            server.stop()
