"""The client of the command line, when others are in its way."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnapd.control.client import Client
from qsnapd.errors import ControlError

REFUSAL = (
    b'{"error": "io.qsnapd.ControlError", "parameters": '
    b'{"code": "control", "message": "there are 256 connections already", "effect": "none"}}\0'
)
ANSWER = b'{"parameters": {"vms": []}}\0'


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """With a queue that one client fills."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "sock"))
        listener.listen(0)
        first.connect(str(tmp_path / "sock"))
        yield listener


def test_waits_its_turn_in_a_queue_that_is_full(listener: socket.socket, tmp_path: Path) -> None:
    def serve() -> None:
        time.sleep(0.2)  # for the client to find the queue full, whatever it does then
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(ANSWER)

    serving = threading.Thread(target=serve)
    serving.start()
    with Client(tmp_path / "sock") as client:
        assert client.call("ListVms") == {"vms": []}
    serving.join()


def test_hears_why_it_is_not_served(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        with Client(tmp_path / "sock") as client:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(REFUSAL)
            with pytest.raises(ControlError, match="there are 256 connections already"):
                client.call("ListVms")
            with pytest.raises(ControlError, match="closed the connection"):
                client.call("ListVms")


def test_does_not_wait_for_ever(listener: socket.socket, tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(ControlError, match="too many clients are waiting to be let in"):
        Client(tmp_path / "sock", reply_limit_s=0.3)
    assert 0.2 < time.monotonic() - began_s < 10
