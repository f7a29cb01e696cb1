"""Calls that examine what is kept of a VM, and take in what is still there."""

from pydantic import Field

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, one_snapshot
from qsnapd.control.methods.transfers import ImportReply, telling
from qsnapd.model.base import Frozen
from qsnapd.model.findings import StoreCheck
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.snapshot import AbsolutePath
from qsnapd.model.transfer import ScanResult, TransferProgress
from qsnapd.snapshot.moving.meter import Tell
from qsnapd.threads import in_thread


class CheckReply(Frozen):
    check: StoreCheck


class ScanReply(Frozen):
    progress: TransferProgress | None = None
    result: ScanResult | None = None
    """In the last reply."""


class CheckStore(Method):
    """Hold the records of a VM's snapshots, their files and QEMU's block graph against each other.

    Nothing is changed. With "more", a client that leaves ends it.
    """

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> CheckReply:
        return CheckReply(check=await host.fsck(self.vm, repair=False))


class RepairStore(Method):
    """As CheckStore, and put right what is safe to put right: what a crash has left over.

    No file of a snapshot and no image of a disk is removed or changed.
    """

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> CheckReply:
        return CheckReply(check=await host.fsck(self.vm, repair=True))


class ImportMetadata(Method):
    """Make a snapshot of a manifest, whose files are where it says: they are held against it.

    It says which program a restore starts, with which arguments and as which user: import from
    those only whom you would let do that. Call with "more": a client that leaves ends it.
    """

    role = Role.ADMIN
    only_more = True
    vm: VmName
    manifest: str = Field(min_length=2)
    """The text of a snapshot.json."""
    name: SnapshotName | None = None
    """By default the name it had."""

    async def answer(self, host: Host, more: More | None) -> ImportReply:
        async def take_in(tell: Tell) -> ImportReply:
            name, notes = await host.take_in_metadata(self.vm, self.manifest, self.name, tell)
            snapshot = await in_thread(one_snapshot, host, self.vm, name)
            return ImportReply(snapshot=snapshot, notes=notes)

        return await telling(take_in, lambda now: ImportReply(progress=now), more)


class ScanSnapshots(Method):
    """Look for a VM's snapshots below a folder, and make all its own that are whole.

    For a state directory that was lost, moved or copied, for what a deletion of metadata has
    kept, and for exports, whose data is copied. As for ImportMetadata, look only where nobody
    else can write. Call with "more": a client that leaves ends it; what was taken in stays.
    """

    role = Role.ADMIN
    only_more = True
    vm: VmName
    directory: AbsolutePath

    async def answer(self, host: Host, more: More | None) -> ScanReply:
        async def scan(tell: Tell) -> ScanReply:
            return ScanReply(result=await host.scan(self.vm, self.directory, tell))

        return await telling(scan, lambda now: ScanReply(progress=now), more)
