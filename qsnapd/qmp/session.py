"""Typed QMP: one call per command, one reply type, and events to wait for."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, cast

import trio
from pydantic import TypeAdapter, ValidationError

from qsnapd.errors import Effect, UnexpectedReply
from qsnapd.qmp.commands import Command
from qsnapd.qmp.transport import EventListener, QmpEvent, QmpTransport
from qsnapd.qmp.words import in_words

EVENT_BACKLOG = 1024
"""Events one watcher may fall behind by; those who watch always ask QEMU as well."""

ReplyT = TypeVar("ReplyT")


class QmpSession:
    """One QEMU that answers. Lives as long as its transport, and owns nothing."""

    def __init__(self, transport: QmpTransport) -> None:
        self._transport = transport

    async def execute(
        self, command: Command[ReplyT], *, descriptor: int | None = None
    ) -> ReplyT:
        """Send *command*, with *descriptor* along, and return its parsed reply.

        Cancellation: abandons the reply, never the command: once sent, QEMU runs it.
        Raises:
          CommandRefused: QEMU said no.
          ReplyTimeout, SessionLost: see `effect` for whether it may have run.
          UnexpectedReply: the command ran, but its reply is not what QAPI promises.
        """
        raw = await self._transport.execute(
            command.name,
            command.arguments(),
            timeout_s=command.timeout_s,
            descriptor=descriptor,
        )
        if command.reply is None:
            return cast(ReplyT, None)
        try:
            return cast(ReplyT, _adapter(command.reply).validate_python(raw))
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole"
            words = in_words(f"{first['msg']} at {where}")
            raise UnexpectedReply(
                f"QEMU's reply to {command.name} is not understood: {words}", effect=Effect.UNKNOWN
            ) from exc

    def listen(self, listener: EventListener) -> None:
        """Call *listener* synchronously with every event, in QEMU's order."""
        self._transport.listen(listener)

    @contextmanager
    def watch(self, *names: str) -> Iterator[trio.MemoryReceiveChannel[QmpEvent]]:
        """Receive the events of these names that arrive during the block.

        The backlog is bounded; what overflows is lost, so an event is a reason to ask
        QEMU, never the only proof.
        """
        sender, receiver = trio.open_memory_channel[QmpEvent](EVENT_BACKLOG)

        def pass_on(event: QmpEvent) -> None:
            if event.name in names:
                try:
                    sender.send_nowait(event)
                except trio.WouldBlock:
                    receiver.receive_nowait()
                    sender.send_nowait(event)

        self._transport.listen(pass_on)
        try:
            yield receiver
        finally:
            self._transport.unlisten(pass_on)
            sender.close()
            receiver.close()


@cache  # making one takes longer than QEMU's answer
def _adapter(reply: Any) -> TypeAdapter[Any]:  # noqa: ANN401 -- any type of a reply
    return TypeAdapter(reply)
