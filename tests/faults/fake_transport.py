"""The connection to a fake QEMU: `qsnapd.qmp.transport.QmpTransport`, with faults on demand."""

import os
from collections.abc import Mapping
from enum import Enum

import trio

from qsnapd.errors import CommandRefused, Effect, ReplyTimeout, SessionLost
from qsnapd.qmp.transport import EventListener
from tests.faults.fake_monitor import FakeMonitor, Request


class Fault(Enum):
    """What happens to one command."""

    REFUSED = "refused, nothing happened"
    LATE = "carried out, the reply never came"
    LOST_BEFORE = "the connection broke before it was sent"
    LOST_AFTER = "carried out, then the connection broke"


class FakeTransport:
    """One connection; several may follow each other on the same QEMU."""

    def __init__(self, monitor: FakeMonitor) -> None:
        self._monitor = monitor
        self._listeners: list[EventListener] = []
        self._waiting: set[Request] = set()
        self.lost = False
        self.sent: list[str] = []
        """The commands of this connection, in their order."""
        self.faults: dict[int | str, Fault] = {}
        """By the number of the command, the first is 1; or by its name, then once."""

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, object],
        *,
        timeout_s: float,
        descriptor: int | None = None,
    ) -> object:
        """See `QmpTransport.execute`. Cancelled at its first step, it has sent nothing."""
        await trio.lowlevel.checkpoint()
        self._require_connection(name)
        self.sent.append(name)
        fault = self.faults.get(len(self.sent)) or self.faults.pop(name, None)
        if fault is Fault.REFUSED:
            raise CommandRefused(name, "GenericError", "planted")
        if fault is Fault.LOST_BEFORE:
            self.lose()
            self._require_connection(name)
        request = Request(name, arguments, None if descriptor is None else os.dup(descriptor))
        self._waiting.add(request)
        self._monitor.send(request)
        try:
            with trio.fail_after(timeout_s):
                await request.done.wait()
        except trio.TooSlowError:
            raise self._late(name) from None
        finally:
            self._waiting.discard(request)
        if fault is Fault.LOST_AFTER:
            self.lose()
        self._require_connection(name)
        if fault is Fault.LATE:
            raise self._late(name)
        if request.refusal is not None:
            raise CommandRefused(name, "GenericError", request.refusal)
        return request.result

    def _late(self, name: str) -> ReplyTimeout:
        return ReplyTimeout(f"QEMU does not answer {name}", effect=Effect.UNKNOWN)

    def _require_connection(self, name: str) -> None:
        if self.lost:
            raise SessionLost(f"{name}: QEMU closed the monitor", effect=Effect.UNKNOWN)

    def lose(self) -> None:
        """The connection breaks: nobody waits any longer, no event comes any more."""
        self.lost = True
        for request in self._waiting:
            request.done.set()
        for listener in self._listeners:
            self._monitor.unlisten(listener)

    def listen(self, listener: EventListener) -> None:
        self._listeners.append(listener)
        self._monitor.listen(listener)

    def unlisten(self, listener: EventListener) -> None:
        self._monitor.unlisten(listener)
