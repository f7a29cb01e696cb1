"""What has to be true of VM and host before a deletion touches anything."""

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from qsnapd.errors import Blocked, WrongState
from qsnapd.image.files import require_space
from qsnapd.image.qcow2 import is_blank
from qsnapd.model.deletion import DeletePlan, Image
from qsnapd.model.snapshot import Manifest
from qsnapd.qmp.block import BlockdevSetActive, QueryJobs
from qsnapd.qmp.migration import QueryMigrate
from qsnapd.snapshot.deleting.finish import is_locked
from qsnapd.snapshot.deleting.plan import Scene
from qsnapd.store.registry import read_registration
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import key_of
from qsnapd.vm.proc import open_files


def refuse_mapped(store: VmStore, manifest: Manifest, snapshots: Mapping[str, Manifest]) -> None:
    """Refuse if something that runs needs the snapshot's memory. Blocks. Raises: WrongState."""
    image = key_of(manifest.memory.path) if manifest.memory else None
    is_shared = any(
        other.memory is not None and key_of(other.memory.path) == image
        for other in snapshots.values()
        if other.name != manifest.name
    )
    path = Path(manifest.memory.path) if manifest.memory and not is_shared else None
    store.leases.require_unused(manifest.name, path, may_use_disks=store.vm)


def require_nothing_unfinished(store: VmStore) -> None:
    """Refuse while a journal tells of another job: what it plans is nowhere else. Blocks.

    Raises: WrongState. StoreError.
    """
    for journal in (store.journal, store.restoring):
        if (entry := journal.read()) is not None:
            raise WrongState(
                f"VM {store.vm} has an unfinished job on snapshot {entry.plan.name}, which is "
                "finished or undone as soon as its QEMU answers: wait for that"
            )


def refuse_cloned(others: Iterable[VmStore], vm: str, name: str) -> None:
    """Refuse if a clone is to be started again from what is called so. Blocks.

    Raises: WrongState. StoreError.
    """
    found = ((other.vm, read_registration(other)) for other in others)
    clones = [clone for clone, r in found if r and (r.source, r.snapshot) == (vm, name)]
    if clones:
        raise WrongState(
            f"snapshot {name} of VM {vm} is in use: clones were made of it "
            f"({', '.join(sorted(clones))}), and are started again from it. Undefine them first"
        )


def refuse_newer(plan: DeletePlan, scene: Scene) -> None:
    """Refuse what would destroy what was written below an image of which nobody heard. Blocks.

    A VM that is shut off may have been started on its first image, when nobody looked. Others
    are written to by deletions as well.
    Raises: Blocked.
    """
    if plan.manifest.deleting or scene.live is not None:  # merging had begun to write there
        return
    for merge in plan.merges:
        is_newest = not merge.above and not scene.frozen_by(merge.upper.key, plan.name)
        if merge.kind != "commit" or not is_newest or merge.lower.made:
            continue
        lower, upper = os.stat(merge.lower.path), os.stat(merge.upper.path)
        is_file = stat.S_ISREG(lower.st_mode) and stat.S_ISREG(upper.st_mode)
        if is_file and lower.st_mtime_ns > upper.st_mtime_ns and not _is_blank(merge.upper):
            raise Blocked(
                f"disk {merge.target}: {merge.lower.path} was written to after "
                f"{merge.upper.path}, which lies over it: the VM has been started on the wrong "
                "one, and merging would destroy what it wrote. Look at both, and keep the right one"
            )


def _is_blank(image: Image) -> bool:
    fd = os.open(image.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return is_blank(fd)
    finally:
        os.close(fd)


def refuse_open(plan: DeletePlan, scene: Scene) -> None:
    """Refuse if another QEMU has images open that would be written to, or removed. Blocks.

    Raises: WrongState. SessionLost, VmError.
    """
    own = open_files(scene.pid) if scene.pid else {}
    offline = [m for m in plan.merges if scene.live_disk(m.upper.key) is None]
    files = [*(image.file for m in offline for image in (m.upper, m.destination)), *plan.doomed]
    for file in files:
        if (file.device, file.inode) not in own and is_locked(file):
            raise WrongState(
                f"{file.path} is open in a QEMU, or a tool of its, that is not VM {plan.vm} as "
                "qsnapd knows it: end that first"
            )


async def refuse_by_state(vm: AttachedVm) -> None:
    """Raises: WrongState, Blocked: QEMU cannot merge images now, and why."""
    status = await vm.run_state()
    if status in ("inmigrate", "prelaunch"):
        raise WrongState(f"VM {vm.name} has not started yet (QEMU says {status!r})")
    if status in ("postmigrate", "finish-migrate"):
        if "blockdev-set-active" not in vm.commands:
            raise WrongState(
                f"VM {vm.name} stands still after its state was saved, and QEMU {vm.version.text} "
                f"does not write to its disks then: resume it first (qsnapctl resume {vm.name})"
            )
        await vm.session.execute(BlockdevSetActive(active=True))
    jobs = await vm.session.execute(QueryJobs())
    if jobs:
        words = ", ".join(f"{job.id} ({job.type}, {job.status})" for job in jobs)
        raise Blocked(
            f"VM {vm.name}: block jobs are running: {words}. Wait for them or cancel them"
        )
    if (migration := await vm.session.execute(QueryMigrate())).active:
        raise Blocked(f"VM {vm.name}: a migration is under way (QEMU says {migration.status!r})")


def require_room(plan: DeletePlan, scene: Scene) -> None:
    """Refuse what would fill a file system that a guest writes to. Raises: StoreFull."""
    needed: dict[str, int] = {}
    for merge in plan.merges:
        target = scene.graph.images.get(merge.destination.key)
        if target is None or target.is_device:
            continue
        # An image never takes up much more than all of the disk.
        room_bytes = max(0, target.virtual_size_bytes - target.allocated_bytes)
        folder = merge.destination.path.rpartition("/")[0] or "/"
        needed[folder] = needed.get(folder, 0) + min(merge.size_bytes, room_bytes)
    for folder, needed_bytes in needed.items():
        if needed_bytes:
            require_space(Path(folder), needed_bytes)
