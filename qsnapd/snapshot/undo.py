"""Putting a VM back to what it was before a checkpoint began.

Works from the plan alone: every step asks QEMU or the file system what there is, and removes
that. So it serves a job that failed or was cancelled, and equally a daemon that finds the
journal of one that was killed; doing it twice changes nothing.
"""

import errno
import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

import trio

from qsnapd.errors import (
    CommandRefused,
    DiskStalled,
    Effect,
    StoreError,
    VmError,
)
from qsnapd.faults import Point
from qsnapd.image.files import remove_if_ours, sync_file, sync_removals
from qsnapd.model.plan import (
    CheckpointPlan,
    JournalEntry,
    MergeBack,
    OverlayPlan,
    PivotPlan,
    Place,
)
from qsnapd.patience import Patience
from qsnapd.qmp.block import (
    BlockdevDel,
    BlockdevSetActive,
    QueryBlock,
    QueryNamedBlockNodes,
)
from qsnapd.qmp.commands import CloseFd, QueryFdsets, RemoveFd
from qsnapd.qmp.migration import (
    MigrateSetCapabilities,
    MigrateSetParameters,
    QueryMigrateCapabilities,
)
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.deleting.live import END_LIMIT_S, LiveMerges
from qsnapd.snapshot.taking.rescuing import make_save_again
from qsnapd.snapshot.taking.settling import give_back_run_state, settle_migration
from qsnapd.store.journal import Journal
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Also what could never be made, because the request named an impossible path."""

_log = logging.getLogger(__name__)


async def put_back(
    vm: AttachedVm, entry: JournalEntry, journal: Journal, patience: Patience
) -> str | None:
    """Make VM and files as if the checkpoint of *entry* had never been asked for.

    The guest comes first: it runs again before the disks are merged back, of which *journal*
    is kept. *patience* hears of all that comes further.

    On success: no overlay, node, descriptor set, changed capability or file is left. Returns
      what else had to be done for the guest to run, in words (`rescuing`).
    Raises: GuestLeftPaused: the guest ran and cannot be resumed. SessionLost and other
      VmErrors: not finished; calling it again with the same entry is right.
    """
    plan = entry.plan
    assert isinstance(plan, CheckpointPlan)
    done = await settle_migration(vm, plan, patience)
    await patience.reach(Point.UNDO_SAVE_SETTLED)
    await give_back_run_state(vm, plan)
    await patience.reach(Point.UNDO_GUEST_RUNS)
    await _unpivot(vm.session, entry, journal, patience)
    await patience.reach(Point.UNDO_MERGED)
    if plan.drained:
        await make_save_again(vm, plan)
        await patience.reach(Point.UNDO_SAVES_AGAIN)
    await release_qemu(vm.session, plan)
    await patience.reach(Point.UNDO_QEMU_RELEASED)
    for pivot in plan.pivots:
        await _remove_node(vm.session, pivot)
    await patience.reach(Point.UNDO_NODES_REMOVED)
    await in_thread(remove_files, entry)
    await patience.reach(Point.UNDO_FILES_REMOVED)
    return done


async def _unpivot(
    session: QmpSession, entry: JournalEntry, journal: Journal, patience: Patience
) -> None:
    """Merge what the guest wrote into the overlays back, and drop the overlays.

    When overlay and image hold the same, QEMU holds the guest's requests back until that is
    noted: so whoever finds the journal knows which of them the guest has gone on with.
    """
    plan = entry.plan
    assert isinstance(plan, CheckpointPlan)
    merges, parts = LiveMerges(session, plan.token), dict[int, float]()

    def told(number: int, part: float) -> None:
        if parts.get(number) != part:
            parts[number] = part
            patience.tick()

    await end_merges_back(session, entry)
    pivoted = await _pivoted(session, plan)
    if not pivoted:
        return
    if plan.nodes_can_be_activated:
        await session.execute(BlockdevSetActive(active=True))
    is_noted = await _note_begun(entry, journal)
    try:
        for number, pivot in enumerate(pivoted):
            await _start_back(merges, number, pivot)
        await patience.reach(Point.UNDO_MERGING)
        await merges.come_to_rest(told)
        if is_noted:
            await _note_done(entry, journal)
    except BaseException:
        with trio.move_on_after(END_LIMIT_S, shield=True):
            await merges.cancel()
        raise
    complaints = await merges.finalize()
    if pivoted := await _pivoted(session, plan):
        if is_noted:
            await _note(entry, MergeBack.BEGUN, journal)
        raise VmError(
            f"disk {pivoted[0].target} stays on its overlay {pivoted[0].overlay.path}: "
            f"{'; '.join(complaints) or 'QEMU gives no reason'}",
            effect=Effect.PARTIAL,
        )


async def _note_begun(entry: JournalEntry, journal: Journal) -> bool:
    """Whether the journal says that the images below are written to; a full disk is no obstacle.

    If it does not, whoever finds it refuses to merge into what is newer: then nothing is lost.
    Raises: StoreError: it says that they hold all of it, and cannot be made to say otherwise.
    """
    if entry.merge_back is MergeBack.BEGUN:
        return True
    try:
        await _note(entry, MergeBack.BEGUN, journal)
    except StoreError as exc:
        if entry.merge_back is not None or isinstance(exc, DiskStalled):  # it may yet be noted
            raise
        _log.warning("VM %s: undoing %s is not noted: %s", entry.plan.vm, entry.plan.name, exc)
        return False
    return True


async def _note_done(entry: JournalEntry, journal: Journal) -> None:
    """Note that the images below hold all of it, or surely that they do not. Raises: StoreError."""
    try:
        await _note(entry, MergeBack.DONE, journal)
        return
    except StoreError as exc:
        if isinstance(exc, DiskStalled):  # nothing else can be noted meanwhile
            raise
        failure = exc
    await _note(entry, MergeBack.BEGUN, journal)
    raise failure


async def end_merges_back(session: QmpSession, entry: JournalEntry) -> None:
    """Let no merge of an undoing that was cut off hold the guest's requests back. Idempotent.

    Raises: VmError.
    """
    merges = LiveMerges(session, entry.plan.token)
    if entry.merge_back is MergeBack.DONE:
        await merges.finalize()
    else:
        await merges.cancel()


async def _pivoted(session: QmpSession, plan: CheckpointPlan) -> list[PivotPlan]:
    in_use = {
        device.inserted.node_name
        for device in await session.execute(QueryBlock())
        if device.inserted is not None
    }
    return [pivot for pivot in plan.pivots if pivot.overlay_node in in_use]


async def _start_back(merges: LiveMerges, number: int, pivot: PivotPlan) -> None:
    try:
        await merges.start_back(number, pivot.overlay_node, pivot.node)
    except CommandRefused as exc:
        raise VmError(
            f"disk {pivot.target} stays on its overlay {pivot.overlay.path}: {exc}",
            effect=Effect.PARTIAL,
        ) from exc


async def _note(entry: JournalEntry, merge_back: MergeBack, journal: Journal) -> None:
    entry = entry.model_copy(update={"merge_back": merge_back})
    await in_thread(journal.write, entry)


async def _remove_node(session: QmpSession, pivot: PivotPlan) -> None:
    nodes = {node.node_name for node in await session.execute(QueryNamedBlockNodes())}
    if pivot.overlay_node in nodes:
        await session.execute(BlockdevDel(node_name=pivot.overlay_node))
    await _remove_fdset(session, pivot.fdset_id, pivot.overlay.path)


async def _remove_fdset(session: QmpSession, fdset_id: int, path: str) -> None:
    for fdset in await session.execute(QueryFdsets()):
        # The id alone proves nothing: somebody else may have taken it since.
        if fdset.fdset_id == fdset_id and any(fd.opaque == path for fd in fdset.fds):
            await session.execute(RemoveFd(fdset_id=fdset_id))


async def release_qemu(session: QmpSession, plan: CheckpointPlan) -> None:
    """Take back the memory descriptor, the capabilities and the parameters."""
    if plan.memory_file is None:
        return
    if plan.memory_fdset_id is not None and not plan.drained:
        await _remove_fdset(session, plan.memory_fdset_id, plan.memory_file)
    else:
        with suppress(CommandRefused):  # the migration has used it, or it was never sent
            await session.execute(CloseFd(fdname=f"qsnapd-{plan.token}"))
    now = {
        entry.capability: entry.state
        for entry in await session.execute(QueryMigrateCapabilities())
    }
    before = plan.capabilities_before.items()
    back = {name: state for name, state in before if now.get(name, state) != state}
    if back:
        await session.execute(MigrateSetCapabilities.of(back))
    if plan.parameters_before:
        await session.execute(MigrateSetParameters(parameters=plan.parameters_before))


def remove_files(entry: JournalEntry) -> None:
    """Remove what the job created, and nothing else; durable on return.

    Blocks: call it in a thread.
    """
    plan = entry.plan
    made = {file.inode for file in entry.made}
    touched = []
    for overlay in _overlays(entry):
        _remove_temporary(Path(overlay.partial))
        for inode in made:
            remove_if_ours(Path(overlay.path), inode)
        if overlay.place is Place.EMPTY:
            _empty_again(overlay, entry)
        touched += [overlay.partial, overlay.path]
    if isinstance(plan, CheckpointPlan):
        if plan.memory_file is not None and plan.memory_partial is not None:
            _remove_temporary(Path(plan.memory_partial))
            for inode in made:
                remove_if_ours(Path(plan.memory_file), inode)
            touched += [plan.memory_partial, plan.memory_file]
    elif plan.loading is not None and plan.loading.view is not None:
        _remove_temporary(Path(plan.loading.view))
    # Also what a former attempt has removed: it may have ended before this.
    sync_removals(Path(path).parent for path in touched)


def _empty_again(overlay: OverlayPlan, entry: JournalEntry) -> None:
    """Take out of somebody's file what was put there."""
    given = {file.inode for file in entry.given}
    try:
        fd = os.open(overlay.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (*_NOT_THERE, errno.ELOOP):
            return
        raise StoreError(
            f"cannot empty {overlay.path}: {exc.strerror}", effect=Effect.PARTIAL
        ) from exc
    try:
        status = os.fstat(fd)
        if status.st_ino in given and stat.S_ISREG(status.st_mode):
            os.ftruncate(fd, 0)
            sync_file(fd)
    finally:
        os.close(fd)


def _overlays(entry: JournalEntry) -> tuple[OverlayPlan, ...]:
    if isinstance(entry.plan, CheckpointPlan):
        return tuple(pivot.overlay for pivot in entry.plan.pivots)
    return entry.plan.overlays


def _remove_temporary(path: Path) -> None:
    """The name carries the job's token or lies in our staging folder: surely ours."""
    try:
        path.unlink()
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return
        raise StoreError(f"cannot remove {path}: {exc.strerror}", effect=Effect.PARTIAL) from exc
