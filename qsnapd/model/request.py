"""What a client can ask for that changes a VM."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.snapshot import AbsolutePath, ImageFormat, Strategy


class OnLimit(StrEnum):
    """What a precopy does that reached its limit without converging."""

    STOP = "stop"
    """Stop the guest, so that what is left is copied in one go."""
    ABORT = "abort"
    """Give up; nothing has changed."""


class DiskRequest(Frozen):
    """What to do with one disk; disks that are not named follow the default."""

    target: str = Field(min_length=1)
    """The disk's target ("vda"), node name, device id, or the path of its image."""
    snapshot: Literal["external", "no", "manual"] = "external"
    """MANUAL: the storage takes its own snapshot of it, while the guest is held for that."""
    file: AbsolutePath | None = None
    """Where the overlay goes; by default beside the image it covers."""
    target_type: Literal["file", "block"] = "file"
    """What `file` is. An overlay on a block device takes over whatever that held."""


class CreateRequest(Frozen):
    """Take a snapshot: a checkpoint, unless `disk_only`. Everything has a default."""

    name: SnapshotName | None = None
    """By default the time in UTC."""
    description: str = Field(default="", max_length=4096)
    labels: dict[str, str] = Field(default_factory=dict)
    live: bool = False
    """Ignored if `strategy` is given."""
    strategy: Strategy | None = None
    image_format: ImageFormat | None = None
    memory_file: AbsolutePath | None = None
    disks: tuple[DiskRequest, ...] = ()
    hash_memory: bool = True
    """Record a SHA-256 of the memory image: about a second of CPU per GiB, the guest running."""
    precopy_limit_s: PositiveFloat = 60.0
    precopy_limit_bytes: PositiveInt | None = None
    """By default four times the guest's RAM."""
    on_limit: OnLimit = OnLimit.STOP
    disk_only: bool = False
    """Leave the memory out: the guest is not paused, its disks are those of a sudden power-off."""
    quiesce: bool = False
    """Disk-only: have the guest agent freeze the file systems meanwhile."""
    reuse_overlays: bool = False
    """The overlays' files exist already, made by the caller, each over the image it is to cover."""
    keep_metadata: bool = True
    """False: the disks move and the memory is saved, but no snapshot of it is listed."""
    halt: bool = False
    """End the VM's QEMU after success; the guest is not shut down first."""
    hold_limit_s: PositiveFloat | None = None
    """How long the guest may be held for manual disks; by default what the configuration says."""


class Descendants(StrEnum):
    """Which snapshots a deletion means."""

    NONE = "none"
    """The named one alone."""
    TOO = "too"
    """The named one and all that come from it."""
    ONLY = "only"
    """All that come from the named one; it stays."""


class DeleteRequest(Frozen):
    """Delete snapshots; what was written after them stays what the VM sees."""

    name: SnapshotName
    descendants: Descendants = Descendants.NONE
    metadata_only: bool = False
    """Forget them, and leave every file where it is."""


class PruneRequest(Frozen):
    """Delete the snapshots that need not be kept. The current one always is."""

    keep_last: PositiveInt
    """How many of the newest are kept; one that is being deleted does not count."""
    keep_within_s: PositiveFloat | None = None
    """Those taken so long ago, or later, are kept as well."""


class Memory(StrEnum):
    """How memory gets into a QEMU."""

    LAZY = "lazy"
    """A private mapping of the image: pages are read when the guest touches them."""
    EAGER = "eager"
    """All of it is read before the guest goes on."""


class RestoreRequest(Frozen):
    """What all ways to start from a snapshot have in common."""

    name: SnapshotName
    state: Literal["running", "paused"] | None = None
    """By default what the guest did when the snapshot was taken; without memory, not started."""
    memory: Memory | None = None
    """By default lazy where image, VM and host allow it. LAZY: fail where they do not."""
    read_ahead: bool = False
    """Lazy: read the image in the background, so that later faults find it in memory."""
    force: bool = False
    """Go on in spite of differences between the snapshot's host and this one."""


class RevertRequest(RestoreRequest):
    """Put the VM back to a snapshot."""

    discard: bool = False
    """Give up the state that the VM is in, instead of keeping it as a snapshot first."""


class Identity(StrEnum):
    """What a clone does with something that should be one VM's own."""

    NEW = "new"
    KEEP = "keep"


class CloneRequest(RestoreRequest):
    """Start another VM from a snapshot, beside the one it was taken of."""

    clone: VmName
    """The new VM's name."""
    qmp: AbsolutePath | None = None
    """Where its monitor listens; by default beside the original's, named after the clone."""
    mac: Identity = Identity.NEW
    """NEW: once the guest has been reset. Until then it has what is in the memory image."""
    uuid: Identity = Identity.NEW
    """The same."""
    substitutes: dict[str, str] = Field(default_factory=dict, max_length=64)
    """What the clone uses in place of host's names that only one VM can have and qsnapd cannot
    make up: of network interfaces, devices, sockets of other programs, ports."""
