"""What to do about a job that a former daemon left behind.

The journal says what was intended, QEMU and the file system say how far it came.
"""

import logging
from pathlib import Path

import trio

from qsnapd.errors import StoreError
from qsnapd.model.plan import CheckpointPlan, JournalEntry, RevertPlan
from qsnapd.snapshot.create import settle_committed
from qsnapd.snapshot.overlays import merge_offline
from qsnapd.snapshot.undo import give_back_run_state, put_back, remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import key_of

_log = logging.getLogger(__name__)


async def recover(vm: AttachedVm, store: VmStore, *, qemu_img: str) -> str | None:
    """Finish or undo the journal's job on a VM just attached; returns what was done, in words.

    Idempotent: cut off anywhere, the next call goes on. None if there was nothing to do.
    Raises: what `put_back` raises; the journal then stands for the next attempt.
    """
    entry = await trio.to_thread.run_sync(store.journal.read)
    if entry is None:
        return None
    same_process = (entry.pid, entry.start_time_ticks) == (
        vm.identity.pid,
        vm.identity.start_time_ticks,
    )
    plan = entry.plan
    if isinstance(plan, RevertPlan):
        return await _recover_revert(entry, plan, store, same_process=same_process)
    if not same_process:
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
        return await _recover_revert(entry, plan, store, same_process=False)
    if plan.name in store.snapshots():
        await trio.to_thread.run_sync(store.set_current, plan.name)
        await trio.to_thread.run_sync(store.journal.clear)
        return f"finished the snapshot {plan.name}, whose QEMU has ended"
    await _merge_overlays(plan, entry, qemu_img=qemu_img)
    await trio.to_thread.run_sync(remove_files, entry)
    await _forget(plan, store)
    return f"undid the unfinished snapshot {plan.name}, whose QEMU has ended"


async def _merge_overlays(plan: CheckpointPlan, entry: JournalEntry, *, qemu_img: str) -> None:
    made = {(file.device, file.inode) for file in entry.made}
    for pivot in plan.pivots:
        overlay = Path(pivot.overlay.path)
        if await trio.to_thread.run_sync(key_of, str(overlay)) not in made:
            continue
        try:
            await merge_offline(overlay, qemu_img=qemu_img)
        except StoreError as exc:
            raise StoreError(
                f"disk {pivot.target}: {overlay} may hold what the guest wrote after an "
                f"unfinished snapshot, and cannot be merged into {pivot.overlay.backing}: {exc}"
            ) from exc


async def _forget(plan: CheckpointPlan, store: VmStore) -> None:
    await trio.to_thread.run_sync(store.unstage, plan.name)
    await trio.to_thread.run_sync(store.journal.clear)


async def _recover_revert(
    entry: JournalEntry, plan: RevertPlan, store: VmStore, *, same_process: bool
) -> str:
    """A revert either had not yet ended the old QEMU, or left a new one or none behind."""
    if same_process:
        await trio.to_thread.run_sync(remove_files, entry)
        await trio.to_thread.run_sync(store.journal.clear)
        return f"undid an unfinished revert to {plan.name}; the VM had not been touched"
    _log.error(
        "VM %s: a revert to %s was cut off after the old QEMU had ended; its new disks are %s. "
        "Revert again to get there",
        plan.vm,
        plan.name,
        ", ".join(overlay.path for overlay in plan.overlays) or "none",
    )
    await trio.to_thread.run_sync(store.journal.clear)
    return f"gave up an unfinished revert to {plan.name}"
