"""A running operation on a VM, as others see it."""

from enum import StrEnum

from pydantic import AwareDatetime, NonNegativeFloat, NonNegativeInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName


class JobKind(StrEnum):
    CREATE = "create"
    REVERT = "revert"
    CLONE = "clone"
    START = "start"
    DELETE = "delete"
    REPAIR = "repair"
    """Putting the store right, or taking in snapshots whose files are there."""
    EDIT = "edit"
    """Changing what is kept of a snapshot: its name, description or place in the tree."""


class Phase(StrEnum):
    """How far a job has come; every job goes down this list, skipping what it does not do."""

    WAITING = "waiting"
    """As many save their memory already as may at the same time; nothing is touched."""
    PREPARING = "preparing"
    """Checks, files, overlays: the guest runs and knows nothing."""
    FREEZING = "freezing"
    """The guest agent is asked to freeze the file systems."""
    SAVING = "saving"
    """Memory is being saved, the guest running or held."""
    HOLDING = "holding"
    """The guest stands still for the storage's own snapshot of its manual disks."""
    FINISHING = "finishing"
    """Syncing, sealing, verifying, hashing: the guest runs."""
    STARTING = "starting"
    """Revert, clone: QEMU is being started and loads its memory."""
    MERGING = "merging"
    """Delete: what was written later goes into the older image."""
    UNDOING = "undoing"
    """Failed or cancelled: everything goes back to what it was."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (Phase.DONE, Phase.FAILED, Phase.CANCELLED)


class Progress(Frozen):
    """How much of the memory has been saved or loaded."""

    done_bytes: NonNegativeInt = 0
    total_bytes: NonNegativeInt = 0
    rate_bytes_per_s: NonNegativeFloat = 0.0
    left_s: NonNegativeFloat | None = None

    @property
    def percent(self) -> float:
        return min(100.0, 100.0 * self.done_bytes / self.total_bytes) if self.total_bytes else 0.0


class JobInfo(Frozen):
    """One look at a job."""

    id: NonNegativeInt
    vm: VmName
    kind: JobKind
    snapshot: SnapshotName | None
    phase: Phase
    started_at: AwareDatetime
    elapsed_ms: NonNegativeFloat
    percent: NonNegativeFloat
    done_bytes: NonNegativeInt
    total_bytes: NonNegativeInt
    rate_bytes_per_s: NonNegativeFloat
    left_s: NonNegativeFloat | None
    kept: SnapshotName | None = None
    """The snapshot that the state before a revert was kept as."""
    notes: tuple[str, ...] = ()
    """What whoever asked should know, though nothing has failed."""
    instruction: str | None = None
    """A command line that a person must run now, for the job to go on."""
    error: str | None = None
