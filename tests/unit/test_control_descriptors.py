"""Descriptors sent along with calls: used by those who want one, closed by all others."""

import array
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from qsnapd.control.client import Client
from qsnapd.control.wire import Wire
from qsnapd.model.transfer import ExportRequest, ImportRequest
from tests.unit.control_host import Served
from tests.unit.test_control_server import ask, receive


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:  # the test has closed it
            continue


async def open_descriptors(stream: trio.SocketStream) -> int:
    """How many this process has, once the server is done with all that *stream* asked for."""
    await ask(stream, "GetVm", vm="vm1")
    return len(os.listdir("/proc/self/fd"))


async def send_with(
    stream: trio.SocketStream,
    descriptors: Iterable[int],
    method: str,
    *,
    more: bool = True,
    **parameters: object,
) -> None:
    call = {"method": f"io.qsnapd.{method}", "parameters": parameters, "more": more}
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    await stream.socket.sendmsg([json.dumps(call).encode() + b"\0"], [rights])


async def last_reply(stream: trio.SocketStream) -> dict[str, Any]:
    while (reply := await receive(stream)).get("continues"):
        pass
    return reply


async def test_export_gets_the_clients_descriptor(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        request = {"name": "s1", "chained": True}
        await send_with(stream, [writer], "ExportSnapshot", vm="vm1", request=request)
        reply = await last_reply(stream)
        os.close(writer)
        assert os.read(reader, 100) == b"stream"
        assert os.read(reader, 100) == b"", "the daemon has closed its copy"
    [file] = reply["parameters"]["files"]
    assert file["name"] == "memory.img"
    assert served.host.transfers == [ExportRequest(name="s1", chained=True)]


async def test_import_gets_it_too(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.write(writer, b"a tar stream")
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        await send_with(stream, [reader], "ImportSnapshot", vm="vm1", request={"name": "new"})
        reply = await last_reply(stream)
    assert reply["parameters"]["snapshot"]["name"] == "new"
    assert reply["parameters"]["notes"] == ["a note"]
    assert served.host.read == [b"a tar stream"]
    assert served.host.transfers == [ImportRequest(name="new")]


@pytest.mark.parametrize("count", [1, 2, 30, 253])
async def test_what_nobody_wants_is_closed(
    tmp_path: Path, pipe: tuple[int, int], count: int
) -> None:
    reader, writer = pipe
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        before = await open_descriptors(stream)
        for _ in range(3):
            await send_with(stream, [writer] * count, "GetVm", more=False, vm="vm2")
            assert (await receive(stream))["parameters"]["vm"]["name"] == "vm2"
        assert await open_descriptors(stream) == before
        os.close(writer)
        assert os.read(reader, 1) == b"", "no copy is left anywhere"


async def test_only_one_reaches_a_call(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    other = os.open(os.devnull, os.O_RDWR)
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        before = await open_descriptors(stream)
        sent = [writer, other, other]
        await send_with(stream, sent, "ExportSnapshot", vm="vm1", request={"name": "s1"})
        await last_reply(stream)
        assert os.read(reader, 100) == b"stream"
        assert await open_descriptors(stream) == before
    os.close(other)


async def test_one_that_comes_during_a_call_is_closed(
    tmp_path: Path, pipe: tuple[int, int]
) -> None:
    reader, writer = pipe
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        await send_with(stream, [], "Subscribe", vm="vm1")
        await receive(stream)
        for _ in range(5):
            await send_with(stream, [writer], "GetVm", vm="vm1")
        served.host.publish("Suspended", "Paused")
        await receive(stream)
    os.close(writer)
    with trio.fail_after(5):
        assert await trio.to_thread.run_sync(os.read, reader, 1) == b""


async def test_client_that_leaves_ends_its_export(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    async with Served.at(tmp_path) as served:
        served.host.go_on = trio.Event()
        async with await served.connect() as stream:
            await send_with(stream, [writer], "ExportSnapshot", vm="vm1", request={"name": "s1"})
            progress = (await receive(stream))["parameters"]["progress"]
            assert progress == {"step": "memory", "done_bytes": 1, "total_bytes": 2}
        os.close(writer)
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(os.read, reader, 100) == b"stream"
            assert await trio.to_thread.run_sync(os.read, reader, 100) == b""


async def test_nonsense_with_a_descriptor_leaves_nothing(
    tmp_path: Path, pipe: tuple[int, int]
) -> None:
    reader, writer = pipe
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))
        await stream.socket.sendmsg([b"no json\0"], [rights])
        assert (await receive(stream))["error"] == "io.qsnapd.ControlError"
        os.close(writer)
        with trio.fail_after(5):
            assert await trio.to_thread.run_sync(os.read, reader, 1) == b""


async def test_transfers_are_for_admins_who_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        reply = await ask(stream, "ExportSnapshot", vm="vm1", request={"name": "s1"})
        assert reply["error"] == "org.varlink.service.ExpectedMore"
        monkeypatch.setattr("os.geteuid", lambda: 12345)
        monkeypatch.setattr("qsnapd.control.authorization.Access.role", lambda self, peer: 2)
        await send_with(stream, [], "ImportSnapshot", vm="vm1", request={})
        assert (await receive(stream))["error"] == "io.qsnapd.AccessDenied"
    assert served.host.transfers == []


async def test_wire_closes_what_nobody_took(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    ours, theirs = trio.socket.socketpair()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [writer]))
    async with trio.SocketStream(ours) as stream, trio.SocketStream(theirs) as peer:
        with Wire(stream, takes_descriptors=True) as wire:
            await peer.socket.sendmsg([b"{}\0"], [rights])
            assert await wire.receive() == b"{}"
        os.close(writer)
        assert os.read(reader, 1) == b""


async def test_the_synchronous_client_sends_one(tmp_path: Path, pipe: tuple[int, int]) -> None:
    reader, writer = pipe

    def export(path: Path) -> dict[str, Any]:
        with Client(path) as client:
            call = client.stream(
                "ExportSnapshot", descriptor=writer, vm="vm1", request={"name": "s1"}
            )
            return list(call)[-1]

    async with Served.at(tmp_path) as served:
        reply = await trio.to_thread.run_sync(export, served.path)
    assert reply["files"][0]["name"] == "memory.img"
    assert os.read(reader, 100) == b"stream"
