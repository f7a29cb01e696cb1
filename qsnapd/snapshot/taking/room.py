"""What snapshots may occupy: room on the disk, and the quotas that the administrator has set."""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qsnapd.errors import QuotaUsedUp, StoreFull
from qsnapd.image.files import free_bytes
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.store.snapshots import VmStore

DEVICE_STATE_BYTES = 64 << 20
"""Room for everything in an image that is not guest RAM."""
LOW_WATER_BYTES = 64 << 20
_BLOCK_BYTES = 512
"""The unit of st_blocks."""


@dataclass(frozen=True)
class Room:
    """What one VM's snapshots may occupy. Its methods block."""

    store: VmStore
    others: Callable[[], Sequence[VmStore]] = tuple
    """Returns what is stored of all other VMs."""
    low_water_bytes: int = LOW_WATER_BYTES
    """So much stays free on every file system that a snapshot is written to."""
    quota_bytes: int | None = None
    """Of this VM."""
    total_quota_bytes: int | None = None
    """Of all VMs."""

    def require(self, plan: CheckpointPlan) -> None:
        """Return if there is room for the snapshot of *plan*.

        Raises: StoreFull, QuotaUsedUp; TargetRefused: there is no such directory.
        """
        needed_bytes = image_bytes(plan)
        places = self.places(plan)
        for place in places:
            memory_bytes = needed_bytes if place == places[0] else 0
            wanted_bytes = memory_bytes + self.low_water_bytes
            if (free := free_bytes(place)) < wanted_bytes:
                raise StoreFull(str(place), needed_bytes=wanted_bytes, free_bytes=free)
        self._require_quota(plan.vm, needed_bytes)

    def _require_quota(self, vm: str, needed_bytes: int) -> None:
        own_bytes = occupied_bytes([self.store]) if self.quota_bytes is not None else 0
        if self.quota_bytes is not None and own_bytes + needed_bytes > self.quota_bytes:
            raise QuotaUsedUp(
                f"the snapshots of VM {vm}",
                needed_bytes=needed_bytes,
                used_bytes=own_bytes,
                quota_bytes=self.quota_bytes,
            )
        if self.total_quota_bytes is None:
            return
        all_bytes = occupied_bytes([self.store, *self.others()])
        if all_bytes + needed_bytes > self.total_quota_bytes:
            raise QuotaUsedUp(
                "the snapshots of all VMs",
                needed_bytes=needed_bytes,
                used_bytes=all_bytes,
                quota_bytes=self.total_quota_bytes,
            )

    def require_low_water(self, places: Iterable[Path]) -> None:
        """Return if enough is still free, while a snapshot is being written.

        Raises: StoreFull.
        """
        for place in places:
            if (free := free_bytes(place)) < self.low_water_bytes:
                raise StoreFull(
                    str(place), needed_bytes=self.low_water_bytes, free_bytes=free
                )

    def places(self, plan: CheckpointPlan) -> list[Path]:
        """The folders that a snapshot is written to, that of its memory first, if it has one."""
        memory = [_memory_folder(plan, self.store)] if plan.memory_file is not None else []
        overlays = [
            Path(pivot.overlay.path).parent for pivot in plan.pivots if not pivot.overlay.on_device
        ]
        return list(dict.fromkeys([*memory, *overlays]))


def _memory_folder(plan: CheckpointPlan, store: VmStore) -> Path:
    assert plan.memory_file is not None, "it saves memory"
    folder = Path(plan.memory_file).parent
    # The snapshot's own folder does not exist yet.
    return store.directory if folder.parent == store.directory else folder


def image_bytes(plan: CheckpointPlan) -> int:
    """How large the memory image may become; 0 if there is none.

    A mapped-ram image is never larger than RAM; neither is a stream that sends each page
    once, but for a few bytes a page. A precopy stream may become as large as its limit.
    """
    if plan.memory_file is None:
        return 0
    needed_bytes = plan.ram_bytes
    if plan.image_format is ImageFormat.STREAM:
        needed_bytes += plan.ram_bytes // 256
        if plan.strategy is Strategy.PRECOPY:
            needed_bytes = max(needed_bytes, plan.precopy_limit_bytes)
    return needed_bytes + DEVICE_STATE_BYTES


def occupied_bytes(stores: Iterable[VmStore]) -> int:
    """What the snapshots' memory and the disk images that qsnapd has made occupy. Blocks.

    Raises: StoreError: the records cannot be read.
    """
    files = set[tuple[int, int]]()
    total_bytes = 0
    for store in stores:
        memories = [m.memory.path for m in store.snapshots().values() if m.memory is not None]
        for path in (*memories, *(made.file.path for made in store.made.files())):
            with suppress(OSError):  # it has just gone
                status = os.stat(path)
                if (status.st_dev, status.st_ino) not in files:  # a copy has a second name
                    files.add((status.st_dev, status.st_ino))
                    total_bytes += status.st_blocks * _BLOCK_BYTES
    return total_bytes


