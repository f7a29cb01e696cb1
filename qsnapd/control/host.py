"""What the control socket needs of the daemon below it, and nothing more."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import trio

from qsnapd.model.event import Event
from qsnapd.model.job import JobInfo
from qsnapd.model.launch import LaunchInfo
from qsnapd.model.request import CloneRequest, CreateRequest, RevertRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import Export, ExportRequest, ImportRequest, TransferProgress
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


class Host(Protocol):
    """The VMs of one daemon. Every method that takes a name raises UnknownVm."""

    def vms(self) -> tuple[VmInfo, ...]:
        """Return all configured VMs, by name."""

    def vm(self, name: str) -> VmInfo: ...

    async def disks(self, name: str) -> tuple[DiskInfo, ...]:
        """Ask QEMU for the VM's disks."""

    async def suspend(self, name: str) -> None:
        """Pause the guest for the user; a guest already paused is left alone.

        Raises: WrongState, VmBusy, VmError.
        """

    async def resume(self, name: str) -> None:
        """Let a paused guest run. Raises: WrongState, VmBusy, VmError."""

    async def create(self, name: str, request: CreateRequest) -> Job:
        """Check the request and start the job that takes the checkpoint.

        On success: the job runs in the daemon's own nursery.
        On failure or cancellation: as if never called.
        Raises: RequestError, CapabilityMissing, StoreError.
        """

    async def revert(self, name: str, request: RevertRequest) -> Job:
        """As `create`, for putting the VM back to a snapshot."""

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

    def subscribe(self) -> AbstractContextManager[trio.MemoryReceiveChannel[Event]]:
        """Deliver all events from now until the block ends, through a bounded channel.

        What a slow reader loses is counted in the next event's `lost`.
        """
