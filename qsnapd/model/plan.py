"""What a job is going to do, decided in full before it touches anything.

A plan names every file, node and descriptor set it will ever use. Written to the journal
before the first step, it is all that undoing or finishing the job needs: whoever does that
asks QEMU and the file system which of these things exist.
"""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field, NonNegativeInt, PositiveInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.request import OnLimit
from qsnapd.model.snapshot import AbsolutePath, FileIdentity, ImageFormat, Strategy


class BitmapPlan(Frozen):
    """A dirty bitmap that the overlay carries on."""

    name: str
    granularity_bytes: PositiveInt


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
    strategy: Strategy
    image_format: ImageFormat
    was_running: bool
    reason: str
    """Name of the `Condition` the VM is in."""
    capabilities: dict[str, bool]
    """Migration capabilities to change; only those that differ now."""
    capabilities_before: dict[str, bool]
    parameters: dict[str, Any]
    parameters_before: dict[str, Any]
    memory_file: AbsolutePath
    memory_partial: AbsolutePath
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


class RevertPlan(Frozen):
    """Putting a VM back to a snapshot."""

    kind: Literal["revert"] = "revert"
    token: str
    vm: VmName
    name: SnapshotName
    requested_at: AwareDatetime
    to_running: bool
    """Whether the guest goes on, or stands still as it was loaded."""
    executable: AbsolutePath
    argv: tuple[str, ...]
    cwd: AbsolutePath
    memory_file: AbsolutePath
    image_format: ImageFormat
    overlays: tuple[OverlayPlan, ...]


class JournalEntry(Frozen):
    """A plan under way, and for which process."""

    plan: Annotated[CheckpointPlan | RevertPlan, Field(discriminator="kind")]
    pid: NonNegativeInt
    start_time_ticks: NonNegativeInt
    made: tuple[FileIdentity, ...] = ()
    """Files that the job has created, known once they exist; none is removed without this."""
