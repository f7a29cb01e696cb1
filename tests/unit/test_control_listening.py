"""The listening socket: our own or systemd's, and never somebody else's."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qsnapd.control.authorization import Access
from qsnapd.control.listening import open_listener
from qsnapd.errors import ControlError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_rights_follow_the_groups(tmp_path: Path) -> None:
    for access, rights, gid in [
        (Access(), 0o600, os.getgid()),
        (Access(operator_gid=os.getgid()), 0o660, os.getgid()),
        (Access(operator_gid=0, reader_gid=os.getgid()), 0o660, os.getgid()),
    ]:
        path = tmp_path / "socket"
        async with open_listener(path, access):
            assert (mode(path), path.stat().st_gid) == (rights, gid)


async def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with open_listener(path, Access()):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


async def test_a_living_daemons_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with open_listener(path, Access()):
        with pytest.raises(ControlError, match="another daemon listens at"):
            open_listener(path, Access())
        assert path.is_socket()


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_text("precious")
    with pytest.raises(ControlError, match="no socket lies there"):
        open_listener(path, Access())
    assert path.read_text() == "precious"


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 120), tmp_path / "missing" / "socket"):
        with pytest.raises(ControlError, match="cannot listen at"):
            open_listener(path, Access())
    assert list(tmp_path.iterdir()) == []


ACTIVATED = """
import os, socket, sys
from pathlib import Path
import trio
from qsnapd.control.authorization import Access
from qsnapd.control.listening import open_listener

os.environ["LISTEN_PID"] = str(os.getpid())

async def main():
    listener = open_listener(Path("/nowhere/socket"), Access())
    assert not os.get_inheritable(listener.socket.fileno())
    assert "LISTEN_FDS" not in os.environ
    print(listener.socket.getsockname())

trio.run(main)
"""


def test_a_socket_from_systemd_is_used(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        shell = f'exec 3<&{fd}; exec "$0" -c "$1"'
        done = subprocess.run(
            ["bash", "-c", shell, sys.executable, ACTIVATED],
            env={**os.environ, "LISTEN_FDS": "1"},
            pass_fds=[fd],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    assert done.stdout.strip() == path


def test_a_socket_meant_for_another_process_is_not(tmp_path: Path) -> None:
    environment = {**os.environ, "LISTEN_FDS": "1"}
    code = ACTIVATED.replace("str(os.getpid())", "'1'")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "cannot listen at /nowhere/socket" in done.stderr
