"""What a VM's own service must know to start it: left by the daemon, read by `qsnapd exec`.

    PENDING_DIR/VM/plan.json     what runs next in place of the service's command line, once
    PENDING_DIR/VM/taken.json    what was last taken to be run
    PENDING_DIR/VM/disks.json    where the disks are by now, for all other starts

The invariant: a plan is taken by one process at most. It is read by whoever is to become the
QEMU, as the user that QEMU runs as, and maybe before the daemon is up: so it lies apart from
the state directory, which is the daemon's alone, and survives a reboot. Everything here blocks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveFloat

from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName, check_name
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import FileIdentity
from qsnapd.store.handed import HandedFolder

_PLAN, _TAKEN, _DISKS = "plan.json", "taken.json", "disks.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Deadline(Frozen):
    """A moment of this boot of the host."""

    boot_id: str
    boottime_s: PositiveFloat

    @classmethod
    def after(cls, seconds: float) -> Self:
        return cls(boot_id=_boot_id(), boottime_s=_boottime_s() + seconds)

    @property
    def is_over(self) -> bool:
        return self.boot_id != _boot_id() or self.boottime_s < _boottime_s()


class PendingPlan(Frozen):
    """What to run instead."""

    vm: VmName
    launch: Launch
    until: Deadline | None
    """None: it waits for as long as it takes, over reboots too."""

    @property
    def is_over(self) -> bool:
        return self.until is not None and self.until.is_over


class NewestDisk(Frozen):
    """A disk that has been moved to an overlay."""

    target: str
    chain: Annotated[tuple[FileIdentity, ...], Field(min_length=1)]
    """Its images, newest first. Only that one may be written to; it is qcow2."""


class NewestDisks(Frozen):
    """Where the disks of a VM were when it was last seen."""

    vm: VmName
    disks: tuple[NewestDisk, ...]


@dataclass(frozen=True)
class Pending:
    """All of that for one VM."""

    vm: str
    folder: HandedFolder

    @classmethod
    def of(cls, pending_dir: Path, vm: str) -> Self:
        return cls(vm, HandedFolder(pending_dir / check_name(vm)))

    def put(self, plan: PendingPlan) -> None:
        """Make *plan* what runs next, in place of another; durable on return.

        On failure: what was pending is.
        Raises: StoreError.
        """
        self.folder.write(_PLAN, plan, uid=plan.launch.uid, gid=plan.launch.gid)

    def read(self) -> PendingPlan | None:
        """The plan that would be taken now; None if there is none. Raises: StoreError."""
        found = self.folder.read(_PLAN, PendingPlan)
        return None if found is None or found[0].is_over else found[0]

    def take(self) -> PendingPlan | None:
        """Take the plan, if there is one that still holds; nobody else gets it then.

        A plan that is over is removed. On failure: it stands as it was.
        Raises: StoreError: there may be one, but it cannot be had, so that nothing must be
          started in its place.
        """
        found = self.folder.read(_PLAN, PendingPlan)
        if found is None:
            return None
        plan, inode = found
        if plan.is_over:
            self.folder.remove(_PLAN)
            return None
        if not self.folder.rename(_PLAN, _TAKEN):
            return None  # somebody else took it, or it was withdrawn
        taken = self.folder.read(_TAKEN, PendingPlan)
        if taken is None or taken[1] == inode:
            return plan
        return taken[0]  # which the daemon has put there in between

    def put_back(self) -> None:
        """Undo `take`, if what was taken was not run; a newer plan stands. Raises: StoreError."""
        self.folder.rename_back(_TAKEN, _PLAN)

    def withdraw(self) -> None:
        """Have no plan pending; durable on return. Raises: StoreError."""
        self.folder.remove(_PLAN)

    def note(self, disks: Sequence[NewestDisk], *, uid: int, gid: int) -> None:
        """Write down where the disks are, for a QEMU of user *uid*. Raises: StoreError."""
        noted = NewestDisks(vm=self.vm, disks=tuple(disks))
        found = self.folder.read(_DISKS, NewestDisks)
        if found is None or found[0] != noted:
            self.folder.write(_DISKS, noted, uid=uid, gid=gid)

    def newest_disks(self) -> tuple[NewestDisk, ...]:
        """Where the disks are, as far as it was noted. Raises: StoreError."""
        found = self.folder.read(_DISKS, NewestDisks)
        return () if found is None else found[0].disks


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _boottime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
