"""What a client can ask for that changes a VM."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName
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
    snapshot: Literal["external", "no"] = "external"
    file: AbsolutePath | None = None
    """Where the overlay goes; by default beside the image it covers."""


class CreateRequest(Frozen):
    """Take a checkpoint. Everything has a default that suits most."""

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
    hash_memory: bool = False
    """Record a SHA-256 of the memory image: about a second of CPU per GiB, the guest running."""
    precopy_limit_s: PositiveFloat = 60.0
    precopy_limit_bytes: PositiveInt | None = None
    """By default four times the guest's RAM."""
    on_limit: OnLimit = OnLimit.STOP


class RevertRequest(Frozen):
    """Put the VM back to a snapshot."""

    name: SnapshotName
    state: Literal["running", "paused"] | None = None
    """By default what the guest did when the snapshot was taken."""
