"""The manifest: everything a restore needs and a person asks about one snapshot.

Its presence in the store is the snapshot's existence. `format` counts changes of this
file's layout, not of qsnapd.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, NonNegativeFloat

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName

MANIFEST_FORMAT = 3
"""The newest format this version reads and the one it writes.

1: as 2, without `memory.holes_are_zero`, `disks[].known_as` and `machine.cpu_features`.
2: as 3, without `consistency`, `left_out`, `manual_disks`, `deleting` and `memory.file`.
"""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=(128 << 10) - 1)]
"""As the kernel takes words and names: without the character that ends them, and not longer."""
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00]*$")]
Instant = Annotated[
    AwareDatetime, Field(ge=datetime(1970, 1, 1, tzinfo=UTC), lt=datetime(9000, 1, 1, tzinfo=UTC))
]
"""That can be told in every time zone."""
Count = Annotated[int, Field(ge=0, lt=1 << 64)]
"""Of bytes, or what the kernel numbers files by."""
Id = Annotated[int, Field(ge=0, lt=2**32 - 1)]
"""Of a user or group; the last one means "do not change" to the kernel."""


class Strategy(StrEnum):
    """How the guest's memory is captured."""

    STOPPED = "stopped"
    PRECOPY = "precopy"
    BACKGROUND = "background"


class ImageFormat(StrEnum):
    """How a memory image lies in its file."""

    STREAM = "stream"
    MAPPED_RAM = "mapped-ram"


class Consistency(StrEnum):
    """Why the disks of a snapshot make sense together."""

    MEMORY = "memory"
    """The memory of the same instant is there: what was not yet written is in it."""
    AGENT = "agent"
    """The guest's file systems were frozen."""
    PAUSED = "paused"
    """The guest stood still, which quiesces nothing but stops it from writing."""
    CRASH = "crash"
    """They are what a sudden power-off would have left."""


class FileIdentity(Frozen):
    """One file, recognised again under whatever name."""

    path: AbsolutePath
    device: Count
    inode: Count


class MemoryImage(Frozen):
    """The file holding one QEMU migration stream."""

    path: AbsolutePath
    size_bytes: Count
    allocated_bytes: Count
    sha256: Sha256 | None = None
    holes_are_zero: bool = False
    """mapped-ram: every page that is not in a bitmap reads as zeros, so RAM can be mapped."""
    file: FileIdentity | None = None
    """By which it is recognised before it is removed; None in format 1 and 2."""


class DiskLayer(Frozen):
    """One disk at the moment of the snapshot."""

    target: Annotated[str, Field(pattern=r"^[^/\x00]+$", max_length=128)]
    """The disk's short name, e.g. "vda"; a part of file names."""
    node: str
    """QEMU's node name of the frozen image."""
    qdev: str | None = None
    """QEMU's path or id of the device that used the disk."""
    frozen: AbsolutePath
    """The image that holds what the guest saw at that moment."""
    frozen_format: Text
    overlay: AbsolutePath | None
    """The image that took the guest's writes from then on; None if it came from another host."""
    virtual_size_bytes: Count
    chain: tuple[FileIdentity, ...]
    """The frozen image and its backing images, newest first."""
    known_as: tuple[FileIdentity, ...] = ()
    """Where these images were on another host: what the recorded command line names."""


class RamBlock(Frozen):
    """One block of guest RAM, by QEMU's id."""

    id: str
    size_bytes: Count


class Process(Frozen):
    """The QEMU process as it ran: what it takes to start it again."""

    exe: AbsolutePath
    argv: Annotated[tuple[Text, ...], Field(min_length=1)]
    cwd: AbsolutePath
    uid: Id
    gid: Id
    groups: tuple[Id, ...] = ()
    environment: tuple[tuple[Text, Text], ...] = ()
    """Only what QEMU and its libraries read, never the whole environment."""


class Machine(Frozen):
    """The virtual hardware."""

    type: Text
    """The versioned machine type QEMU resolved, e.g. "pc-i440fx-7.2"."""
    cpu: str | None = None
    cpu_features: tuple[str, ...] | None = None
    """What QEMU shows the guest of the host's CPU, by QEMU's names; None: not known."""
    uuid: str | None = None
    ram_bytes: Count
    ram_blocks: tuple[RamBlock, ...] = ()
    process: Process


class PauseParts(Frozen):
    """Where the pause window went; `paused_ms` is their sum and what lies between."""

    stop_ms: NonNegativeFloat = 0.0
    """The `stop` command: draining and flushing the disks."""
    pivot_ms: NonNegativeFloat = 0.0
    """The `transaction` that moved the disks to their overlays."""
    capture_ms: NonNegativeFloat = 0.0
    """From the start of the capture within the pause until the guest may run."""


class Manifest(Frozen):
    """One snapshot, as stored in `snapshot.json`."""

    format: Literal[1, 2, 3] = 3
    name: SnapshotName
    vm: VmName
    parent: SnapshotName | None = None
    description: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    created_at: Instant
    """The instant the snapshot shows: when the guest stopped, or its disks moved."""
    state: Literal["running", "paused"]
    """What the guest was doing, and does again after a restore."""
    reason: str
    """Name of the `Condition` at that time, e.g. PAUSED_USER."""
    strategy: Strategy | None
    """None: a disk-only snapshot."""
    image_format: ImageFormat | None
    paused_ms: NonNegativeFloat
    """From QEMU's STOP to its RESUME event, by QEMU's own clock; 0 if it did not run."""
    pause: PauseParts = PauseParts()
    total_ms: NonNegativeFloat
    """From the request to the moment before the commit."""
    memory: MemoryImage | None
    disks: tuple[DiskLayer, ...]
    qemu_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+", max_length=100)]
    qemu_package: str = ""
    machine: Machine
    consistency: Consistency | None = None
    """None: not recorded, by an older qsnapd."""
    left_out: tuple[DiskLayer, ...] = ()
    """Writable disks that are not part of it, and the image that each was on and stayed on."""
    manual_disks: tuple[str, ...] = ()
    """Targets of those among them that were left to their storage's own snapshot."""
    deleting: bool = False
    """Its images are being merged, or were when that was broken off: it cannot be restored."""

    @property
    def is_disk_only(self) -> bool:
        return self.strategy is None

    @property
    def is_mappable(self) -> bool:
        """Whether guest RAM may be a mapping of the image: holes stand for zero pages.

        Format 1 did not say; there a precopy image may hold what a page was before.
        """
        return (
            self.memory is not None
            and self.image_format is ImageFormat.MAPPED_RAM
            and (self.memory.holes_are_zero or self.strategy is not Strategy.PRECOPY)
        )
