"""Clients that mean harm: of another user where that can be, each in a process of its own.

python -m tests.fuzz.attackers ATTACK SOCKET    tells how it goes, a line of JSON each time

Plain sockets and loops. It gives up root when all is read that another user may not read.
"""

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

IS_ROOT = os.geteuid() == 0
NOBODY = 65534
ASK = json.dumps({"method": "io.qsnapd.ListVms"}).encode() + b"\0"
HEAVY = (
    b'{"method":"io.qsnapd.CreateSnapshot","parameters":{"vm":"vm1","request":{"disks":['
    + b",".join([b"[]"] * 20_000)
    + b"]}}}\0"
)
"""As long as a request of somebody else than root may be, and wrong at every place."""
CONNECT_LIMIT_S = 20.0
READ_LIMIT_S = 30.0

Tell = Callable[[object], None]


@contextmanager
def attacking(control: Path, attack: Callable[[Path, Tell], None]) -> Iterator[Callable[[], Any]]:
    """Have *attack* going on as another user; returns what waits for the next that it tells."""
    command = [sys.executable, "-m", "tests.fuzz.attackers", attack.__name__, str(control)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as attacker:
        told = attacker.stdout
        assert told is not None
        try:
            yield lambda: json.loads(told.readline())
        finally:
            attacker.kill()


def _become_another() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if IS_ROOT:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def connect(control: Path) -> socket.socket:
    """Connect, however long the queue is."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline_s = time.monotonic() + CONNECT_LIMIT_S
    sock.setblocking(False)
    while True:
        try:
            sock.connect(str(control))
            return sock
        except BlockingIOError:  # a queue that is full
            if time.monotonic() > deadline_s:
                raise
            select.select([], [], [], 0.001)


def read_reply(sock: socket.socket) -> bytes | None:
    """The next reply, or what there is of it; None if there is none."""
    sock.settimeout(READ_LIMIT_S)
    said = b""
    while not said.endswith(b"\0"):
        try:
            received = sock.recv(65536)
        except ConnectionResetError:
            received = b""
        if not received:
            return said or None
        said += received
    return said


def be_a_thousand(control: Path, tell: Tell) -> None:
    """Open a thousand connections, ask on each, and keep them all."""
    socks = [connect(control) for _ in range(1000)]
    answers = []
    for sock in socks:
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.setblocking(True)
            sock.sendall(ASK)
        reply = read_reply(sock)
        answers.append("gone" if reply is None else json.loads(reply[:-1]).get("error", "answered"))
    tell({answer: answers.count(answer) for answer in answers})
    signal.pause()


def ask_too_much(control: Path, tell: Tell) -> None:
    """Send heavy nonsense on as many connections as there may be, without an end."""
    poll = select.poll()
    socks = {sock.fileno(): sock for sock in (connect(control) for _ in range(60))}
    unsent = dict.fromkeys(socks, b"")
    for fd in socks:
        poll.register(fd, select.POLLIN | select.POLLOUT)
    tell("begun")
    while True:
        for fd, events in poll.poll():
            try:
                if events & select.POLLIN:
                    socks[fd].recv(1 << 20)
                if events & select.POLLOUT:
                    rest = unsent[fd] or HEAVY
                    unsent[fd] = rest[socks[fd].send(rest) :]
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                poll.unregister(fd)


def _ask_half(sock: socket.socket) -> None:
    sock.send(ASK[:-1])
    sock.shutdown(socket.SHUT_WR)


def come_and_go(control: Path, tell: Tell) -> None:
    """Connect, again and again, and leave in every way there is."""
    tell("begun")
    ways: tuple[Callable[[socket.socket], object], ...] = (
        lambda sock: None,
        lambda sock: sock.send(b'{"method": "io.qs'),
        lambda sock: sock.send(ASK),  # gone before the reply
        lambda sock: (sock.send(ASK * 100), sock.recv(10)),  # in the middle of one
        lambda sock: (sock.send(b"x" * 100_000), sock.recv(10)),
        _ask_half,
    )
    while True:
        for way in ways:
            with connect(control) as sock, suppress(OSError):
                way(sock)


ATTACKS: dict[str, Callable[[Path, Tell], None]] = {
    attack.__name__: attack for attack in (be_a_thousand, ask_too_much, come_and_go)
}

if __name__ == "__main__":
    _become_another()
    ATTACKS[sys.argv[1]](Path(sys.argv[2]), lambda what: print(json.dumps(what), flush=True))
