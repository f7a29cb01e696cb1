"""QEMU and the guest agent, as a guest that has taken them over would have them talk.

An input is what they send, line by line: answers when they are asked, all else at once. Then
they close their side.
"""

import json
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import pytest
import trio

from qsnapd.errors import AgentError, VmError
from qsnapd.model.state import Condition
from qsnapd.qmp import agent, agent_commands
from qsnapd.qmp.agent import AgentSession
from qsnapd.qmp.block import QueryJobs
from qsnapd.qmp.bridge import QmpBridge, open_bridge
from qsnapd.qmp.commands import QueryStatus, Stop
from qsnapd.qmp.migration import QueryMigrate
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.tracker import PauseWindow, Tracker
from tests.fuzz.mutating import is_text, spoil_bytes, spoil_json
from tests.fuzz.targets.target import Feed, Target

END_LIMIT_S = 20.0
"""By the clock, for a peer that has closed the connection: there is nothing to wait for."""
SILENCE_LIMIT_S = 0.02
WORD = b"@WORD@"
"""Stands for the number that the guest agent was asked to repeat."""
WORDS_LIMIT = 10_000
"""Characters, of what is told of a peer that talks nonsense."""


class _Peer:
    """The other end of a connection."""

    def __init__(self, sock: socket.socket, mark: bytes) -> None:
        """*mark*: what every request holds once."""
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._mark = mark
        self._received = b""

    async def talk(self, lines: list[bytes]) -> None:
        """Send *lines*, each that looks like an answer only when there is a request for it."""
        async with self._stream as stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                for line in lines:
                    word = await self._request() if b"return" in line or b"error" in line else b""
                    await stream.send_all(line.replace(WORD, word))
                await stream.send_eof()
                while await stream.receive_some():
                    pass

    async def _request(self) -> bytes:
        """Wait for the next request; the number in it, if there is one."""
        while self._mark not in self._received:
            received = await self._stream.receive_some()
            if not received:
                raise trio.BrokenResourceError
            self._received += received
        request, _, self._received = self._received.partition(self._mark)
        found = re.search(rb'"id": ?(\d+)', self._received)
        return found[1] if found else request[:0]


def _require_words(failure: Exception) -> None:
    assert str(failure)
    assert len(str(failure)) < WORDS_LIMIT


# --- QEMU ------------------------------------------------------------------------------------

COMMANDS = (QueryStatus, QueryMigrate, QueryJobs, Stop)


@contextmanager
def _open_qemu() -> Iterator[Feed]:
    """With commands that are given up soon: an answer that never comes is what many inputs are."""
    with pytest.MonkeyPatch.context() as patch:
        for command in COMMANDS:
            patch.setattr(command, "timeout_s", SILENCE_LIMIT_S)
        yield lambda data: trio.run(_meet_qemu, data.splitlines(keepends=True))


async def _meet_qemu(lines: list[bytes]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    with trio.fail_after(END_LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_Peer(theirs, b'"execute"').talk, lines)
            try:
                async with open_bridge(
                    ours, name="fuzz", greeting_limit_s=SILENCE_LIMIT_S
                ) as (bridge, _):
                    await _talk(bridge)
            except VmError as exc:
                _require_words(exc)
            nursery.cancel_scope.cancel()
    assert ours.fileno() == -1


async def _talk(bridge: QmpBridge) -> None:
    session, tracker, window = QmpSession(bridge), Tracker(lambda old, new: None), PauseWindow()
    session.listen(tracker.on_event)
    session.listen(window.note)
    with session.watch("STOP", "RESUME", "MIGRATION") as events:
        for command in COMMANDS:
            try:
                await session.execute(command())
            except VmError as exc:
                _require_words(exc)
        while True:
            try:
                event = events.receive_nowait()
            except trio.WouldBlock:
                break
            assert isinstance(event.name, str)
            assert isinstance(event.data, dict)
            assert is_text(event.data)
    assert isinstance(tracker.condition, Condition)
    assert 0 <= window.paused_ms < 1e18


def _conversations() -> list[bytes]:
    greeting = {"QMP": {"version": {"qemu": {"major": 10}, "package": ""}, "capabilities": ["oob"]}}
    stamp = {"seconds": 1_800_000_000, "microseconds": 5}
    answers: tuple[object, ...] = (
        {"status": "running", "running": True},
        {"status": "active", "ram": {"transferred": 1, "remaining": 2, "total": 3, "mbps": 1.5}},
        [{"id": "j", "type": "commit", "status": "ready", "current-progress": 1}],
        {},
    )
    events = [
        {"event": "MIGRATION", "data": {"status": "active"}, "timestamp": stamp},
        {"event": "STOP", "timestamp": stamp},
        {"event": "RESUME", "timestamp": stamp | {"seconds": 1_800_000_001}},
        {"event": "BLOCK_IO_ERROR", "data": {"action": "stop"}, "timestamp": stamp},
    ]
    lines: list[object] = [greeting, {"return": {}}]
    for number, answer in enumerate(answers):
        lines += [{"return": answer, "id": f"__qmp#{number:05d}"}, events[number]]
    refusal = {"error": {"class": "GenericError", "desc": "no"}, "id": "__qmp#00000"}
    return [
        b"".join(json.dumps(line).encode() + b"\n" for line in chosen)
        for chosen in (lines, [*lines[:2], refusal, *lines[4:8]], lines[:3])
    ]


# --- the guest agent -------------------------------------------------------------------------


@contextmanager
def _open_agent() -> Iterator[Feed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "SYNC_LIMIT_S", SILENCE_LIMIT_S)
        patch.setattr(agent_commands, "ANSWER_LIMIT_S", SILENCE_LIMIT_S)
        patch.setattr(agent_commands, "THAW_ANSWER_LIMIT_S", SILENCE_LIMIT_S)
        yield lambda data: trio.run(_meet_agent, data.splitlines(keepends=True))


async def _meet_agent(lines: list[bytes]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    session = AgentSession(Path("/agent"), ours)
    with trio.fail_after(END_LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_Peer(theirs, b'"execute"').talk, lines)
            try:
                await session.sync()
                for ask in (
                    agent_commands.is_frozen,
                    partial(agent_commands.freeze, limit_s=SILENCE_LIMIT_S),
                    agent_commands.read_filesystems,
                    agent_commands.thaw,
                ):
                    await _ask(session, ask)
            except AgentError as exc:
                _require_words(exc)
            finally:
                session.close()
            nursery.cancel_scope.cancel()


async def _ask(
    session: AgentSession, ask: Callable[[AgentSession], Awaitable[object]]
) -> None:
    try:
        found = await ask(session)
    except AgentError as exc:
        _require_words(exc)
        return
    for one in found if isinstance(found, tuple) else ():
        for words in (one.mountpoint, one.name, one.type, *one.devices):
            assert words.isprintable()
            assert len(words) < 1000


def _agents() -> list[bytes]:
    filesystem = {
        "name": "vda1",
        "mountpoint": "/",
        "type": "ext4",
        "used-bytes": 5,
        "total-bytes": 9,
        "disk": [{"dev": "/dev/vda", "bus-type": "virtio"}],
    }
    synced = b'\xff{"return": @WORD@}\n'
    answers = ("thawed", 2, [filesystem], 2, "thawed")
    whole = b"".join(json.dumps({"return": answer}).encode() + b"\n" for answer in answers)
    refusal = b'{"error": {"class": "GenericError", "desc": "not now"}}\n'
    return [synced + whole, b'{"return": 5}\n' + synced + refusal * 4, synced]


# --- both ------------------------------------------------------------------------------------


def _spoil(data: bytes, random: Random) -> bytes:
    """Spoil the lines, or what one of them says."""
    lines = data.split(b"\n")
    kind = random.randrange(4)
    if kind == 0:
        return spoil_bytes(data, random, (b"\n", b'"__qmp#00000"', b'{"event":"STOP"}\n', WORD))
    number = random.randrange(len(lines))
    if kind == 1:
        other = random.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    else:
        lines[number] = spoil_json(lines[number], random)
    return b"\n".join(lines)


TARGETS = (
    Target("qemu", _open_qemu, _conversations, _spoil, runs_long=15_000, runs_short=200),
    Target("agent", _open_agent, _agents, _spoil, runs_long=30_000, runs_short=200),
)
