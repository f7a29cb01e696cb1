"""The monitor of the fake QEMU: commands in their order, events, descriptors handed over.

What counts is what a test of cancellation needs: a command once sent is carried out, whoever
waits for the reply or no longer does.
"""

import fcntl
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from qsnapd.qmp.transport import EventListener, QmpEvent

COMMAND_S = 0.001
"""How long QEMU takes for a command, by the test's clock."""
EPOCH_S = 1_800_000_000.0
"""Wall clock at the start of the test's clock."""

Arguments = Mapping[str, Any]
Handler = Callable[[Arguments], object]


class Refusal(Exception):
    """QEMU says no; the text is its `desc`."""


@dataclass(eq=False)
class Request:
    """One command on its way."""

    name: str
    arguments: Arguments
    descriptor: int | None
    """Ours: whoever carries out the command keeps or closes it."""
    done: trio.Event = field(default_factory=trio.Event)
    result: object = None
    refusal: str | None = None


class FakeMonitor:
    """Serves commands one after the other, as QEMU's main loop does."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.major = int(version.split(".")[0])
        self.before: Callable[[], None] = lambda: None
        """Called before every command; what the guest does meanwhile."""
        self.lies: Callable[[object], object] = lambda result: result
        """Called with what a command returns, for what is told of it."""
        self.hangs: dict[str, trio.Event] = {}
        """Commands that are not answered until the event, nor is any other."""
        self.refusals: dict[str, list[str]] = {}
        """Commands that are refused, once for each text."""
        self.silent: set[str] = set()
        """Events that get lost."""
        self.doubled: set[str] = set()
        """Events that come twice."""
        self.fdsets: dict[int, list[tuple[int, str | None]]] = {}
        self.named: dict[str, int] = {}
        self._handlers: dict[str, Handler] = {}
        self._listeners: list[EventListener] = []
        self._sender, self._receiver = trio.open_memory_channel[Request](100)
        self._nursery: trio.Nursery | None = None
        self._descriptor: int | None = None
        self.serve("query-commands", lambda _: [{"name": name} for name in self._handlers])
        self.serve("query-fdsets", self._query_fdsets)
        self.serve("add-fd", self._add_fd)
        self.serve("remove-fd", self._remove_fd)
        self.serve("getfd", self._getfd)
        self.serve("closefd", self._closefd)

    def serve(self, name: str, handler: Handler) -> None:
        self._handlers[name] = handler

    async def run(self) -> None:
        """Serve until cancelled, which is the end of QEMU."""
        async with trio.open_nursery() as self._nursery:
            async for request in self._receiver:
                await trio.sleep(COMMAND_S)
                if request.name in self.hangs:
                    await self.hangs[request.name].wait()
                self._carry_out(request)

    def end(self) -> None:
        """No command and no work of its own goes on."""
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    def send(self, request: Request) -> None:
        self._sender.send_nowait(request)

    def start(self, work: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Let something go on beside the commands, e.g. a migration."""
        assert self._nursery is not None
        self._nursery.start_soon(work, *arguments)

    def _carry_out(self, request: Request) -> None:
        self.before()
        self._descriptor = request.descriptor
        try:
            if self.refusals.get(request.name):
                raise Refusal(self.refusals[request.name].pop(0))
            if request.name not in self._handlers:
                raise Refusal(f"The command {request.name} has not been found")
            request.result = self.lies(self._handlers[request.name](request.arguments))
        except Refusal as exc:
            request.refusal = str(exc)
        finally:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None
            request.done.set()

    # --- events --------------------------------------------------------------------------

    def emit(self, name: str, **data: object) -> None:
        if name in self.silent:
            return
        event = QmpEvent(name, data, EPOCH_S + trio.current_time())
        for listener in [*self._listeners] * (2 if name in self.doubled else 1):
            listener(event)

    def listen(self, listener: EventListener) -> None:
        self._listeners.append(listener)

    def unlisten(self, listener: EventListener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    # --- descriptors ---------------------------------------------------------------------

    def _take_descriptor(self) -> int:
        if self._descriptor is None:
            raise Refusal("No file descriptor supplied via SCM_RIGHTS")
        descriptor, self._descriptor = self._descriptor, None
        return descriptor

    def _query_fdsets(self, _arguments: Arguments) -> object:
        return [
            {
                "fdset-id": number,
                "fds": [
                    {"fd": fd, "opaque": opaque} if opaque else {"fd": fd} for fd, opaque in fds
                ],
            }
            for number, fds in self.fdsets.items()
        ]

    def _add_fd(self, arguments: Arguments) -> object:
        descriptor, number = self._take_descriptor(), arguments["fdset-id"]
        self.fdsets.setdefault(number, []).append((descriptor, arguments.get("opaque")))
        return {"fdset-id": number, "fd": descriptor}

    def _remove_fd(self, arguments: Arguments) -> None:
        number = arguments["fdset-id"]
        if number not in self.fdsets:
            raise Refusal(f"File descriptor named 'fdset-id:{number}' not found")
        for descriptor, _ in self.fdsets.pop(number):
            os.close(descriptor)

    def _getfd(self, arguments: Arguments) -> None:
        descriptor, name = self._take_descriptor(), arguments["fdname"]
        if name in self.named:
            os.close(self.named[name])
        self.named[name] = descriptor

    def _closefd(self, arguments: Arguments) -> None:
        os.close(self.take_named(arguments["fdname"]))

    def take_named(self, name: str) -> int:
        """The descriptor that `getfd` called *name*; it is the caller's from now on."""
        if name not in self.named:
            raise Refusal(f"File descriptor named '{name}' not found")
        return self.named.pop(name)

    def open_fdset(self, filename: str, access: int) -> int:
        """Open /dev/fdset/N as QEMU does: a duplicate of the one with the same access mode."""
        found = re.fullmatch(r"/dev/fdset/(\d+)", filename)
        for descriptor, _ in self.fdsets.get(int(found[1]), []) if found else []:
            if _access_of(descriptor) == access:
                return os.dup(descriptor)
        raise Refusal(f"Failed to find file descriptor with matching flags={access:#x}")

    def close(self) -> None:
        for number in [*self.fdsets]:
            self._remove_fd({"fdset-id": number})
        for name in [*self.named]:
            self._closefd({"fdname": name})


def _access_of(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
