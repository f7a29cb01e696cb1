"""A VM that the daemon knows of though no configuration file names it: a clone."""

from typing import Literal

from pydantic import AwareDatetime

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.snapshot import AbsolutePath, FileIdentity, Machine


class Registration(Frozen):
    """As stored in `.vm.json`; its presence is the clone's existence."""

    format: Literal[1] = 1
    name: VmName
    qmp: AbsolutePath
    source: VmName
    """The VM that it is a copy of."""
    snapshot: SnapshotName
    """Of which instant. The clone's disks lie over that snapshot's images."""
    created_at: AwareDatetime
    overlays: tuple[FileIdentity, ...]
    """Disk images made for it, which hold what its guest has written."""
    files: tuple[FileIdentity, ...]
    """What its QEMU made when it started: sockets, logs."""


class SeenDisk(Frozen):
    """A disk that a VM can be started on again."""

    target: str
    chain: tuple[FileIdentity, ...]
    """Its images, newest first; that one is qcow2."""


class LastSeen(Frozen):
    """A clone as it last ran, stored in `.last-seen.json`: what it takes to start it again."""

    format: Literal[1] = 1
    machine: Machine
    disks: tuple[SeenDisk, ...]
