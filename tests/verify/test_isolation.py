"""Work in processes of its own, started as on the CPU and as for CUDA."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from smi_fast.verify.isolation import Ended, messages

Send = Callable[[object], None]


def counts(send: Send, end: int) -> None:
    for number in range(end):
        send(number)


def fails(send: Send, how: str) -> None:
    send("began")
    if how == "raises":
        raise KeyError("a name")
    if how == "exits":
        os._exit(7)
    if how == "is killed":
        faulthandler.disable()  # the traceback of a planned crash says nothing
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_messages_come_in_order(device: str) -> None:
    assert list(messages(counts, 3, device=torch.device(device), limit=120)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("raises", "KeyError: 'a name'"),
        ("exits", "its process ended with exit code 7"),
        ("is killed", "its process was ended by SIGSEGV"),
    ],
)
def test_end_of_a_process_is_told(how: str, said: str) -> None:
    sent = messages(fails, how, device=torch.device("cpu"), limit=120)
    assert next(sent) == "began"
    with pytest.raises(Ended, match=f"^{said}$"):
        next(sent)


def test_process_that_hangs_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(Ended, match=r"^its process took longer than 15 s$"):
        list(messages(fails, "hangs", device=torch.device("cpu"), limit=15))
    assert time.monotonic() - start < 60
