"""What has to be true of VM and host before a deletion touches anything."""

from pathlib import Path

from qsnapd.errors import Blocked, WrongState
from qsnapd.image.files import require_space
from qsnapd.model.deletion import DeletePlan
from qsnapd.model.snapshot import Manifest
from qsnapd.qmp.block import BlockdevSetActive, QueryJobs
from qsnapd.qmp.migration import QueryMigrate
from qsnapd.snapshot.delete_plan import Scene
from qsnapd.store.leases import Leases
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import key_of


def refuse_mapped(leases: Leases, manifest: Manifest, scene: Scene) -> None:
    """Refuse if something that runs needs the snapshot's memory. Blocks. Raises: WrongState."""
    image = key_of(manifest.memory.path) if manifest.memory else None
    is_shared = any(
        other.memory is not None and key_of(other.memory.path) == image
        for other in scene.snapshots.values()
        if other.name != manifest.name
    )
    path = Path(manifest.memory.path) if manifest.memory and not is_shared else None
    leases.require_unused(manifest.name, path, may_use_disks=scene.vm)


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
