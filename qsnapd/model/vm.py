"""A VM as a client sees it."""

from typing import Literal

from pydantic import NonNegativeInt

from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName


class VmInfo(Frozen):
    """One look at a VM."""

    name: VmName
    state: str
    """As virsh prints it, e.g. "paused"."""
    state_number: NonNegativeInt
    reason: str
    """As virsh prints it, e.g. "creating snapshot"."""
    reason_number: NonNegativeInt
    connected: bool
    problem: str | None = None
    """Why the daemon does not talk to this VM's QEMU, or what else is not in order."""
    qmp: str
    pid: NonNegativeInt | None = None
    uuid: str | None = None
    qemu_version: str | None = None
    machine: str | None = None
    ram_bytes: NonNegativeInt | None = None
    vcpus: NonNegativeInt | None = None
    snapshots: NonNegativeInt | None = None
    """How many it has; not known while its part of the store cannot be read."""
    current_snapshot: SnapshotName | None = None


DeviceKind = Literal["disk", "cdrom", "floppy"]


class DiskInfo(Frozen):
    """One disk of a running VM."""

    type: Literal["file", "block"] = "file"
    """What the newest image lies in."""
    device: DeviceKind = "disk"
    target: str
    node: str
    format: str
    path: str | None
    virtual_size_bytes: NonNegativeInt
    size_bytes: NonNegativeInt | None = None
    """Of the newest image's file, holes included; null if that is none."""
    allocated_bytes: NonNegativeInt | None = None
    """How much of that there is."""
    chain_depth: NonNegativeInt
    left_out: str | None = None
    """Why a snapshot leaves this disk out ("read-only", "removable", ...), if it does."""
