"""What a job is going to do, decided in full before it touches anything.

A plan names every file, node and descriptor set it will ever use. Written to the journal
before the first step, it is all that undoing or finishing the job needs: whoever does that
asks QEMU and the file system which of these things exist.
"""

import shlex
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, NonNegativeInt, PositiveInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.request import OnLimit
from qsnapd.model.snapshot import (
    AbsolutePath,
    Consistency,
    DiskLayer,
    FileIdentity,
    ImageFormat,
    Strategy,
)


class BitmapPlan(Frozen):
    """A dirty bitmap that the overlay carries on."""

    name: str
    granularity_bytes: PositiveInt


class Place(StrEnum):
    """What there is, before the job, where an overlay goes."""

    NEW = "new"
    """Nothing: the file is made, and removed if the job is undone."""
    EMPTY = "empty"
    """Somebody's empty file: it is filled, and emptied again."""
    DEVICE = "device"
    """A block device: it is written over, what it held is lost."""
    READY = "ready"
    """The overlay itself, made by the caller: it is neither changed nor ever removed."""


class OverlayPlan(Frozen):
    """A new qcow2 file over an existing image."""

    target: str
    path: AbsolutePath
    partial: AbsolutePath
    """Its name until it is complete; carries the job's token, so it is surely ours."""
    backing: AbsolutePath
    backing_format: str
    virtual_size_bytes: NonNegativeInt
    cluster_size_bytes: PositiveInt | None = None
    extended_l2: bool = False
    place: Place = Place.NEW
    on_device: bool = False
    """It is or is to be on a block device."""


class PivotPlan(Frozen):
    """One disk's move from the image it is on to an overlay."""

    overlay: OverlayPlan
    node: str
    """The node that becomes the frozen image."""
    overlay_node: str
    fdset_id: NonNegativeInt
    qdev: str | None = None
    chain: tuple[FileIdentity, ...]
    cache_direct: bool = False
    cache_no_flush: bool = False
    detect_zeroes: str = "off"
    bitmaps: tuple[BitmapPlan, ...] = ()

    @property
    def target(self) -> str:
        return self.overlay.target

    @property
    def file_node(self) -> str:
        """The protocol node below the overlay's format node."""
        return f"{self.overlay_node}-f"


class CheckpointPlan(Frozen):
    """One checkpoint, from request to commit."""

    kind: Literal["create"] = "create"
    token: str
    """Eight random hex digits, in the name of everything temporary."""
    vm: VmName
    name: SnapshotName
    parent: SnapshotName | None
    description: str
    labels: dict[str, str]
    requested_at: AwareDatetime
    strategy: Strategy | None
    """None: disk-only."""
    image_format: ImageFormat | None
    was_running: bool
    holds: bool = False
    """The guest is not resumed afterwards: its QEMU is about to be ended."""
    reason: str
    """Name of the `Condition` the VM is in."""
    capabilities: dict[str, bool]
    """Migration capabilities to change; only those that differ now."""
    capabilities_before: dict[str, bool]
    parameters: dict[str, Any]
    parameters_before: dict[str, Any]
    memory_file: AbsolutePath | None
    """None: disk-only."""
    memory_partial: AbsolutePath | None
    memory_fdset_id: NonNegativeInt | None
    """None: this QEMU cannot migrate to `file:`, it gets a named descriptor."""
    drained: bool
    """The image goes through a pipe of ours, whose reader never fails (QEMU < 10.0)."""
    cancellable: bool
    """Whether QEMU survives `migrate_cancel`; else the save is left to end, then discarded."""
    nodes_can_be_activated: bool
    """QEMU >= 10.0 has `blockdev-set-active`."""
    ram_bytes: NonNegativeInt
    precopy_limit_s: float
    precopy_limit_bytes: int
    on_limit: OnLimit
    hash_memory: bool
    pivots: tuple[PivotPlan, ...]
    left_out: tuple[DiskLayer, ...] = ()
    """Writable disks that stay on the image they are on; their `overlay` is None."""
    consistency: Consistency = Consistency.MEMORY
    """What it will be if all goes as planned."""
    keeps_metadata: bool = True
    committed: bool = False
    """Without metadata it is this, once written, that makes everything final."""
    halts: bool = False
    """QEMU is ended after the commit."""
    agent: AbsolutePath | None = None
    """The guest agent that freezes the file systems, and may have done so."""
    freeze_limit_s: float = 0.0
    manual: tuple[str, ...] = ()
    """Disks, left out too, that the storage takes a snapshot of while the guest is held."""
    hook: tuple[str, ...] = ()
    """Program and arguments that have it taken; empty: a person does, and resumes the guest."""
    hold_limit_s: float = 0.0
    notes: tuple[str, ...] = ()
    """What whoever asked should know of it."""

    @property
    def disk_only(self) -> bool:
        return self.strategy is None

    @property
    def stops_guest(self) -> bool:
        """Whether the guest may stand still because of this job."""
        return not self.disk_only or bool(self.manual)


class Launch(Frozen):
    """A QEMU to start: all that a launcher needs to know."""

    token: str
    """Goes into its environment, so that the process is recognised whoever starts it."""
    executable: AbsolutePath
    argv: tuple[str, ...]
    """With the name it is called by in front."""
    cwd: AbsolutePath
    uid: NonNegativeInt
    gid: NonNegativeInt
    groups: tuple[NonNegativeInt, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def command_line(self) -> str:
        """For people: quoted for a shell."""
        return shlex.join([self.executable, *self.argv[1:]])


class Loading(Frozen):
    """The memory that a started QEMU waits for."""

    memory_file: AbsolutePath
    image_format: ImageFormat
    view: AbsolutePath | None = None
    """Lazy: the RAM is a private mapping of `memory_file`, and this is what is loaded."""
    mapped: tuple[str, ...] = ()
    """Lazy: the RAM blocks that are mapped."""
    emptied: tuple[AbsolutePath, ...] = ()
    """Eager: files that RAM is shared in, which must not hold what the last QEMU left there."""
    on_demand: bool = False
    """QEMU may let the guest go on before it has read all pages, if it can."""


class Restore(Frozen):
    """A new QEMU on new overlays over a snapshot's frozen images."""

    token: str
    vm: VmName
    """The VM that will run."""
    name: SnapshotName
    """The snapshot it is put back to."""
    requested_at: AwareDatetime
    to_running: bool
    """Whether the guest goes on, or stands still as it was loaded."""
    launch: Launch
    loading: Loading | None
    """None: the snapshot holds no memory, the guest boots from its disks."""
    lazy_refusal: str | None = None
    """Why the memory is read eagerly, if mapping it was wanted."""
    overlays: tuple[OverlayPlan, ...]


class RevertPlan(Restore):
    """Putting a VM back to a snapshot."""

    kind: Literal["revert"] = "revert"
    was_running: bool
    """Whether the guest of the state that is left ran when it was asked for."""
    starts: bool = True
    """False: the VM stays shut off, and starts on the new overlays when somebody starts it."""
    fallback: Restore | None = None
    """How the state that is left comes back, once that has been kept as a snapshot."""
    holds: bool = False
    """The guest may stand still because of this job, once its state has been kept."""
    no_return: bool = False
    """The old QEMU has been told to end, or is about to be."""
    let_go: SnapshotName | None = None
    """The guest of this snapshot was told to go on, or is about to be: nothing must ever be
    loaded beneath it again."""


class ClonePlan(Restore):
    """Starting another VM from a snapshot of `source`."""

    kind: Literal["clone"] = "clone"
    source: VmName
    qmp: AbsolutePath
    files: tuple[AbsolutePath, ...] = ()
    """What its QEMU makes when it starts, under names that nobody had: sockets, logs."""
    pipes: tuple[AbsolutePath, ...] = ()
    """FIFOs that have to be there before."""
    notes: tuple[str, ...] = ()
    """What differs from the original, and what they share."""


class MergeBack(StrEnum):
    """How far undoing a checkpoint has come with what the guest wrote into its overlays."""

    BEGUN = "begun"
    """The images below are being written to: they are newer than the overlays, and not whole."""
    DONE = "done"
    """They hold all of it, on stable storage; the overlays are of no use any more."""


class JournalEntry(Frozen):
    """A plan under way, and for which process."""

    plan: Annotated[CheckpointPlan | RevertPlan | ClonePlan, Field(discriminator="kind")]
    pid: NonNegativeInt
    start_time_ticks: NonNegativeInt
    made: tuple[FileIdentity, ...] = ()
    """Files that the job has created, known once they exist; none is removed without this."""
    given: tuple[FileIdentity, ...] = ()
    """Files of others that its overlays are in: empty ones are known before they are written to,
    those that held something once they hold an overlay."""
    merge_back: MergeBack | None = None
    """None: nothing of it has begun."""
    unused: tuple[FileIdentity, ...] = ()
    """Overlays over the state that a revert leaves: nobody has written to them, and they go too."""
