"""The control socket: whatever a client sends, it gets replies, and the daemon goes on.

An input is what the client sends before it closes its side. With descriptors sent along, the
first byte of the connection says how many.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import trio

from qsnapd.control import interface
from qsnapd.control.authorization import Access, Peer, Role
from qsnapd.control.methods import METHODS
from qsnapd.control.server import Server
from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.host import LocalHost
from qsnapd.store.layout import Store
from qsnapd.vm.spawn import Spawn
from tests.fuzz.mutating import spoil_bytes, spoil_json
from tests.fuzz.targets.target import Feed, Target, in_this_thread, scratch
from tests.unit.control_host import FakeHost, manifest

END_LIMIT_S = 10.0
"""By the clock: a client that has closed its side is done with."""
_ERRORS = {f"{interface.NAME}.{error.__name__}" for error in interface.error_classes()}
_SERVICE_ERRORS = {
    f"{interface.SERVICE}.{name}"
    for name in (
        *("InterfaceNotFound", "MethodNotFound", "MethodNotImplemented", "InvalidParameter"),
        "ExpectedMore",
    )
}


@contextmanager
def _open() -> Iterator[Feed]:
    """Before a daemon that knows two VMs and does all it is asked to."""
    with open("/dev/null", "rb") as null:
        descriptor = null.fileno()

        async def converse(data: bytes) -> None:
            await _converse(Server(FakeHost(), Access()), data, descriptor)

        yield lambda data: trio.run(converse, data)


async def _converse(server: Server, data: bytes, descriptor: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    replies = bytearray()
    with trio.fail_after(END_LIMIT_S):
        async with _stream(ours) as client, trio.open_nursery() as nursery:
            nursery.start_soon(server.handle, _stream(theirs))
            nursery.start_soon(_send, client, data, descriptor)
            with suppress(trio.BrokenResourceError):  # it was told why, and has more to say
                async for chunk in client:
                    replies += chunk
    *frames, rest = bytes(replies).split(b"\0")
    assert rest == b""
    for frame in frames:
        _require_reply(json.loads(frame))
    assert server._users == {}
    assert len(os.listdir("/proc/self/fd")) == before


# --- the same before a real daemon's VMs ------------------------------------------------------


class _Operator(Access):
    """Everybody may do all but name files."""

    def role(self, peer: Peer) -> Role:
        return Role.OPERATOR


class _World:
    """A store with two VMs that do not run, and snapshots of one of them."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        """*descriptor*: what comes along with calls."""
        self._descriptor = descriptor
        self._template, self._state = folder / "template", folder / "state"
        with Store(self._template) as store:
            one, _ = store.vm("vm1"), store.vm("vm2")
            for name, parent in (("s1", None), ("s2", "s1")):
                one.stage(name)
                plain = manifest(name, parent)
                one.commit(name, plain)
            one.set_current("s2")
        self._left = self._look(self._template)

    def feed(self, data: bytes) -> None:
        if not self._state.exists():
            shutil.copytree(self._template, self._state)
        trio.run(self._converse, data)
        if self._look(self._state) != self._left:
            shutil.rmtree(self._state)

    async def _converse(self, data: bytes) -> None:
        events = EventHub()
        with Store(self._state) as store:
            async with trio.open_nursery() as watching, trio.open_nursery() as jobs:
                fleet = Fleet(
                    *(store, events.publish, watching),
                    qemu_img="/nowhere/qemu-img",
                    clone_launcher=lambda source, clone: Spawn(),
                )
                for name in ("vm1", "vm2"):
                    fleet.add(name, self._state / f"{name}.qmp", Spawn(), configured=True)
                host = LocalHost(fleet, events, jobs, qemu_img="/nowhere/qemu-img")
                await _converse(Server(host, _Operator()), data, self._descriptor)
                jobs.cancel_scope.cancel()
                watching.cancel_scope.cancel()

    def _look(self, folder: Path) -> dict[str, int]:
        found = folder.rglob("*")
        return {str(p.relative_to(folder)): p.stat().st_size for p in found if p.name != ".lock"}


@contextmanager
def _open_host() -> Iterator[Feed]:
    with scratch() as folder, in_this_thread(), open("/dev/null", "rb") as null:
        yield _World(folder, null.fileno()).feed


# --- both -------------------------------------------------------------------------------------


def _stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


async def _send(client: trio.SocketStream, data: bytes, descriptor: int) -> None:
    count = data[0] % 4 if data[:1] > b"\xf0" else 0
    try:
        if count:
            await trio.lowlevel.checkpoint()
            socket.send_fds(client.socket._sock, [data[:1]], [descriptor] * count)  # type: ignore[attr-defined]
            data = data[1:]
        await client.send_all(data)
        await client.send_eof()
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # the server has had enough


def _require_reply(reply: object) -> None:
    assert isinstance(reply, dict)
    assert isinstance(reply["parameters"], dict)
    assert reply.keys() <= {"parameters", "error", "continues"}
    if "error" not in reply:
        return
    assert reply["error"] in _ERRORS | _SERVICE_ERRORS
    if reply["error"] in _ERRORS:
        assert reply["parameters"]["message"]
        assert reply["parameters"]["code"]


def _calls() -> list[dict[str, object]]:
    """Each method, with parameters that make sense."""
    given: dict[str, object] = {
        "vm": "vm1",
        "name": "s1",
        "new_name": "s9",
        "snapshot": "s1",
        "manifest": "{}",
        "directory": "/nowhere",
        "remove_storage": False,
    }
    requests: dict[str, dict[str, object]] = {
        "CreateSnapshot": {"name": "s3", "live": True, "disks": [{"target": "vda"}]},
        "CloneSnapshot": {"name": "s1", "clone": "vm3"},
        "ExportSnapshot": {"name": "s1", "directory": "/nowhere"},
        "ImportSnapshot": {"directory": "/nowhere"},
    }
    calls: list[dict[str, object]] = []
    for name, method in METHODS.items():
        parameters = {key: given[key] for key in method.model_fields if key in given}
        if "request" in method.model_fields:
            parameters["request"] = requests.get(name, {"name": "s1"})
        call: dict[str, object] = {"method": f"io.qsnapd.{name}", "parameters": parameters}
        calls.append(call | ({"more": True} if method.only_more else {}))
    service = f"{interface.SERVICE}.GetInterfaceDescription"
    calls.append({"method": service, "parameters": {"interface": "io.qsnapd"}})
    calls.append({"method": f"{interface.SERVICE}.GetInfo", "parameters": None})
    return calls


def _seeds() -> list[bytes]:
    frames = [json.dumps(call).encode() + b"\0" for call in _calls()]
    oneway = json.dumps(_calls()[2] | {"oneway": True}).encode() + b"\0"
    return [*frames, b"".join(frames[:6]), b"\xf5" + frames[0], oneway + frames[1], b"\0"]


def _spoil(data: bytes, random: Random) -> bytes:
    """Spoil the framing, or one of the calls."""
    if random.randrange(4) == 0:
        return spoil_bytes(data, random, (b"\0", b"\xf7", b'"more":true,', b'"oneway":true,'))
    frames = data.split(b"\0")
    number = random.randrange(len(frames))
    frames[number] = spoil_json(frames[number], random)
    return b"\0".join(frames)


TARGETS = (
    Target("control", _open, _seeds, _spoil, runs_long=60_000),
    Target("host", _open_host, _seeds, _spoil, runs_long=10_000, runs_short=100),
)
