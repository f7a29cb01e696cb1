"""What the guest agent knows of the guest's file systems, and a thaw that is owed to them."""

from pydantic import AwareDatetime, Field, NonNegativeInt

from qsnapd.model.base import Frozen
from qsnapd.model.snapshot import AbsolutePath


class Filesystem(Frozen):
    """One file system that is mounted in the guest, as the guest says."""

    mountpoint: str
    name: str
    """Of its device in the guest, e.g. "vda1"."""
    type: str
    devices: tuple[str, ...] = ()
    """The guest's names of the disks it lies on, e.g. "/dev/vda"."""
    total_bytes: NonNegativeInt | None = None
    used_bytes: NonNegativeInt | None = None


class OwedThaw(Frozen):
    """The file systems of this QEMU's guest were frozen by qsnapd, or are about to be."""

    agent: AbsolutePath
    pid: NonNegativeInt
    start_time_ticks: NonNegativeInt
    since: AwareDatetime
    why: str = Field(max_length=500)
    """What they were frozen for, in words."""
