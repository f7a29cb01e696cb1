"""The calls of interface io.qsnapd: one class per method, its fields the parameters.

The docstrings here are the comments of the interface text.
"""

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host, Job
from qsnapd.control.view import Snapshot, placed
from qsnapd.errors import UnknownSnapshot, WrongState
from qsnapd.model.base import Frozen
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobInfo
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.model.vm import DiskInfo, VmInfo

More = Callable[[Frozen], Awaitable[None]]
"""Sends a reply that will be followed by others."""


class VmsReply(Frozen):
    vms: tuple[VmInfo, ...]


class VmReply(Frozen):
    vm: VmInfo


class DisksReply(Frozen):
    disks: tuple[DiskInfo, ...]


class SnapshotsReply(Frozen):
    snapshots: tuple[Snapshot, ...]


class SnapshotReply(Frozen):
    snapshot: Snapshot


class CurrentSnapshotReply(Frozen):
    snapshot: Snapshot | None


class JobReply(Frozen):
    job: JobInfo | None


class ProgressReply(Frozen):
    job: JobInfo | None = None
    snapshot: Snapshot | None = None


class EventReply(Frozen):
    event: Event | None


class Method(Frozen):
    """One call. The type that `answer` returns holds the reply's parameters."""

    role: ClassVar[Role] = Role.READER
    only_more: ClassVar[bool] = False
    """Makes no sense for a client that wants a single reply."""

    def needed_role(self) -> Role:
        return self.role

    @abstractmethod
    async def answer(self, host: Host, more: More | None) -> Frozen:
        """Do it and return the last reply; *more* is None if the client wants only that.

        Cancelled when the client of a call with *more* leaves.
        """


class ListVms(Method):
    """List the configured VMs, by name."""

    async def answer(self, host: Host, more: More | None) -> VmsReply:
        return VmsReply(vms=host.vms())


class GetVm(Method):
    """Look at one VM."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> VmReply:
        return VmReply(vm=host.vm(self.vm))


class ListDisks(Method):
    """List the disks of a running VM, also those that snapshots leave out."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> DisksReply:
        return DisksReply(disks=await host.disks(self.vm))


class Suspend(Method):
    """Pause the guest; the reply shows the VM as it then is."""

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> VmReply:
        await host.suspend(self.vm)
        return VmReply(vm=host.vm(self.vm))


class Resume(Method):
    """Let a paused guest run; the reply shows the VM as it then is."""

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> VmReply:
        await host.resume(self.vm)
        return VmReply(vm=host.vm(self.vm))


class CreateSnapshot(Method):
    """Take a checkpoint: memory and disks of one instant.

    Called with "more", replies hold the job until the last one, which holds the snapshot.
    A client that leaves does not stop the job; AbortJob does. Requests that name files are
    for root only.
    """

    role = Role.OPERATOR
    vm: VmName
    request: CreateRequest = CreateRequest()

    def needed_role(self) -> Role:
        # As root's helper, "create this file with that guest's memory in it" is root.
        request = self.request
        names_files = request.memory_file or any(disk.file for disk in request.disks)
        return Role.ADMIN if names_files else self.role

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await _follow(await host.create(self.vm, self.request), host, more)


class RevertSnapshot(Method):
    """Put the VM back to a snapshot. Replies are those of CreateSnapshot."""

    role = Role.OPERATOR
    vm: VmName
    request: RevertRequest

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await _follow(await host.revert(self.vm, self.request), host, more)


class ListSnapshots(Method):
    """List a VM's snapshots, by time of creation."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> SnapshotsReply:
        snapshots = _all(host, self.vm)
        return SnapshotsReply(snapshots=tuple(sorted(snapshots, key=lambda s: s.created_at)))


class GetSnapshot(Method):
    """Look at one snapshot."""

    vm: VmName
    name: SnapshotName

    async def answer(self, host: Host, more: More | None) -> SnapshotReply:
        return SnapshotReply(snapshot=_one(host, self.vm, self.name))


class GetCurrentSnapshot(Method):
    """Look at the snapshot the VM's present state descends from, if there is one."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> CurrentSnapshotReply:
        current = (snapshot for snapshot in _all(host, self.vm) if snapshot.current)
        return CurrentSnapshotReply(snapshot=next(current, None))


class GetJob(Method):
    """Look at the running job, or at the one that ended last."""

    vm: VmName
    completed: bool = False
    """Look at the one that ended last."""

    async def answer(self, host: Host, more: More | None) -> JobReply:
        return JobReply(job=host.last_job(self.vm) if self.completed else host.job(self.vm))


class AbortJob(Method):
    """Ask the running job to stop and to undo what it did.

    Does not wait for it: the job ends with JobCancelled, or succeeds if it was too late.
    """

    role = Role.OPERATOR
    vm: VmName
    id: int | None = None
    """Abort only this job, not one that began since."""

    async def answer(self, host: Host, more: More | None) -> JobReply:
        job = host.job(self.vm)
        if self.id is not None and (job is None or job.id != self.id):
            raise WrongState(f"job {self.id} of {self.vm} has ended")
        host.abort(self.vm)
        return JobReply(job=job)


class Subscribe(Method):
    """Report events as they happen; call with "more".

    The first reply comes at once, without an event: from then on none is missed.
    """

    only_more = True
    vm: VmName | None = None
    """Only events of this VM."""
    kinds: tuple[EventKind, ...] = ()
    """Only events of these kinds."""

    async def answer(self, host: Host, more: More | None) -> EventReply:
        if self.vm is not None:
            host.vm(self.vm)
        assert more is not None, "the server refuses Subscribe without more"
        with host.subscribe() as events:
            await more(EventReply(event=None))
            async for event in events:
                if self.vm in (None, event.vm) and (not self.kinds or event.kind in self.kinds):
                    await more(EventReply(event=event))
        return EventReply(event=None)


METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        ListVms,
        GetVm,
        ListDisks,
        Suspend,
        Resume,
        CreateSnapshot,
        RevertSnapshot,
        ListSnapshots,
        GetSnapshot,
        GetCurrentSnapshot,
        GetJob,
        AbortJob,
        Subscribe,
    )
}


async def _follow(job: Job, host: Host, more: More | None) -> ProgressReply:
    if more is not None:
        info = job.info()
        while not info.phase.ended:
            await more(ProgressReply(job=info))
            info = await job.changed(info)
    manifest = await job.wait()
    return ProgressReply(job=job.info(), snapshot=_one(host, manifest.vm, manifest.name))


def _all(host: Host, vm: str) -> tuple[Snapshot, ...]:
    return placed(host.snapshots(vm), host.current(vm))


def _one(host: Host, vm: str, name: str) -> Snapshot:
    for snapshot in _all(host, vm):
        if snapshot.name == name:
            return snapshot
    raise UnknownSnapshot(f"VM {vm} has no snapshot {name!r}")
