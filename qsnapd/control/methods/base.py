"""What every call of interface io.qsnapd is: a class, its fields the parameters."""

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar

from pydantic import PrivateAttr

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host, Job
from qsnapd.control.view import Snapshot, placed
from qsnapd.errors import UnknownSnapshot
from qsnapd.model.base import Frozen
from qsnapd.model.job import JobInfo
from qsnapd.model.snapshot import Manifest
from qsnapd.threads import in_thread

More = Callable[[Frozen], Awaitable[None]]
"""Sends a reply that will be followed by others."""


class ProgressReply(Frozen):
    job: JobInfo | None = None
    snapshot: Snapshot | None = None


class Method(Frozen):
    """One call. The type that `answer` returns holds the reply's parameters."""

    role: ClassVar[Role] = Role.READER
    only_more: ClassVar[bool] = False
    """Makes no sense for a client that wants a single reply."""

    _descriptor: int | None = PrivateAttr(default=None)

    def needed_role(self) -> Role:
        return self.role

    def bring(self, descriptor: int | None) -> None:
        """Let the method use what the client sent along; it stays the server's to close."""
        self._descriptor = descriptor

    @abstractmethod
    async def answer(self, host: Host, more: More | None) -> Frozen:
        """Do it and return the last reply; *more* is None if the client wants only that.

        Cancelled when the client of a call with *more* leaves.
        """


async def follow(job: Job, host: Host, more: More | None) -> ProgressReply:
    if more is not None:
        await tell_progress(job, lambda info: more(ProgressReply(job=info)))
    manifest = await job.wait()
    return ProgressReply(job=job.info(), snapshot=await in_thread(_described, host, manifest))


async def tell_progress(job: Job, tell: Callable[[JobInfo], Awaitable[None]]) -> None:
    """*tell* how the job is, until it has ended."""
    info = job.info()
    while not info.phase.ended:
        await tell(info)
        info = await job.changed(info)


def _described(host: Host, manifest: Manifest) -> Snapshot:
    """What a job has dealt with, in its place; alone if it is not listed, or not any more."""
    for snapshot in all_snapshots(host, manifest.vm):
        if (snapshot.name, snapshot.created_at) == (manifest.name, manifest.created_at):
            return snapshot
    [alone] = placed([manifest], None, {})
    return alone


def all_snapshots(host: Host, vm: str) -> tuple[Snapshot, ...]:
    """Blocks."""
    return placed(host.snapshots(vm), host.current(vm), host.users(vm))


def one_snapshot(host: Host, vm: str, name: str) -> Snapshot:
    """Blocks. Raises: UnknownSnapshot."""
    for snapshot in all_snapshots(host, vm):
        if snapshot.name == name:
            return snapshot
    raise UnknownSnapshot(f"VM {vm} has no snapshot {name!r}")
