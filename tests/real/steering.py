"""A job at its every step: a session that tells the test of each command, and may fail it.

    with steered(rig.supervisors[VM], before=hold) as session:
        await rig.create(VM, request)
    assert Transaction in map(type, session.sent)
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import trio

from qsnapd.daemon.supervisor import Supervisor
from qsnapd.qmp.commands import Command
from qsnapd.qmp.session import QmpSession
from qsnapd.qmp.transport import EventListener, QmpEvent

ReplyT = TypeVar("ReplyT")
Hook = Callable[[Command[Any], int], Awaitable[None]]
"""Gets a command and the number of its step; what it raises, the job meets."""

REACHED_LIMIT_S = 60.0


async def _pass(command: Command[Any], step: int) -> None:
    await trio.lowlevel.checkpoint()


class SteeredSession(QmpSession):
    """Passes everything on to the session of the supervisor."""

    def __init__(
        self, supervisor: Supervisor, session: QmpSession, before: Hook, after: Hook
    ) -> None:
        self._supervisor = supervisor
        self._session = session
        self._before = before
        self._after = after
        self.sent: list[Command[Any]] = []
        self.steps = 0
        """Repetitions of a command, as in polling, are one step: their number varies."""

    async def execute(self, command: Command[ReplyT], *, descriptor: int | None = None) -> ReplyT:
        if self._supervisor.job is None:  # the supervisor asks for itself
            return await self._session.execute(command, descriptor=descriptor)
        if not self.sent or type(self.sent[-1]) is not type(command):
            self.steps += 1
        self.sent.append(command)
        step = self.steps
        await self._before(command, step)
        reply = await self._session.execute(command, descriptor=descriptor)
        await self._after(command, step)
        return reply

    def listen(self, listener: EventListener) -> None:
        self._session.listen(listener)

    @contextmanager
    def watch(self, *names: str) -> Iterator[trio.MemoryReceiveChannel[QmpEvent]]:
        with self._session.watch(*names) as events:
            yield events


@contextmanager
def steered(
    supervisor: Supervisor, *, before: Hook = _pass, after: Hook = _pass
) -> Iterator[SteeredSession]:
    """Give the jobs that begin during the block a session with hooks."""
    plain = supervisor.require_attached()
    session = SteeredSession(supervisor, plain.session, before, after)
    supervisor.attached = replaced = replace(plain, session=session)
    try:
        yield session
    finally:
        if supervisor.attached is replaced:  # else QEMU has ended meanwhile
            supervisor.attached = plain


class Gate:
    """A hook that holds the job when it is about to send a command of one of these types."""

    def __init__(self, *commands: type[Command[Any]]) -> None:
        self._commands = commands
        self._reached = trio.Event()
        self._opened = trio.Event()

    async def __call__(self, command: Command[Any], step: int) -> None:
        if isinstance(command, self._commands):
            self._reached.set()
            await self._opened.wait()

    async def reached(self) -> None:
        """Wait until the job stands there."""
        with trio.fail_after(REACHED_LIMIT_S):
            await self._reached.wait()

    def open(self) -> None:
        """Let the job go on."""
        self._opened.set()
