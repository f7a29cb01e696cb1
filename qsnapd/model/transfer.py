"""A snapshot outside of any store: what `export.json` says, and what a client asks for.

An exported snapshot is a folder, or a tar stream, of plain files beside `export.json`. It
leans on nothing else: disks are whole, or have their whole chain beside them.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName
from qsnapd.model.snapshot import AbsolutePath, Instant, Manifest, Sha256

EXPORT_NAME = "export.json"
EXPORT_FORMAT = 1
MEMORY_NAME = "memory.img"

DiskFileName = Annotated[str, Field(pattern=r"^disk-[a-z0-9][a-z0-9.-]*$", max_length=100)]
"""One part of a path, and none that qsnapd gives to anything else."""
FILE_LIMIT_BYTES = 1 << 44
FileSize = Annotated[int, Field(ge=0, le=FILE_LIMIT_BYTES)]


class ExportedFile(Frozen):
    """One file of an export, to the last byte."""

    size_bytes: FileSize
    data_bytes: FileSize
    """Without its holes, which read as zeros."""
    sha256: Sha256
    """Of all of it, as `sha256sum` prints it."""


class ExportedImage(ExportedFile):
    """One image of a disk."""

    name: DiskFileName
    format: Literal["qcow2", "raw"]


class ExportedDisk(Frozen):
    """One disk as the snapshot has it."""

    target: str
    images: Annotated[tuple[ExportedImage, ...], Field(min_length=1, max_length=256)]
    """The newest first; each names the next one as its backing file, by its bare name."""


class Export(Frozen):
    """`export.json`: written last into a folder, first into a tar stream."""

    export: Literal[1] = 1
    """Counts changes of this file's layout."""
    exported_at: Instant
    snapshot: Manifest
    """As it was where it was taken; its paths mean nothing elsewhere."""
    memory: ExportedFile | None
    disks: Annotated[tuple[ExportedDisk, ...], Field(max_length=256)]
    """In the order of the snapshot's."""

    @model_validator(mode="after")
    def _is_the_snapshot(self) -> Self:
        targets = [disk.target for disk in self.disks]
        if targets != [disk.target for disk in self.snapshot.disks]:
            raise ValueError("the disks are not those of the snapshot")
        if len(set(targets)) < len(targets):
            raise ValueError("two disks have the same name")
        if (self.memory is None) != (self.snapshot.memory is None):
            raise ValueError("the memory image is not that of the snapshot")
        names = list(self.files())
        if len(names) != sum(len(disk.images) for disk in self.disks) + bool(self.memory):
            raise ValueError("two files have the same name")
        return self

    def files(self) -> dict[str, ExportedFile]:
        """All files but `export.json` by name, in the order in which a tar stream has them."""
        memory = {MEMORY_NAME: self.memory} if self.memory else {}
        return memory | {i.name: i for disk in self.disks for i in disk.images}

    @property
    def data_bytes(self) -> int:
        return sum(file.data_bytes for file in self.files().values())


class ExportRequest(Frozen):
    """Write a snapshot, complete in itself, to where another host can get it."""

    name: SnapshotName
    directory: AbsolutePath | None = None
    """Made for it, it must not exist. None: a tar stream, to the descriptor sent along."""
    chained: bool = False
    """Copy each disk's images one by one, instead of one image with all that they hold."""


class ImportRequest(Frozen):
    """Make an exported snapshot one of a VM's own."""

    directory: AbsolutePath | None = None
    """Where `export.json` is. None: a tar stream, from the descriptor sent along."""
    name: SnapshotName | None = None
    """By default the name it had."""
    disk_directory: AbsolutePath | None = None
    """Where a folder with the disks' images is made, which belongs to whom this one does; by
    default they lie with the snapshot, where only root and the daemon's user can use them."""


class ScanOutcome(StrEnum):
    """What has become of a snapshot that was found."""

    IMPORTED = "imported"
    PRESENT = "present"
    """It is the VM's already."""
    REFUSED = "refused"
    """It is not whole, not this VM's, or not understood; `detail` says which."""


class Scanned(Frozen):
    """One description of a snapshot that was found in a folder."""

    path: str
    name: SnapshotName | None
    """None: it is not understood."""
    outcome: ScanOutcome
    detail: str = ""
    """A sentence for people."""
    notes: tuple[str, ...] = ()
    """What was taken on trust."""


class ScanResult(Frozen):
    """All that was found."""

    found: tuple[Scanned, ...]
    current: SnapshotName | None = None
    """The snapshot that has become the current one, if there was none."""


class TransferProgress(Frozen):
    """How far an export or import has come."""

    step: str
    done_bytes: NonNegativeInt
    total_bytes: NonNegativeInt
    """Estimated: a flattened disk may turn out smaller."""
