"""The server on a real unix socket: what it answers, and whom it does not let hurt others."""

import errno
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.control import server as server_module
from qsnapd.control.authorization import Access, Peer, Role
from qsnapd.control.methods import METHODS
from qsnapd.control.wire import MAX_REQUEST_BYTES, MAX_SMALL_REQUEST_BYTES, PeerGone, Wire
from qsnapd.errors import ControlError, QsnapError, StoreFull
from qsnapd.model.job import Phase
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Manifest
from tests.fuzz.bounds import bounded
from tests.unit.control_host import GIB, FakeHost, Served

JSON = st.dictionaries(
    st.sampled_from(["vm", "request", "id", "name", "kinds"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)
INVALID = "org.varlink.service.InvalidParameter"


async def receive(stream: trio.SocketStream) -> dict[str, Any]:
    """Read one reply; the tests never have two under way unless they say so."""
    frame = bytearray()
    while not frame.endswith(b"\0"):
        chunk = await stream.receive_some(1)
        assert chunk, "the server closed the connection instead of answering"
        frame += chunk
    message: dict[str, Any] = json.loads(frame[:-1])
    return message


async def send(stream: trio.SocketStream, method: str, **rest: object) -> None:
    interface = "" if "." in method else "io.qsnapd."
    await stream.send_all(json.dumps({"method": interface + method, **rest}).encode() + b"\0")


async def ask(stream: trio.SocketStream, method: str, **parameters: object) -> dict[str, Any]:
    await send(stream, method, parameters=parameters)
    return await receive(stream)


async def test_answers_in_order_also_when_asked_all_at_once(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        await send(stream, "GetVm", parameters={"vm": "vm2"})
        await send(stream, "GetVm", parameters={"vm": "vm1"}, more=True)
        await send(stream, "GetCurrentSnapshot", parameters={"vm": "vm2"})
        assert (await receive(stream))["parameters"]["vm"]["name"] == "vm2"
        assert (await receive(stream))["parameters"]["vm"]["name"] == "vm1"
        assert (await receive(stream))["parameters"] == {"snapshot": None}


async def test_a_snapshot_is_its_manifest_and_its_place_in_the_tree(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        reply = await ask(stream, "ListSnapshots", vm="vm1")
    first, second = reply["parameters"]["snapshots"]
    assert set(first) == {*Manifest.model_fields, "current", "children", "descendants", "used_by"}
    assert (first["name"], first["current"], first["children"]) == ("s1", False, 1)
    assert (second["name"], second["current"], second["children"]) == ("s2", True, 0)


async def test_create_reports_the_job_until_the_snapshot_is_there(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        served.host.hurry = False
        request = {"name": "s3", "live": True, "image_format": None}
        await send(
            stream, "CreateSnapshot", parameters={"vm": "vm1", "request": request}, more=True
        )
        first = await receive(stream)
        assert (first["continues"], first["parameters"]["job"]["phase"]) == (True, "preparing")
        job = served.host.running
        assert job is not None
        job.move(Phase.SAVING, GIB // 2)
        second = await receive(stream)
        assert second["parameters"]["job"]["percent"] == 50
        job.move(Phase.DONE, GIB)
        last = await receive(stream)
    assert not last.get("continues")
    assert last["parameters"]["snapshot"]["name"] == "s3"
    assert served.host.requests == [CreateRequest(name="s3", live=True)]


async def test_a_job_outlives_the_client_that_started_it(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served:
        served.host.hurry = False
        async with await served.connect() as stream:
            await send(stream, "CreateSnapshot", parameters={"vm": "vm1"}, more=True)
            await receive(stream)
        async with await served.connect() as other:
            reply = await ask(other, "GetJob", vm="vm1")
            assert reply["parameters"]["job"]["phase"] == "preparing"
            aborted = await ask(other, "AbortJob", vm="vm1", id=7)
            assert aborted["parameters"]["job"]["id"] == 7
            ended = await ask(other, "GetJob", vm="vm1", completed=True)
            assert ended["parameters"]["job"]["phase"] == "cancelled"


async def test_abort_spares_a_job_that_began_since(tmp_path: Path) -> None:
    async with (
        Served.at(tmp_path) as served,
        await served.connect() as starter,
        await served.connect() as stream,
    ):
        served.host.hurry = False
        await send(starter, "CreateSnapshot", parameters={"vm": "vm1"}, oneway=True)
        await served.host.started.wait()
        reply = await ask(stream, "AbortJob", vm="vm1", id=6)
        assert reply["error"] == "io.qsnapd.WrongState"
        assert served.host.running is not None


async def test_the_error_of_a_job_is_the_last_reply(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        served.host.hurry = False
        await send(stream, "CreateSnapshot", parameters={"vm": "vm1"}, more=True)
        await receive(stream)
        served.host.abort("vm1")
        reply = await receive(stream)
    assert reply == {
        "error": "io.qsnapd.JobCancelled",
        "parameters": {
            "code": "job-cancelled",
            "message": "cancelled, and undone",
            "effect": "rolled-back",
        },
    }


async def test_errors_carry_their_typed_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(name: str) -> None:
        await trio.lowlevel.checkpoint()
        raise StoreFull("/s", needed_bytes=10, free_bytes=3)

    async with Served.at(tmp_path) as served, await served.connect() as stream:
        monkeypatch.setattr(served.host, "suspend", full)
        reply = await ask(stream, "Suspend", vm="vm1")
    assert reply["error"] == "io.qsnapd.StoreFull"
    assert (reply["parameters"]["needed_bytes"], reply["parameters"]["free_bytes"]) == (10, 3)


async def test_subscribe_says_when_it_listens_and_stops_with_the_client(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served:
        async with await served.connect() as stream:
            await send(stream, "Subscribe", parameters={"vm": "vm1"}, more=True)
            assert (await receive(stream))["parameters"] == {"event": None}
            await served.host.suspend("vm1")
            assert (await receive(stream))["parameters"]["event"]["event"] == "Suspended"
            assert served.host.listeners == 1
        while served.host.listeners:
            await trio.testing.wait_all_tasks_blocked()


@pytest.mark.parametrize(
    ("method", "parameters", "error", "about"),
    [
        ("Nonsense", {}, "org.varlink.service.MethodNotFound", "io.qsnapd.Nonsense"),
        ("io.other.List", {}, "org.varlink.service.InterfaceNotFound", "io.other"),
        ("org.varlink.service.Nonsense", {}, "org.varlink.service.MethodNotFound", "Nonsense"),
        ("GetVm", {}, INVALID, "vm"),
        ("GetVm", {"vm": 5}, INVALID, "vm"),
        ("GetVm", {"vm": "vm1", "x": 1}, INVALID, "x"),
        ("GetJob", {"vm": "vm1", "completed": "yes"}, INVALID, "completed"),
        (
            "CreateSnapshot",
            {"vm": "vm1", "request": {"strategy": "magic"}},
            INVALID,
            "request.strategy",
        ),
        (
            "CreateSnapshot",
            {"vm": "vm1", "request": {"name": "a/b"}},
            "io.qsnapd.BadRequest",
            "must not contain '/'",
        ),
        (
            "CreateSnapshot",
            {"vm": "vm1", "request": {"memory_file": "m"}},
            "io.qsnapd.BadRequest",
            "request.memory_file",
        ),
        (
            "CreateSnapshot",
            {"vm": "vm1", "request": {"precopy_limit_s": float("inf")}},
            "io.qsnapd.BadRequest",
            "infinite",
        ),
        (
            "CreateSnapshot",
            {"vm": "vm1", "request": {"name": "s1"}},
            "io.qsnapd.SnapshotExists",
            "s1",
        ),
        ("GetVm", {"vm": "vm9"}, "io.qsnapd.UnknownVm", "vm9"),
        ("GetSnapshot", {"vm": "vm1", "name": "s9"}, "io.qsnapd.UnknownSnapshot", "s9"),
        ("AbortJob", {"vm": "vm1"}, "io.qsnapd.WrongState", "no job"),
        ("Subscribe", {}, "org.varlink.service.ExpectedMore", ""),
    ],
)
async def test_refusals_name_what_is_wrong(
    tmp_path: Path, method: str, parameters: dict[str, Any], error: str, about: str
) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        reply = await ask(stream, method, **parameters)
        assert reply["error"] == error
        assert about in json.dumps(reply["parameters"])
        assert "parameters" in await ask(stream, "ListVms"), "the connection goes on"
        assert served.host.requests == []


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\0",
        b"\0",
        b"[]\0",
        b'{"method": 5}\0',
        b'{"parameters": {}}\0',
        b"\xff\xfe\0",
        b'{"method": "io.qsnapd.GetVm", "parameters": {"vm": "\\ud800"\0',
        b"[" * 100_000 + b"\0",
        b'{"method": "x", "parameters":' + b'{"a":' * 500 + b"1" + b"}" * 501 + b"\0",
        b'{"method": "x", "more": ' + b"9" * 5000 + b"}\0",
        b"x" * (MAX_REQUEST_BYTES + 2),
    ],
    ids=lambda garbage: garbage[:20].decode("latin1"),
)
async def test_nonsense_gets_an_error_and_a_closed_connection(
    tmp_path: Path, garbage: bytes
) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as bystander:
        async with await served.connect() as stream:
            await stream.send_all(garbage)
            assert (await receive(stream))["error"] == "io.qsnapd.ControlError"
            assert await stream.receive_some(1) == b""
        assert "parameters" in await ask(bystander, "ListVms")


@given(method=st.sampled_from(sorted(METHODS)), parameters=JSON)
def test_no_parameters_are_a_bug(method: str, parameters: dict[str, object]) -> None:
    frame = json.dumps({"method": f"io.qsnapd.{method}", "parameters": parameters, "more": True})
    with suppress(QsnapError, server_module._ServiceError):
        call = server_module._Call.parse(frame.encode())
        assert server_module._parse(call, server_module._method_of(call)) is not None


async def test_a_client_that_leaves_in_the_middle_hurts_nobody(tmp_path: Path) -> None:
    async with Served.at(tmp_path) as served, await served.connect() as bystander:
        async with await served.connect() as stream:
            await stream.send_all(b'{"method": "io.qs')
        async with await served.connect() as stream:
            await send(stream, "ListSnapshots", parameters={"vm": "vm1"})
            # gone before the reply: the server writes into a broken pipe
        assert "parameters" in await ask(bystander, "ListVms")


async def test_a_client_that_does_not_read_is_dropped(autojump_clock: object) -> None:
    ours, _theirs = trio.testing.memory_stream_pair()
    ours.send_stream.send_all_hook = trio.sleep_forever
    with pytest.raises(PeerGone):
        await Wire(ours).send({"parameters": {}})


async def test_a_message_has_a_deadline_and_so_has_silence(autojump_clock: object) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b'{"method"')
    with pytest.raises(ControlError, match="not complete after 10 s"):
        await Wire(ours).receive()
    ours, theirs = trio.testing.memory_stream_pair()
    started = trio.current_time()
    assert await Wire(ours).receive() is None
    assert trio.current_time() - started == pytest.approx(300)


async def test_a_hundred_connections_of_one_user_leave_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS_PER_USER", 40)
    async with Served.at(tmp_path) as served:
        streams = [await served.connect() for _ in range(100)]
        answers = [await _answer_or_refusal(stream) for stream in streams]
        assert answers.count("answered") == 40
        assert answers.count("refused") == 60
        for stream in streams:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        async with await served.connect() as stream:
            assert "parameters" in await ask(stream, "ListVms"), "room again"


async def _answer_or_refusal(stream: trio.SocketStream) -> str:
    with suppress(trio.BrokenResourceError):  # refused already; the reason can be read
        await send(stream, "ListVms")
    reply = await receive(stream)
    if reply.get("error") == "io.qsnapd.ControlError":
        assert "40 connections" in reply["parameters"]["message"]
        return "refused"
    return "answered"


async def test_a_bug_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def buggy(name: str) -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("nobody expected this")

    with pytest.RaisesGroup(LookupError, flatten_subgroups=True, allow_unwrapped=True):
        async with Served.at(tmp_path) as served, await served.connect() as stream:
            monkeypatch.setattr(served.host, "suspend", buggy)
            await send(stream, "Suspend", parameters={"vm": "vm1"}, more=True)
            await trio.sleep_forever()


async def test_a_failing_system_is_no_reason_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unlucky(name: str) -> None:
        await trio.lowlevel.checkpoint()
        raise OSError(errno.EIO, "Input/output error", "/vms/a.qcow2")

    async with Served.at(tmp_path) as served, await served.connect() as stream:
        monkeypatch.setattr(served.host, "suspend", unlucky)
        reply = await ask(stream, "Suspend", vm="vm1")
        assert reply["error"] == "io.qsnapd.StoreError"
        assert reply["parameters"]["message"] == "/vms/a.qcow2: Input/output error"
        assert "parameters" in await ask(stream, "ListVms")


async def test_only_an_admin_names_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Access, "role", lambda self, peer: Role.OPERATOR)
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        assert "error" not in await ask(stream, "CreateSnapshot", vm="vm1")
        for request in ({"memory_file": "/x"}, {"disks": [{"target": "vda", "file": "/x"}]}):
            reply = await ask(stream, "CreateSnapshot", vm="vm1", request=request)
            assert reply["error"] == "io.qsnapd.AccessDenied"
    assert len(served.host.requests) == 1


async def test_a_reader_looks_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Access, "role", lambda self, peer: Role.READER)
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        assert "error" not in await ask(stream, "ListVms")
        reply = await ask(stream, "Suspend", vm="vm1")
    assert reply["parameters"]["message"] == (
        "Suspend is for members of the operator group, and root"
    )


# --- one client cannot hurt another ------------------------------------------------------------


def as_user(monkeypatch: pytest.MonkeyPatch, uids: Iterator[int]) -> None:
    """Let each connection be of the next user; 0 is root."""
    monkeypatch.setattr(Peer, "of", lambda _: Peer(pid=1, uid=next(uids), groups=frozenset()))
    monkeypatch.setattr(
        Access, "role", lambda self, peer: Role.READER if peer.uid else Role.ADMIN
    )


async def test_root_gets_in_when_others_have_taken_all_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 20)
    as_user(monkeypatch, iter([*range(1, 22), 0]))
    async with Served.at(tmp_path) as served, AsyncExitStack() as stack:
        for _ in range(20):
            stream = await stack.enter_async_context(await served.connect())
            assert "parameters" in await ask(stream, "ListVms")
        refused = await stack.enter_async_context(await served.connect())
        assert "20 connections already" in str(await receive(refused))
        root = await stack.enter_async_context(await served.connect())
        assert "error" not in await ask(root, "ListVms")


async def test_who_cannot_ask_for_it_has_nothing_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, itertools.repeat(1))
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        reply = await ask(stream, "CreateSnapshot", vm=5, request={"nonsense": 1})
    assert reply["error"] == "io.qsnapd.AccessDenied"


async def test_only_root_sends_long_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_user(monkeypatch, iter([0, 1]))
    long = "x" * (MAX_SMALL_REQUEST_BYTES + 1)
    async with Served.at(tmp_path) as served:
        async with await served.connect() as root:
            assert "UnknownVm" in str(await ask(root, "GetVm", vm="x" * 100))
            assert "BadRequest" in str(await ask(root, "GetVm", vm=long))
        async with await served.connect() as other:
            assert "longer than 65536 bytes" in str(await ask(other, "GetVm", vm=long))


@pytest.mark.parametrize("item", [1, {}, [], "x"], ids=str)
async def test_a_request_that_is_wrong_at_every_place(tmp_path: Path, item: object) -> None:
    """To list what is wrong with it took seconds, and most of a GiB."""
    wrong = [item] * (MAX_REQUEST_BYTES // 8)
    async with Served.at(tmp_path) as served, await served.connect() as stream:
        with bounded(MAX_REQUEST_BYTES // 8):
            reply = await ask(stream, "CreateSnapshot", vm="vm1", request={"disks": wrong})
        assert reply["parameters"]["message"] == "a request must not hold more than 4096 values"
        fewer = {"disks": wrong[:4000]}
        assert "error" in await ask(stream, "CreateSnapshot", vm="vm1", request=fewer)
        assert "error" not in await ask(stream, "ListVms")


async def test_many_requests_of_one_user_begin_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of them there is room for somebody else's."""
    as_user(monkeypatch, iter([*[1] * 30, 2]))
    begun: list[str] = []

    def note(self: FakeHost, word: str) -> str:
        begun.append(word)
        return word

    async with Served.at(tmp_path) as served, AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await served.connect()) for _ in range(31)]
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(FakeHost, "name_of", note)
        for number, stream in enumerate(streams):  # all of them before the server has its turn
            call = b'{"method": "io.qsnapd.GetVm", "parameters": {"vm": "vm%d"}}\0'
            os.write(stream.socket.fileno(), call % (2 if number == 30 else 1))
        for stream in streams:
            await receive(stream)
    assert begun.count("vm1") == 30
    assert begun.index("vm2") < 5
