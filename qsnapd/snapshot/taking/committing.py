"""The moment from which on a snapshot exists, and what is tidied up behind it."""

from pathlib import Path

from qsnapd.faults import Point, reach_in_thread
from qsnapd.image.files import publish
from qsnapd.model.plan import CheckpointPlan, JournalEntry
from qsnapd.model.snapshot import Manifest
from qsnapd.patience import Patience
from qsnapd.snapshot.deleting.former_names import note_made
from qsnapd.snapshot.undo import release_qemu
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm


def commit(store: VmStore, entry: JournalEntry, manifest: Manifest) -> None:
    """Give the image its name, then the snapshot its existence. Blocks.

    Preconditions: the journal has *entry*; the image is complete and synced, the disks moved.
    On failure: the snapshot does not exist, and can be undone as before.
    Raises: TargetRefused, SnapshotExists, StoreError.
    """
    plan = entry.plan
    assert isinstance(plan, CheckpointPlan)
    partial_file = Path(plan.memory_partial) if plan.memory_partial else None
    if partial_file and partial_file.parent != store.partial_path(plan.name):
        assert plan.memory_file is not None, "it has a name to be given"
        publish(partial_file, Path(plan.memory_file))
    reach_in_thread(Point.COMMIT_MEMORY_NAMED)
    note_made(store.made, [pivot.overlay for pivot in plan.pivots], entry.made)
    reach_in_thread(Point.COMMIT_OVERLAYS_NOTED)
    if plan.keeps_metadata:
        store.commit(plan.name, manifest)
    else:
        committed = plan.model_copy(update={"committed": True})
        store.journal.write(entry.model_copy(update={"plan": committed}))


def is_committed(plan: CheckpointPlan, store: VmStore) -> bool:
    """Whether the job of *plan*, as it stands in the journal, has come past its commit."""
    return plan.name in store.snapshots() if plan.keeps_metadata else plan.committed


async def settle_committed(
    vm: AttachedVm,
    plan: CheckpointPlan,
    store: VmStore,
    patience: Patience,
    *,
    is_ended: bool = False,
) -> None:
    """Finish a snapshot that is committed; idempotent, so that a restart can do it too.

    *is_ended*: the VM's QEMU was ended since, as was asked for.
    """
    if plan.keeps_metadata:
        await in_thread(store.set_current, plan.name)
    await patience.reach(Point.SETTLE_CURRENT_SET)
    if not is_ended:
        await release_qemu(vm.session, plan)
    await patience.reach(Point.SETTLE_QEMU_RELEASED)
    await in_thread(store.journal.clear)
    await patience.reach(Point.SETTLED)
