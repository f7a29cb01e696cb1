"""What to do about a job that a former daemon left behind.

The journal says what was intended, QEMU and the file system say how far it came.
"""

import trio

from qsnapd.errors import Effect, StoreError
from qsnapd.model.plan import CheckpointPlan, JournalEntry, RevertPlan
from qsnapd.snapshot.create import settle_committed
from qsnapd.snapshot.merge import merge_offline
from qsnapd.snapshot.revert import finish_revert, is_started_by
from qsnapd.snapshot.undo import give_back_run_state, put_back, remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.process import kill, wait_gone


async def recover(vm: AttachedVm, store: VmStore, *, qemu_img: str) -> str | None:
    """Finish or undo the journal's job on a VM just attached; returns what was done, in words.

    Idempotent: cut off anywhere, the next call goes on. None if there was nothing to do.
    Raises: what `put_back` raises; the journal then stands for the next attempt.
    """
    entry = await trio.to_thread.run_sync(store.journal.read)
    if entry is None:
        return None
    plan = entry.plan
    if isinstance(plan, RevertPlan):
        return await _recover_revert(entry, plan, vm, store)
    if not is_same(vm, entry):
        return await recover_without_qemu(store, qemu_img=qemu_img)
    if plan.name in store.snapshots():
        await give_back_run_state(vm, plan)
        await settle_committed(vm, plan, store)
        return f"finished the snapshot {plan.name}, which a former daemon had committed"
    await put_back(vm, entry)
    await _forget(plan, store)
    return f"undid the unfinished snapshot {plan.name} of a former daemon"


async def recover_without_qemu(store: VmStore, *, qemu_img: str) -> str | None:
    """The same when the QEMU that the job worked on is gone.

    What its guest wrote into the overlays of an unfinished snapshot is merged into the
    images below, because that is where the VM is started from again.
    """
    entry = await trio.to_thread.run_sync(store.journal.read)
    if entry is None:
        return None
    plan = entry.plan
    if isinstance(plan, RevertPlan):
        return await _recover_revert(entry, plan, None, store)
    if plan.name in store.snapshots():
        await trio.to_thread.run_sync(store.set_current, plan.name)
        await trio.to_thread.run_sync(store.journal.clear)
        return f"finished the snapshot {plan.name}, whose QEMU has ended"
    await _merge_overlays(plan, entry, qemu_img=qemu_img)
    await trio.to_thread.run_sync(remove_files, entry)
    await _forget(plan, store)
    return f"undid the unfinished snapshot {plan.name}, whose QEMU has ended"


async def _merge_overlays(plan: CheckpointPlan, entry: JournalEntry, *, qemu_img: str) -> None:
    inodes = frozenset(file.inode for file in entry.made)
    for pivot in plan.pivots:
        try:
            await merge_offline(pivot, inodes, qemu_img=qemu_img)
        except StoreError as exc:
            raise StoreError(
                f"disk {pivot.target}: the unfinished snapshot {plan.name} has left the overlay "
                f"{pivot.overlay.path}, and it cannot be merged into {pivot.overlay.backing}: "
                f"{exc}",
                effect=Effect.PARTIAL,
            ) from exc


async def _forget(plan: CheckpointPlan, store: VmStore) -> None:
    await trio.to_thread.run_sync(store.unstage, plan.name)
    await trio.to_thread.run_sync(store.journal.clear)


async def _recover_revert(
    entry: JournalEntry, plan: RevertPlan, vm: AttachedVm | None, store: VmStore
) -> str:
    """A revert had not yet ended the old QEMU, or left a new one, loaded or not, or none."""
    if vm is not None and is_started_by(plan, vm.process):
        if await vm.run_state() != "inmigrate":
            await finish_revert(vm, plan, store)
            return f"finished the revert to {plan.name}, which a former daemon had begun"
        kill(vm.identity)  # it has not run: nothing is lost with it
        await wait_gone(vm.identity)
    untouched = vm is not None and is_same(vm, entry)
    await trio.to_thread.run_sync(remove_files, entry)
    await trio.to_thread.run_sync(store.journal.clear)
    if untouched:
        return f"undid an unfinished revert to {plan.name}; the VM had not been touched"
    return (
        f"undid an unfinished revert to {plan.name}; the VM had been ended for it: revert again, "
        "or start it on the disks it had"
    )


def is_same(vm: AttachedVm, entry: JournalEntry) -> bool:
    """Whether *vm* is the very process that the entry's job worked on."""
    return (entry.pid, entry.start_time_ticks) == (vm.identity.pid, vm.identity.start_time_ticks)
