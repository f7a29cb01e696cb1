"""Calls that take and show snapshots."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import (
    Method,
    More,
    ProgressReply,
    all_snapshots,
    follow,
    one_snapshot,
)
from qsnapd.control.view import Snapshot
from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.request import CreateRequest
from qsnapd.threads import in_thread


class SnapshotsReply(Frozen):
    snapshots: tuple[Snapshot, ...]


class SnapshotReply(Frozen):
    snapshot: Snapshot


class CurrentSnapshotReply(Frozen):
    snapshot: Snapshot | None


class CreateSnapshot(Method):
    """Take a snapshot: memory and disks of one instant, or the disks alone.

    Called with "more", replies hold the job until the last one, which holds the snapshot,
    also one that is not listed because no metadata of it is kept. In phase "holding" the guest
    stands still for its storage; if the job has an instruction then, Resume ends that.
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
        names_files = names_files or request.reuse_overlays
        return Role.ADMIN if names_files else self.role

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await follow(await host.create(self.vm, self.request), host, more)


class ListSnapshots(Method):
    """List a VM's snapshots, by time of creation."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> SnapshotsReply:
        snapshots = await in_thread(all_snapshots, host, self.vm)
        return SnapshotsReply(snapshots=tuple(sorted(snapshots, key=lambda s: s.created_at)))


class GetSnapshot(Method):
    """Look at one snapshot."""

    vm: VmName
    name: SnapshotName

    async def answer(self, host: Host, more: More | None) -> SnapshotReply:
        return SnapshotReply(snapshot=await in_thread(one_snapshot, host, self.vm, self.name))


class GetCurrentSnapshot(Method):
    """Look at the snapshot the VM's present state descends from, if there is one."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> CurrentSnapshotReply:
        snapshots = await in_thread(all_snapshots, host, self.vm)
        current = (snapshot for snapshot in snapshots if snapshot.current)
        return CurrentSnapshotReply(snapshot=next(current, None))
