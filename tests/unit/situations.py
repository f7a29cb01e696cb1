"""Situations to plan in, made by hand: a VM with one ordinary disk, any part replaceable."""

from pathlib import Path
from typing import Any

from qsnapd.model.snapshot import FileIdentity
from qsnapd.model.state import Condition
from qsnapd.qmp.migration import MigrationInfo
from qsnapd.snapshot.taking.situation import Situation
from qsnapd.vm.disks import Disk

CAPABILITIES = ("events", "xbzrle", "multifd", "pause-before-switchover", "background-snapshot")
DIRECTORY = Path("/store/vm1")


def disk(target: str = "vda", path: str | None = "/images/root.qcow2", **changes: Any) -> Disk:  # noqa: ANN401
    parts: dict[str, Any] = {
        "target": target,
        "device": "",
        "qdev": f"/machine/peripheral/{target}-device/virtio-backend",
        "node": f"{target}-node",
        "format": "qcow2",
        "filename": path or "",
        "chain": (FileIdentity(path=path, device=1, inode=2),) if path else (),
        "depth": 1,
        "virtual_size_bytes": 1 << 30,
        "cluster_size_bytes": 65536,
        "extended_l2": False,
        "cache_direct": False,
        "cache_no_flush": False,
        "detect_zeroes": "off",
        "bitmaps": (),
        "left_out": None,
    }
    return Disk(**{**parts, **changes})


def situation(*, major: int = 10, **changes: Any) -> Situation:  # noqa: ANN401
    """A running VM on QEMU *major*, which knows what that version knows."""
    new = major >= 10
    parts: dict[str, Any] = {
        "vm": "vm1",
        "condition": Condition.RUNNING_BOOTED,
        "status": "running",
        "running": True,
        "at_least_10": new,
        "commands": frozenset({"blockdev-set-active"} if new else ()),
        "capabilities": dict.fromkeys((*CAPABILITIES, *(["mapped-ram"] if new else [])), False),
        "background_refusal": None,
        "parameters": {"max-bandwidth": 1 << 27, "multifd-channels": 8, "downtime-limit": 300},
        "migration": MigrationInfo(),
        "jobs": (),
        "fdset_ids": frozenset(),
        "disks": (disk(),),
        "ram_bytes": 1 << 30,
        "snapshots": frozenset(),
        "current": None,
        "directory": DIRECTORY,
    }
    return Situation(**{**parts, **changes})
