"""The server's side of one connection: requests in, replies out, in order.

Foreseeable failures are replies. Anything else is a bug and leaves the nursery.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Never, Self

import trio
from pydantic import BaseModel, ConfigDict, ValidationError

import qsnapd
from qsnapd.control import interface
from qsnapd.control.authorization import Access, Peer, Role, require
from qsnapd.control.host import Host
from qsnapd.control.methods import METHODS
from qsnapd.control.methods.base import Method
from qsnapd.control.wire import (
    MAX_REQUEST_BYTES,
    MAX_SMALL_REQUEST_BYTES,
    Message,
    PeerGone,
    Wire,
)
from qsnapd.errors import BadRequest, ControlError, QsnapError, StoreError
from qsnapd.model.base import Frozen

MAX_CONNECTIONS = 256
"""Of all who are neither root nor the daemon's own user: these have room in any case."""
MAX_CONNECTIONS_PER_USER = 64
VALUES_LIMIT = 4096
"""In one request. Some hundred are what a VM with many disks takes; each one that is wrong costs
time and memory, though only the first is told."""

_ERROR_FIELDS: dict[type, list[str]] = {
    error: list(interface.error_fields(error)) for error in interface.error_classes()
}

log = logging.getLogger(__name__)


class _Call(BaseModel):
    """One request, as Varlink frames it. Members it may add later are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    method: str
    parameters: dict[str, object] | None = None
    more: bool | None = None
    oneway: bool | None = None
    upgrade: bool | None = None

    @classmethod
    def parse(cls, frame: bytes) -> Self:
        try:
            return cls.model_validate_json(frame)
        except ValidationError as exc:
            raise ControlError("the request is not a Varlink call") from exc


class _ServiceError(Exception):
    """An error that Varlink itself defines."""

    def __init__(self, name: str, **parameters: object) -> None:
        super().__init__(name)
        self.reply: Message = {"error": f"{interface.SERVICE}.{name}", "parameters": parameters}


@dataclass
class _User:
    """Who is at the other end of some connections, for as long as there are any."""

    is_admin: bool
    connections: int = 0
    turn: trio.Lock = field(default_factory=trio.Lock)

    async def wait_turn(self) -> None:
        """Let one request of this user begin at a time, and others' in between.

        To parse one, or to spell out a long answer, takes milliseconds in which nobody else is
        served. So somebody with many connections waits for himself, and not everybody for him.
        """
        async with self.turn:
            await trio.lowlevel.checkpoint()


class Server:
    """Answers clients on behalf of one host. Lives as long as the daemon."""

    def __init__(self, host: Host, access: Access) -> None:
        self._host = host
        self._access = access
        self._users = dict[int, _User]()

    async def handle(self, stream: trio.SocketStream) -> None:
        """Serve one client until it leaves, rests for too long or talks nonsense.

        Made for `trio.serve_listeners`. Jobs that the client started go on after it.
        """
        peer = Peer.of(stream.socket)
        is_admin = self._access.role(peer) >= Role.ADMIN
        limit_bytes = MAX_REQUEST_BYTES if is_admin else MAX_SMALL_REQUEST_BYTES
        wire = Wire(stream, max_request_bytes=limit_bytes, takes_descriptors=is_admin)
        user = self._users.setdefault(peer.uid, _User(is_admin))
        user.connections += 1
        try:
            async with stream:
                with wire:
                    await self._converse(wire, peer, user)
        except* PeerGone:  # star: a call with "more" runs in a nursery
            pass  # what it asked for goes on
        finally:
            user.connections -= 1
            if not user.connections:
                del self._users[peer.uid]

    async def _converse(self, wire: Wire, peer: Peer, user: _User) -> None:
        try:
            self._check_room_for(peer, user)
            while (frame := await wire.receive()) is not None:
                with _held(wire.take_descriptor()) as descriptor:
                    await user.wait_turn()
                    await self._serve(wire, _Call.parse(frame), peer, descriptor)
            return
        except ControlError as exc:
            log.info("closing the connection of pid %d: %s", peer.pid, exc)
            farewell = _failure(exc)
        await wire.send(farewell)

    def _check_room_for(self, peer: Peer, user: _User) -> None:
        if user.connections > MAX_CONNECTIONS_PER_USER:
            raise ControlError(f"user {peer.uid} holds {MAX_CONNECTIONS_PER_USER} connections")
        others = sum(user.connections for user in self._users.values() if not user.is_admin)
        if not user.is_admin and others > MAX_CONNECTIONS:
            raise ControlError(f"there are {MAX_CONNECTIONS} connections already")

    async def _serve(
        self, wire: Wire, call: _Call, peer: Peer, descriptor: int | None
    ) -> None:
        if call.oneway:
            await self._reply(wire, call, peer, descriptor)
        elif call.more:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when_closed, wire, nursery.cancel_scope)
                await wire.send(await self._reply(wire, call, peer, descriptor))
                nursery.cancel_scope.cancel()
        else:
            await wire.send(await self._reply(wire, call, peer, descriptor))

    async def _reply(
        self, wire: Wire, call: _Call, peer: Peer, descriptor: int | None
    ) -> Message | bytes:
        async def more(reply: Frozen) -> None:
            await wire.send({"parameters": reply.model_dump(mode="json"), "continues": True})

        try:
            if call.method.startswith(f"{interface.SERVICE}."):
                return {"parameters": _introspect(call)}
            role, kind = self._access.role(peer), _method_of(call)
            require(role, kind.role, kind.__name__)  # before anything is parsed for it
            method = _parse(call, kind)
            require(role, method.needed_role(), kind.__name__)
            if method.role > Role.READER:
                log.info("pid %d, uid %d: %s", peer.pid, peer.uid, call.method)
            method = _with_name(method, self._host)
            method.bring(descriptor)
            reply = await method.answer(self._host, None if call.oneway or not call.more else more)
            return _encoded(reply)
        except QsnapError as exc:
            return _failure(exc)
        except OSError as exc:  # the world's doing, and no reason to end the daemon
            log.exception("pid %d: %s failed", peer.pid, call.method)
            return _failure(StoreError(f"{exc.filename or 'a file'}: {exc.strerror}"))
        except _ServiceError as exc:
            return exc.reply


def _method_of(call: _Call) -> type[Method]:
    name, _, member = call.method.rpartition(".")
    if name != interface.NAME:
        raise _ServiceError("InterfaceNotFound", interface=name)
    method = METHODS.get(member)
    if method is None:
        raise _ServiceError("MethodNotFound", method=call.method)
    if call.upgrade:
        raise _ServiceError("MethodNotImplemented", method=call.method)
    if method.only_more and (not call.more or call.oneway):
        raise _ServiceError("ExpectedMore")
    return method


def _parse(call: _Call, method: type[Method]) -> Method:
    if _count(call.parameters) > VALUES_LIMIT:
        raise BadRequest(f"a request must not hold more than {VALUES_LIMIT} values")
    try:
        # As JSON, so that strict means: of the interface's type, nothing converted.
        parameters = json.dumps(_without_nulls(call.parameters or {}), allow_nan=False)
        return method.model_validate_json(parameters, strict=True)
    except ValidationError as exc:
        _refuse(exc)
    except ValueError as exc:
        raise BadRequest("a number must not be infinite") from exc


def _with_name(method: Method, host: Host) -> Method:
    """Let a client call a VM by its UUID or id: from here on it has its name only."""
    word = getattr(method, "vm", None)
    if word is None or (name := host.name_of(word)) == word:
        return method
    return method.model_copy(update={"vm": name})


def _refuse(failure: ValidationError) -> Never:
    """Tell a parameter that does not fit the interface from one that makes no sense."""
    error = failure.errors()[0]
    where = ".".join(str(part) for part in error["loc"])
    kind = error["type"]
    if kind in ("missing", "extra_forbidden", "enum", "literal_error") or kind.endswith("_type"):
        raise _ServiceError("InvalidParameter", parameter=where) from failure
    reason = error["msg"].removeprefix("Value error, ")
    raise BadRequest(f"{where}: {reason}") from failure


def _count(value: object) -> int:
    """How many values *value* consists of."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def _without_nulls(value: object) -> object:
    """Varlink lets a client write null where it means "left out"."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _introspect(call: _Call) -> Message:
    parameters = call.parameters or {}
    match call.method.removeprefix(f"{interface.SERVICE}."):
        case "GetInfo":
            return {
                "vendor": "qsnapd",
                "product": "qsnapd",
                "version": qsnapd.__version__,
                "url": "",
                "interfaces": [interface.SERVICE, interface.NAME],
            }
        case "GetInterfaceDescription":
            wanted = parameters.get("interface")
            if not isinstance(wanted, str):
                raise _ServiceError("InvalidParameter", parameter="interface")
            if (text := interface.text(wanted)) is None:
                raise _ServiceError("InterfaceNotFound", interface=wanted)
            return {"description": text}
    raise _ServiceError("MethodNotFound", method=call.method)


def _encoded(reply: Frozen) -> Message | bytes:
    """A list of snapshots can be of some MiB, and others wait meanwhile: the quick way if it goes.

    It does not where a name of a file is no UTF-8, which json escapes.
    """
    try:
        return b'{"parameters":%b}' % reply.model_dump_json().encode()
    except ValueError:
        return {"parameters": reply.model_dump(mode="json")}


def _failure(error: QsnapError) -> Message:
    known = next(cls for cls in type(error).__mro__ if cls in _ERROR_FIELDS)
    said = {name: getattr(error, name) for name in _ERROR_FIELDS[known]}
    return {
        "error": f"{interface.NAME}.{known.__name__}",
        "parameters": {"code": error.code, "message": str(error), **said},
    }


async def _cancel_when_closed(wire: Wire, scope: trio.CancelScope) -> None:
    await wire.wait_closed()
    scope.cancel()


@contextmanager
def _held(descriptor: int | None) -> Iterator[int | None]:
    """What came along with a call is open for as long as that is being answered."""
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
