"""What deleting one snapshot is going to do, decided in full before it touches anything.

It is its own journal: `done` says of each merge that all it has to copy is on stable storage
where it belongs, so that only names are left to be put right.
"""

from typing import Literal

from pydantic import NonNegativeInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.snapshot import FileIdentity, Manifest


class Image(Frozen):
    """One image file, as it was found."""

    file: FileIdentity
    format: Literal["qcow2", "raw"]
    made: bool
    """qsnapd has made it, and may remove it when nothing needs it."""

    @property
    def path(self) -> str:
        return self.file.path

    @property
    def key(self) -> tuple[int, int]:
        """Which file it is, as long as the host is not started again."""
        return self.file.device, self.file.inode


class Merge(Frozen):
    """Two images, one right over the other, that become one."""

    target: str
    """The disk's name."""
    kind: Literal["commit", "stream"]
    """COMMIT: what is in `upper` goes into `lower`, and `upper` is needed no more. STREAM: what
    is in `lower` goes into `upper`, which then lies over `below`."""
    lower: Image
    upper: Image
    below: Image | None = None
    above: tuple[Image, ...] = ()
    """COMMIT: what lies over `upper`, and is to lie over `lower`."""
    was_active: bool = False
    """COMMIT: a guest wrote to `upper` when this was planned, and goes on writing to `lower`."""
    size_bytes: NonNegativeInt = 0
    """About how much there is to copy."""
    done: bool = False

    @property
    def source(self) -> Image:
        """What is empty of purpose afterwards."""
        return self.upper if self.kind == "commit" else self.lower

    @property
    def destination(self) -> Image:
        """Where the data goes."""
        return self.lower if self.kind == "commit" else self.upper


class DeletePlan(Frozen):
    """Deleting one snapshot, from request to its end."""

    format: Literal[1] = 1
    token: str
    """Eight random hex digits, in the name of everything temporary."""
    vm: VmName
    name: SnapshotName
    parent: SnapshotName | None
    """Of the snapshot: its children's parent afterwards."""
    manifest: Manifest
    """Of the snapshot, as it was."""
    was_current: bool
    pid: NonNegativeInt = 0
    """Of the QEMU that runs the VM; 0: none did."""
    start_time_ticks: NonNegativeInt = 0
    merges: tuple[Merge, ...]
    doomed: tuple[FileIdentity, ...] = ()
    """Files of ours that nothing needs then."""
    switched: bool = False
    """Some merges may have been switched, and others were not: there is no way back."""
    memory: FileIdentity | None = None
    """The memory image, if it lies outside of the snapshot's folder."""
    notes: tuple[str, ...] = ()

    @property
    def commits(self) -> bool:
        """Whether the snapshot's own state is overwritten on the way."""
        return any(merge.kind == "commit" for merge in self.merges)

    @property
    def done(self) -> bool:
        return all(merge.done for merge in self.merges)
