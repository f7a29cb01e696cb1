"""Calls that change what is kept of snapshots, and none of their files."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, one_snapshot
from qsnapd.control.view import Snapshot
from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.threads import in_thread


class EditedReply(Frozen):
    snapshot: Snapshot
    """As it is now."""


class RedefineSnapshot(Method):
    """Define a snapshot by its manifest, in place of what is kept of it or though nothing is.

    Of one that is there only description, labels, parent and created_at can change. One that
    is not has to have all its files, unchanged since. It says which program a restore starts,
    with which arguments and as which user: therefore for root only.
    """

    role = Role.ADMIN
    vm: VmName
    manifest: str
    """Its JSON text: a manifest has fields that are null, which is not the same as left out."""
    current: bool = False
    """Also make it the current one."""

    async def answer(self, host: Host, more: More | None) -> EditedReply:
        name = await host.redefine(self.vm, self.manifest, current=self.current)
        return EditedReply(snapshot=await in_thread(one_snapshot, host, self.vm, name))


class RenameSnapshot(Method):
    """Call a snapshot something else. Refused if clones were made of it."""

    role = Role.OPERATOR
    vm: VmName
    name: SnapshotName
    new_name: SnapshotName

    async def answer(self, host: Host, more: More | None) -> EditedReply:
        await host.rename_snapshot(self.vm, self.name, self.new_name)
        return EditedReply(snapshot=await in_thread(one_snapshot, host, self.vm, self.new_name))


class CopySnapshot(Method):
    """Give a snapshot a second name, as another child of its parent; both need the same files."""

    role = Role.OPERATOR
    vm: VmName
    name: SnapshotName
    new_name: SnapshotName

    async def answer(self, host: Host, more: More | None) -> EditedReply:
        await host.copy_snapshot(self.vm, self.name, self.new_name)
        return EditedReply(snapshot=await in_thread(one_snapshot, host, self.vm, self.new_name))


class SetCurrentSnapshot(Method):
    """Let the VM's present state count as coming from this snapshot; nothing else changes."""

    role = Role.OPERATOR
    vm: VmName
    name: SnapshotName

    async def answer(self, host: Host, more: More | None) -> EditedReply:
        await host.set_current(self.vm, self.name)
        return EditedReply(snapshot=await in_thread(one_snapshot, host, self.vm, self.name))
