"""A VM as a client sees it."""

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
    """Why the daemon does not talk to this VM's QEMU, if it does not."""
    qmp: str
    pid: NonNegativeInt | None = None
    uuid: str | None = None
    qemu_version: str | None = None
    machine: str | None = None
    ram_bytes: NonNegativeInt | None = None
    vcpus: NonNegativeInt | None = None
    snapshots: NonNegativeInt = 0
    current_snapshot: SnapshotName | None = None


class DiskInfo(Frozen):
    """One disk of a running VM."""

    target: str
    node: str
    format: str
    path: str | None
    virtual_size_bytes: NonNegativeInt
    chain_depth: NonNegativeInt
    left_out: str | None = None
    """Why a snapshot leaves this disk out ("read-only", "removable", ...), if it does."""
