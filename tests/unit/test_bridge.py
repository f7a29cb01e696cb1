"""A QEMU that talks nonsense: its session ends in words, in time, and nothing else does."""

import json
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio

from qsnapd.errors import CommandRefused, SessionLost, UnexpectedReply, VmError
from qsnapd.qmp.bridge import QmpBridge, open_bridge
from qsnapd.qmp.commands import QueryStatus
from qsnapd.qmp.session import QmpSession
from qsnapd.qmp.transport import QmpEvent

GREETING = b'{"QMP": {"version": {"qemu": {"major": 10}, "package": ""}, "capabilities": []}}\n'
READY = b'{"return": {}}\n'
DEEP = b"[" * 900 + b"]" * 900
TIME_LIMIT_S = 20.0


async def talk(sock: socket.socket, lines: Sequence[bytes]) -> None:
    """Greet, and answer each request with the next of *lines*."""
    async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
        with suppress(trio.BrokenResourceError):
            for line in lines:
                await stream.send_all(line)
                if not await stream.receive_some():
                    return
            await trio.sleep_forever()


@asynccontextmanager
async def bridged(*lines: bytes) -> AsyncIterator[QmpBridge]:
    """Connected to a QEMU that says *lines* once it has greeted."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    with trio.fail_after(TIME_LIMIT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, theirs, (GREETING, READY, *lines))
            try:
                async with open_bridge(ours, name="vm1") as (bridge, _):
                    yield bridge
            finally:
                nursery.cancel_scope.cancel()


def only(caught: "pytest.ExceptionInfo[BaseException]") -> BaseException:
    failure: BaseException = caught.value
    while isinstance(failure, BaseExceptionGroup):
        [failure] = failure.exceptions
    return failure


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        b'{"error": {"a": ' + DEEP + b"}}",
        b'{"id": [], "return": {}}',
        b"[]",
        b"5",
        b"{",
        b"\xff",
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"return": "\\ud800", "id": "__qmp#00000"}',
        b'{"return": "\xed\xa0\x80", "id": "__qmp#00000"}',
        b"x" * (11 << 20),
    ],
    ids=lambda line: line[:24].decode("latin1"),
)
async def test_nonsense_ends_the_session(line: bytes) -> None:
    with pytest.RaisesGroup(SessionLost, flatten_subgroups=True, allow_unwrapped=True) as caught:
        async with bridged(line + b"\n") as bridge:
            await bridge.execute("stop", {}, timeout_s=TIME_LIMIT_S)
    assert len(str(only(caught))) < 1000


async def test_no_depth_of_nonsense_ends_the_reader_unnoticed() -> None:
    """One that can be parsed, but not spelled out again for the library's own account of it.

    From Python 3.12 on, parsing has a limit of its own, far beyond.
    """
    for depth in (*range(900, 1000, 5), 1_200, 2_000, 5_000, 9_000):
        line = b'{"error": ' + b"[" * depth + b"]" * depth + b"}\n"
        began_s = trio.current_time()
        with pytest.RaisesGroup(SessionLost, flatten_subgroups=True, allow_unwrapped=True):
            async with bridged(line) as bridge:
                await bridge.execute("stop", {}, timeout_s=TIME_LIMIT_S)
        assert trio.current_time() - began_s < TIME_LIMIT_S / 2, depth


@pytest.mark.parametrize(
    "reply",
    [{"id": "__qmp#00000"}, {"id": "__qmp#00000", "error": 5}, {"id": "__qmp#00000", "error": {}}],
    ids=str,
)
async def test_neither_a_result_nor_an_error(reply: dict[str, Any]) -> None:
    async with bridged(json.dumps(reply).encode() + b"\n") as bridge:
        with pytest.raises(UnexpectedReply, match="QEMU's reply to query-status is not underst"):
            await bridge.execute("query-status", {}, timeout_s=5.0)


@pytest.mark.parametrize(
    "returned",
    [[1] * 300_000, {"status": 5, "running": []}, {"status": "x" * 1_000_000, "running": "?"}],
    ids=["a long list", "wrong types", "a long word"],
)
async def test_a_result_of_other_types(returned: object) -> None:
    line = json.dumps({"id": "__qmp#00000", "return": returned}).encode()
    async with bridged(line + b"\n") as bridge:
        with pytest.raises(UnexpectedReply) as caught:
            await QmpSession(bridge).execute(QueryStatus())
    assert len(str(caught.value)) < 1000


async def test_a_refusal_is_told_in_one_line() -> None:
    error = {"class": "GenericError", "desc": "no\n\x1b[2J" + "y" * 1_000_000}
    line = json.dumps({"id": "__qmp#00000", "error": error}).encode()
    async with bridged(line + b"\n") as bridge:
        with pytest.raises(CommandRefused, match=r"QEMU refused x: no\?\?\[2Jyyy") as caught:
            await bridge.execute("x", {}, timeout_s=5.0)
    assert len(str(caught.value)) < 3000
    assert caught.value.error_class == "GenericError"


@pytest.mark.parametrize(
    "lines",
    [(b"hello\n",), (b'{"QMP": 5}\n',), (DEEP + b"\n",), (b"x" * (11 << 20),), (GREETING, b"[]\n")],
    ids=["no JSON", "no greeting", "deep", "long", "no answer"],
)
async def test_who_does_not_speak_qmp_is_told_so(lines: Sequence[bytes]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    with pytest.RaisesGroup(VmError, flatten_subgroups=True, allow_unwrapped=True) as caught:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, theirs, lines)
            async with open_bridge(ours, name="vm1"):
                pass
    assert "does not speak QMP" in str(only(caught))
    assert len(str(only(caught))) < 1000


async def test_a_qemu_that_ends_right_after_its_greeting() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.sendall(GREETING + READY + b"\n")  # and nonsense, before anybody can look
    with theirs, pytest.raises(SessionLost, match="ended right after QEMU's greeting"):
        async with open_bridge(ours, name="vm1"):
            pass


async def test_events_that_are_none_are_passed_over() -> None:
    stamp = {"seconds": 1_800_000_000, "microseconds": 250_000}
    events: list[object] = [
        {"event": 5, "timestamp": stamp},
        {"event": "STOP", "data": [], "timestamp": stamp},
        {"event": "STOP", "data": {"a": 1}, "timestamp": stamp},
        {"event": "RESUME", "timestamp": {"seconds": -1, "microseconds": -1}},
        {"event": "WAKEUP", "timestamp": {"seconds": 10**400, "microseconds": 0}},
        {"event": "RESET", "timestamp": "now"},
        {"return": {"status": "running", "running": True}, "id": "__qmp#00000"},
    ]
    seen: list[QmpEvent] = []
    async with bridged(b"".join(json.dumps(event).encode() + b"\n" for event in events)) as bridge:
        bridge.listen(seen.append)
        assert (await QmpSession(bridge).execute(QueryStatus())).running
    assert [event.name for event in seen] == ["STOP", "RESUME", "WAKEUP", "RESET"]
    assert (seen[0].data, seen[0].at_s) == ({"a": 1}, 1_800_000_000.25)
    assert all(1.7e9 < event.at_s < 1e10 for event in seen), "else they happened now"


async def test_replies_that_nobody_waits_for_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stray = b'{"return": {}, "id": "' + b"x" * 1000 + b'"}\n'
    answer = b'{"return": {"status": "running", "running": true}, "id": "__qmp#00000"}\n'
    with caplog.at_level(logging.INFO):
        async with bridged(stray * 1000 + answer) as bridge:
            assert (await QmpSession(bridge).execute(QueryStatus())).running
    assert caplog.records == []


