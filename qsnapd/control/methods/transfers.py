"""Calls that move snapshots from one host to another."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, one_snapshot
from qsnapd.control.view import Snapshot
from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName
from qsnapd.model.snapshot import Sha256
from qsnapd.model.transfer import ExportRequest, FileSize, ImportRequest, TransferProgress
from qsnapd.snapshot.moving.beside import with_watcher
from qsnapd.snapshot.moving.meter import Tell
from qsnapd.threads import in_thread

TELL_EVERY_S = 0.25

T = TypeVar("T")


class WrittenFile(Frozen):
    """A file of an export."""

    name: str
    size_bytes: FileSize
    data_bytes: FileSize
    """Without its holes."""
    sha256: Sha256


class ExportReply(Frozen):
    progress: TransferProgress | None = None
    files: tuple[WrittenFile, ...] = ()
    """In the last reply: all but export.json, which describes them."""


class ImportReply(Frozen):
    progress: TransferProgress | None = None
    snapshot: Snapshot | None = None
    """In the last reply."""
    notes: tuple[str, ...] = ()
    """What may be in the way of a restore on this host."""


class ExportSnapshot(Method):
    """Write a snapshot, complete in itself, into a new directory or as a tar stream.

    For a tar stream send one descriptor along, with the first byte of the call (SCM_RIGHTS),
    and nothing else before it is answered. Call with "more": a client that leaves ends it.
    """

    role = Role.ADMIN
    only_more = True
    vm: VmName
    request: ExportRequest

    async def answer(self, host: Host, more: More | None) -> ExportReply:
        async def export(tell: Tell) -> ExportReply:
            done = await host.export(self.vm, self.request, self._descriptor, tell)
            files = (WrittenFile(name=n, **_content(f)) for n, f in done.files().items())
            return ExportReply(files=tuple(files))

        return await telling(export, lambda now: ExportReply(progress=now), more)


class ImportSnapshot(Method):
    """Make a snapshot that ExportSnapshot has written one of a VM's own.

    For a tar stream send one descriptor along, as for ExportSnapshot. What is imported says
    which program a restore starts, with which arguments and as which user: import from those
    only whom you would let do that. Call with "more": a client that leaves ends it.
    """

    role = Role.ADMIN
    only_more = True
    vm: VmName
    request: ImportRequest

    async def answer(self, host: Host, more: More | None) -> ImportReply:
        async def take_in(tell: Tell) -> ImportReply:
            name, notes = await host.take_in(self.vm, self.request, self._descriptor, tell)
            snapshot = await in_thread(one_snapshot, host, self.vm, name)
            return ImportReply(snapshot=snapshot, notes=notes)

        return await telling(take_in, lambda now: ImportReply(progress=now), more)


def _content(file: Frozen) -> dict[str, object]:
    return {name: getattr(file, name) for name in ("size_bytes", "data_bytes", "sha256")}


async def telling(
    work: Callable[[Tell], Awaitable[T]],
    reply: Callable[[TransferProgress], Frozen],
    more: More | None,
) -> T:
    """Do *work*, and tell the client now and then how far it is."""
    latest: list[TransferProgress] = []

    async def tell_now_and_then() -> None:
        assert more is not None, "the server refuses these methods without more"
        told = None
        while True:
            if latest and latest[-1] is not told:
                told = latest[-1]
                await more(reply(told))
            await trio.sleep(TELL_EVERY_S)

    def tell(progress: TransferProgress) -> None:
        latest[:] = [progress]

    return await with_watcher(tell_now_and_then, partial(work, tell))
