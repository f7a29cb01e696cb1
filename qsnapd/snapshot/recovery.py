"""What to do about a job that a former daemon left behind.

The journals say what was intended, QEMU and the file system say how far it came. A VM may
have two: it was being put back to a snapshot, and its present state being kept first.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from qsnapd.errors import Effect, QsnapError, SessionLost, StoreError
from qsnapd.faults import Point, reach
from qsnapd.model.plan import (
    CheckpointPlan,
    ClonePlan,
    JournalEntry,
    MergeBack,
    PivotPlan,
    Restore,
    RevertPlan,
)
from qsnapd.patience import Patience
from qsnapd.qmp.agent import GuestAgent
from qsnapd.snapshot.merge import holds_data, merge_offline, require_unwritten
from qsnapd.snapshot.restoring.clone import finish_clone, settle_clone
from qsnapd.snapshot.restoring.revert import give_up_revert, is_same, undo_revert
from qsnapd.snapshot.restoring.start import runs_by
from qsnapd.snapshot.restoring.switch import (
    drop_revert,
    finish_return,
    finish_revert,
    settle_revert,
)
from qsnapd.snapshot.taking.committing import is_committed, settle_committed
from qsnapd.snapshot.taking.halt import end_vm
from qsnapd.snapshot.taking.rescuing import FREED, free_guest
from qsnapd.snapshot.taking.settling import give_back_run_state
from qsnapd.snapshot.taking.thaw import may_be_frozen, thaw_owed
from qsnapd.snapshot.undo import put_back, remove_files
from qsnapd.store.owed_thaw import forget_owed_thaw, read_owed_thaw
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import identify
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.proc import FileKey, find_launched, open_files
from qsnapd.vm.process import kill, still_runs, wait_gone

THAW_LIMIT_S = 10.0
"""Meanwhile the VM is not attached yet."""

_log = logging.getLogger(__name__)


async def recover(
    vm: AttachedVm,
    store: VmStore,
    *,
    qemu_img: str,
    launcher: Launcher,
    patience: Patience,
    agent: GuestAgent | None = None,
) -> str | None:
    """Finish or undo what the journals tell of, on a VM just attached; returns it in words.

    Idempotent: cut off anywhere, the next call goes on. None if there was nothing to do.
    Raises: what `put_back` raises; the journal then stands for the next attempt. SessionLost:
      the QEMU had not loaded its memory, and was ended: `Switch.go_on` starts another.
    """
    done = (
        await _recover_checkpoint(vm, store, qemu_img, launcher, agent, patience),
        await _recover_revert(vm, store),
        await _recover_clone(vm, store),
    )
    if done[1]:
        await launcher.abandon()
    return "; ".join(words for words in done if words) or None


async def rescue_left(store: VmStore) -> str | None:
    """Free a guest that QEMU has frozen when the drain of its save died with a former daemon.

    Needs no monitor: that is often frozen with the guest. All else is left to `recover`.
    Preconditions: no job of this daemon changes the VM.
    Returns what was done, in words; None if there was nothing to do. Idempotent.
    Raises: GuestLeftPaused: it could not be freed. VmError, StoreError.
    """
    entry = await in_thread(store.journal.read)
    if entry is None or not isinstance(plan := entry.plan, CheckpointPlan):
        return None
    if not plan.drained or await in_thread(is_committed, plan, store):
        return None
    try:
        identity = await in_thread(identify, entry.pid)
        if identity.start_time_ticks != entry.start_time_ticks:
            return None
        return FREED if await free_guest(plan.vm, identity) else None
    except SessionLost:
        return None  # it has ended


async def recover_without_qemu(store: VmStore, *, qemu_img: str) -> str | None:
    """The same when the QEMU that the job worked on is gone.

    What its guest wrote into the overlays of an unfinished snapshot is merged into the
    images below, because that is where the VM is started from again. A revert that has
    come past its point of no return is left for `Switch.go_on`.
    """
    done = (
        await _recover_dead_checkpoint(store, qemu_img),
        await _recover_dead_revert(store),
        await _recover_clone(None, store),
    )
    await in_thread(_forget_thaw_of_the_dead, store)
    return "; ".join(words for words in done if words) or None


def _forget_thaw_of_the_dead(store: VmStore) -> None:
    try:
        owed = read_owed_thaw(store)
        if owed is not None and not still_runs(owed.pid, owed.start_time_ticks):
            forget_owed_thaw(store)
    except StoreError as exc:
        _log.warning("VM %s: %s", store.vm, exc)


async def unfinished_revert(store: VmStore) -> JournalEntry | None:
    """The revert whose VM has ended and has not been started again, if there is one."""
    entry = await in_thread(store.restoring.read)
    return entry if entry is not None and is_to_go_on(entry) else None


def is_to_go_on(entry: JournalEntry) -> bool:
    """Whether the old QEMU of a revert was ended, and no guest has been let go since."""
    plan = entry.plan
    return isinstance(plan, RevertPlan) and plan.no_return and plan.let_go is None


async def _recover_checkpoint(
    vm: AttachedVm,
    store: VmStore,
    qemu_img: str,
    launcher: Launcher,
    agent: GuestAgent | None,
    patience: Patience,
) -> str | None:
    entry = await in_thread(store.journal.read)
    if entry is None:
        return None
    if not is_same(vm, entry):
        return await _recover_dead_checkpoint(store, qemu_img, vm.identity.pid)
    plan = entry.plan
    assert isinstance(plan, CheckpointPlan)
    if plan.agent is not None:
        await _thaw(vm, plan, store, agent)
    if await in_thread(is_committed, plan, store):
        # A guest that was to be ended, and has been let go since, has worked on.
        if is_ended := plan.halts and not vm.tracker.running:
            await end_vm(vm, launcher)
        else:
            await give_back_run_state(vm, plan)
        await settle_committed(vm, plan, store, patience, is_ended=is_ended)
        return f"finished the snapshot {plan.name}, which an earlier job had committed"
    done = await put_back(vm, entry, store.journal, patience)
    await _forget(plan, store)
    words = f"undid the unfinished snapshot {plan.name} of an earlier job"
    return f"{words}. {done}" if done else words


async def _thaw(
    vm: AttachedVm, plan: CheckpointPlan, store: VmStore, agent: GuestAgent | None
) -> None:
    """Thaw the guest before all that may take long; what fails is left to the daemon's `Thawer`."""
    await give_back_run_state(vm, plan)  # a guest that stands still thaws nothing
    try:
        await thaw_owed(vm, store, agent, limit_s=THAW_LIMIT_S)
    except QsnapError as exc:
        _log.warning("VM %s: %s (%s)", vm.name, may_be_frozen(vm.name), exc)


async def _recover_dead_checkpoint(
    store: VmStore, qemu_img: str, started_since: int | None = None
) -> str | None:
    """*started_since*: the process that the VM is now; what it was started on, stays."""
    entry = await in_thread(store.journal.read)
    if entry is None:
        return None
    plan = entry.plan
    assert isinstance(plan, CheckpointPlan)
    if await in_thread(is_committed, plan, store):
        if plan.keeps_metadata:
            await in_thread(store.set_current, plan.name)
        await in_thread(store.journal.clear)
        return f"finished the snapshot {plan.name}, whose QEMU has ended"
    used = await in_thread(_in_use, plan, started_since) if started_since is not None else ()
    if used:
        left = tuple(pivot for pivot in plan.pivots if pivot not in used)
        plan = plan.model_copy(update={"pivots": left})
        entry = entry.model_copy(update={"plan": plan})
    if entry.merge_back is not MergeBack.DONE:
        await _merge_overlays(store, entry, plan, qemu_img=qemu_img)
    await reach(Point.OFFLINE_MERGED)
    await in_thread(remove_files, entry)
    await reach(Point.OFFLINE_FILES_REMOVED)
    await _forget(plan, store)
    words = f"undid the unfinished snapshot {plan.name}, whose QEMU has ended"
    if not used:
        return words
    stay = ", ".join(pivot.overlay.path for pivot in used)
    return f"{words}; the VM was started on its overlays since, which stay: {stay}"


def _in_use(plan: CheckpointPlan, pid: int) -> tuple[PivotPlan, ...]:
    """The disks whose overlays the process has open. Blocks. Raises: SessionLost, VmError."""
    opened = open_files(pid)
    return tuple(pivot for pivot in plan.pivots if _key(pivot.overlay.path) in opened)


def _key(path: str) -> FileKey | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


async def _merge_overlays(
    store: VmStore, entry: JournalEntry, plan: CheckpointPlan, *, qemu_img: str
) -> None:
    """Merge all overlays into the images below; noted before, and when all of it is on disk."""
    inodes = frozenset(file.inode for file in (*entry.made, *entry.given))
    holding = []
    for pivot in plan.pivots:
        with _telling(plan, pivot):
            if await holds_data(pivot, inodes, qemu_img=qemu_img):
                if entry.merge_back is None:
                    await in_thread(require_unwritten, pivot, inodes)
                holding.append(pivot)
    if not holding:
        return
    await _note(store, entry, MergeBack.BEGUN)
    for pivot in holding:
        with _telling(plan, pivot):
            await merge_offline(pivot, inodes, qemu_img=qemu_img)
    await _note(store, entry, MergeBack.DONE)


async def _note(store: VmStore, entry: JournalEntry, merge_back: MergeBack) -> None:
    entry = entry.model_copy(update={"merge_back": merge_back})
    await in_thread(store.journal.write, entry)


@contextmanager
def _telling(plan: CheckpointPlan, pivot: PivotPlan) -> Iterator[None]:
    try:
        yield
    except StoreError as exc:
        raise StoreError(
            f"disk {pivot.target}: the unfinished snapshot {plan.name} has left the overlay "
            f"{pivot.overlay.path}, and it cannot be merged into {pivot.overlay.backing}: {exc}",
            effect=Effect.PARTIAL,
        ) from exc


async def _forget(plan: CheckpointPlan, store: VmStore) -> None:
    await in_thread(store.made.forget_gone)
    await in_thread(store.unstage, plan.name)
    await reach(Point.UNDO_UNSTAGED)
    await in_thread(store.journal.clear)
    await reach(Point.UNDONE)


async def _recover_revert(vm: AttachedVm, store: VmStore) -> str | None:
    """The old QEMU lives, or one that was started instead, or somebody else's."""
    entry = await in_thread(store.restoring.read)
    if entry is None or not isinstance(plan := entry.plan, RevertPlan):
        return None
    if await _runs(plan, entry, vm):
        await finish_revert(vm, entry, store)
        return f"finished the revert to {plan.name}, which an earlier job had begun"
    if plan.fallback is not None and await _runs(plan.fallback, entry, vm):
        await finish_return(vm, entry, store)
        return f"brought the VM back to {plan.fallback.name}, as the revert to {plan.name} failed"
    if plan.let_go is not None:
        return await _settle_let_go(entry, plan, store)
    if is_same(vm, entry):
        await undo_revert(vm, entry, store)
        return f"undid an unfinished revert to {plan.name}; the VM goes on as before"
    await drop_revert(entry, store)
    return f"undid an unfinished revert to {plan.name}; somebody else has started the VM since"


async def resume_reverted(vm: AttachedVm, entry: JournalEntry, store: VmStore) -> None:
    """Let the guest go on that a revert held, the old one or the new; leave all else to `recover`.

    Raises: VmError: it does not. StoreError.
    """
    plan = entry.plan
    assert isinstance(plan, RevertPlan)
    for restore in (plan, plan.fallback):
        made = entry.made if restore is plan else ()
        if (
            restore is not None
            and restore.name == plan.let_go
            and restore.to_running
            and await in_thread(runs_by, restore, made, vm.identity.pid)
        ):
            await vm.ensure_running()
    if is_same(vm, entry) and plan.holds:
        await give_up_revert(vm, entry, store)


async def _settle_let_go(entry: JournalEntry, plan: RevertPlan, store: VmStore) -> str:
    """The guest was let go, and its QEMU has ended since: what it did is on its disks."""
    if plan.let_go == plan.name:
        await settle_revert(plan, store)
    else:
        await in_thread(store.set_current, plan.let_go)
        await drop_revert(entry, store)
    return f"the VM had gone on from {plan.let_go}, and has ended since"


async def _recover_clone(vm: AttachedVm | None, store: VmStore) -> str | None:
    """A clone was registered, and its daemon died before its guest was told to go on.

    One that was not registered is undone before anybody looks for its QEMU (`undo_clone`).
    """
    entry = await in_thread(store.restoring.read)
    if entry is None or not isinstance(plan := entry.plan, ClonePlan):
        return None
    if vm is None and await in_thread(find_launched, plan.token) is not None:
        return None  # it only does not answer yet: its guest is still to be told
    if vm is None or not await in_thread(
        runs_by, plan, entry.made, vm.identity.pid
    ):
        await settle_clone(plan, store)
        return None
    await finish_clone(vm, plan, store)
    return f"finished cloning {plan.source} at {plan.name}, which an earlier job had begun"


async def _runs(plan: Restore, entry: JournalEntry, vm: AttachedVm) -> bool:
    """Whether *vm* was started by *plan*, and has loaded what it was started with.

    Raises: SessionLost: it has not, and was ended: with a guest that has not run, nothing
      is lost.
    """
    made = entry.made if plan is entry.plan else ()
    if not await in_thread(runs_by, plan, made, vm.identity.pid):
        return False
    if await vm.run_state() != "inmigrate":
        return True
    kill(vm.identity)
    await wait_gone(vm.identity)
    raise SessionLost(f"QEMU, which had not loaded snapshot {plan.name} yet, was ended")


async def _recover_dead_revert(store: VmStore) -> str | None:
    entry = await in_thread(store.restoring.read)
    if entry is None or not isinstance(plan := entry.plan, RevertPlan) or is_to_go_on(entry):
        return None
    if plan.let_go is not None:
        return await _settle_let_go(entry, plan, store)
    await drop_revert(entry, store)
    return f"undid an unfinished revert to {plan.name}; the VM has ended by itself"
