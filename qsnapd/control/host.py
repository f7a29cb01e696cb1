"""What the control socket needs of the daemon below it, and nothing more."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import trio

from qsnapd.model.event import Event
from qsnapd.model.findings import StoreCheck
from qsnapd.model.freeze import Filesystem
from qsnapd.model.job import JobInfo
from qsnapd.model.launch import LaunchInfo
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    DeleteRequest,
    PruneRequest,
    RevertRequest,
)
from qsnapd.model.retention import Pruned
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import (
    Export,
    ExportRequest,
    ImportRequest,
    ScanResult,
    TransferProgress,
)
from qsnapd.model.verification import Verification
from qsnapd.model.vm import DiskInfo, VmInfo


class Job(Protocol):
    """A running operation. It belongs to the daemon: whoever waits for it may leave."""

    def info(self) -> JobInfo:
        """Say how far the job has come; after its end, how it ended."""

    async def changed(self, since: JobInfo) -> JobInfo:
        """Wait until `info()` differs from *since*, and return it.

        A slow caller misses what lies between: there is no queue. Must return at once,
        not wait, when the job has already moved on, and always once its phase has ended.
        """

    async def wait(self) -> Manifest:
        """Wait for the end: the snapshot that was created or reverted to.

        Cancellation: stops the waiting, never the job.
        Raises: the QsnapError that ended the job.
        """

    async def wait_done(self) -> None:
        """The same for a job that is not about one snapshot."""


class PruneJob(Protocol):
    """A job that deletes what retention does not keep."""

    @property
    def job(self) -> Job: ...

    @property
    def pruned(self) -> Pruned:
        """What has come of it so far."""


class Host(Protocol):
    """The VMs of one daemon. Every method that takes a name raises UnknownVm.

    What is not async may read files, but for `name_of` and what is about jobs: it is called in
    threads.
    """

    async def look_at_all(self) -> tuple[VmInfo, ...]:
        """Return all configured VMs, by name. None of them delays or fails the others."""

    async def look(self, name: str) -> VmInfo:
        """Return one of them; if its part of the store does not answer soon, without snapshots."""

    def name_of(self, word: str) -> str:
        """Return the name of the VM that *word* means: its name, or its UUID or id if it runs."""

    async def disks(self, name: str) -> tuple[DiskInfo, ...]:
        """Ask QEMU for the VM's disks."""

    async def suspend(self, name: str) -> None:
        """Pause the guest for the user; a guest already paused is left alone.

        Raises: WrongState, VmBusy, VmError.
        """

    async def resume(self, name: str) -> None:
        """Let a paused guest run. Raises: WrongState, VmBusy, VmError."""

    async def freeze_filesystems(self, name: str, mountpoints: Sequence[str]) -> int:
        """Freeze the guest's file systems, all or those at *mountpoints*; returns how many.

        On success: they stay so until `thaw_filesystems`.
        On failure or cancellation: what was frozen is thawed, sooner or later.
        Raises: WrongState: the guest does not run, or they are frozen already. VmBusy: a job runs.
          AgentError.
        """

    async def thaw_filesystems(self, name: str) -> int:
        """Thaw them all, whoever froze them; returns how many.

        Raises: WrongState. VmBusy: a job has them frozen right now. AgentError.
        """

    async def filesystems(self, name: str) -> tuple[Filesystem, ...]:
        """Return what is mounted in the guest. Raises: as `thaw_filesystems`."""

    async def create(self, name: str, request: CreateRequest) -> Job:
        """Check the request and start the job that takes the checkpoint.

        On success: the job runs in the daemon's own nursery.
        On failure or cancellation: as if never called.
        Raises: RequestError, CapabilityMissing, StoreError.
        """

    async def revert(self, name: str, request: RevertRequest) -> Job:
        """As `create`, for putting the VM back to a snapshot."""

    async def delete(self, name: str, request: DeleteRequest) -> Job:
        """As `create`, for deleting snapshots; the job's result is what the named one was."""

    async def prune(self, name: str, request: PruneRequest) -> PruneJob:
        """As `create`, for deleting what retention does not keep; see `PruneJob`."""

    async def foresee_prune(self, name: str, request: PruneRequest) -> Pruned:
        """Say what `prune` would delete, and what of it is in use; touches nothing.

        Raises: StoreError.
        """

    async def clone(self, name: str, request: CloneRequest) -> Job:
        """As `create`, for starting another VM from a snapshot; the job is the new VM's.

        Raises: VmExists: its name is taken. SnapshotDiffers, Blocked: it cannot run here, or
          not beside the original; ImageInvalid.
        """

    async def undefine(self, name: str, *, remove_storage: bool) -> tuple[str, ...]:
        """Forget a clone that is shut off; returns the paths of what was removed.

        Raises: WrongState: it runs, has snapshots or is no clone. StoreError.
        """

    async def start(self, name: str) -> Job:
        """As `create`, for starting a VM that a revert has left shut off."""

    async def launch(self, name: str, request: RevertRequest) -> LaunchInfo:
        """Say how a revert would start QEMU; touches nothing.

        Raises: UnknownSnapshot, StoreError; Blocked: it cannot be started again, and why.
        """

    def job(self, name: str) -> JobInfo | None:
        """Return the running job, if there is one."""

    def last_job(self, name: str) -> JobInfo | None:
        """Return the job that ended last, if there was one."""

    def abort(self, name: str) -> None:
        """Ask the running job to stop and undo; returns before it has.

        Raises: WrongState: no job runs, or it can no longer be stopped.
        """

    async def export(
        self,
        name: str,
        request: ExportRequest,
        descriptor: int | None,
        tell: Callable[[TransferProgress], None],
    ) -> Export:
        """Write a snapshot to a directory, or as a tar stream to *descriptor*.

        *tell* keeps how far it is; called often, from threads too.
        On failure or cancellation: no directory is left; a stream ends in the middle.
        Raises: RequestError, StoreError.
        """

    async def take_in(
        self,
        name: str,
        request: ImportRequest,
        descriptor: int | None,
        tell: Callable[[TransferProgress], None],
    ) -> tuple[str, tuple[str, ...]]:
        """Import a snapshot from a directory, or from the tar stream of *descriptor*.

        Returns its name, and what may be in the way of a restore on this host.
        On failure or cancellation: as if never asked. Raises: RequestError, StoreError.
        """

    async def take_in_metadata(
        self,
        name: str,
        text: str,
        new_name: str | None,
        tell: Callable[[TransferProgress], None],
    ) -> tuple[str, tuple[str, ...]]:
        """Make a snapshot of a manifest's text, whose files are where it says.

        Returns its name, what was taken on trust, and what may be in the way of a restore.
        On failure or cancellation: as if never asked. Raises: RequestError, StoreError.
        """

    async def scan(
        self, name: str, directory: str, tell: Callable[[TransferProgress], None]
    ) -> ScanResult:
        """Look for the VM's snapshots below *directory*, and make all its own that are whole.

        Cancellation: those that were taken in stay. Raises: VmBusy, TargetRefused, StoreError.
        """

    async def fsck(self, name: str, *, repair: bool) -> StoreCheck:
        """Hold records, files and QEMU's block graph of a VM against each other.

        *repair*: also mend what is safe to mend. While a job runs, less is looked at.
        Cancellation: at any time. Raises: StoreError. VmBusy: a repair, while a job runs.
        """

    async def verify(self, name: str, snapshot: str, *, deep: bool = False) -> Verification:
        """Look whether a snapshot is sound; *deep*: also load it into a QEMU that never runs.

        The VM is not touched. Cancellation: at any time; nothing is left.
        Raises: UnknownSnapshot, StoreError. VmBusy: a deep one of this VM is under way.
        """

    def snapshots(self, name: str) -> tuple[Manifest, ...]: ...

    def users(self, name: str) -> Mapping[str, tuple[str, ...]]:
        """Return which VMs run on the files of the VM's snapshots, by snapshot."""

    def current(self, name: str) -> str | None:
        """Return the name of the snapshot that the VM's present state descends from."""

    async def redefine(self, name: str, text: str, *, current: bool) -> str:
        """Define a snapshot by the text of its manifest; returns its name.

        One that is there changes in what may change; one that is not has to have its files.
        On failure or cancellation: as if never asked.
        Raises: BadRequest, WrongState, VmBusy, ImageInvalid, StoreError.
        """

    async def rename_snapshot(self, name: str, snapshot: str, new_name: str) -> None:
        """Call a snapshot something else. On failure: as if never asked, or effect PARTIAL.

        Raises: UnknownSnapshot, SnapshotExists, WrongState, VmBusy, StoreError.
        """

    async def copy_snapshot(self, name: str, snapshot: str, new_name: str) -> None:
        """Give a snapshot a second name. On failure: as if never asked. Raises: as above."""

    async def set_current(self, name: str, snapshot: str) -> None:
        """Make a snapshot the current one. Raises: UnknownSnapshot, VmBusy, StoreError."""

    def subscribe(self) -> AbstractContextManager[trio.MemoryReceiveChannel[Event]]:
        """Deliver all events from now until the block ends, through a bounded channel.

        What a slow reader loses is counted in the next event's `lost`.
        """
