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

from qsnapd.errors import CommandRefused, Effect, StoreError, VmError
from qsnapd.faults import Point
from qsnapd.image.files import remove_if_ours
from qsnapd.model.plan import CheckpointPlan, JournalEntry, OverlayPlan, PivotPlan, Place
from qsnapd.patience import Patience
from qsnapd.qmp.block import (
    BlockCommit,
    BlockdevDel,
    BlockdevSetActive,
    JobComplete,
    JobDismiss,
    QueryBlock,
    QueryJobs,
    QueryNamedBlockNodes,
)
from qsnapd.qmp.commands import CloseFd, QueryFdsets, RemoveFd
from qsnapd.qmp.migration import (
    MigrateSetCapabilities,
    MigrateSetParameters,
    QueryMigrateCapabilities,
)
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.taking.rescuing import make_save_again
from qsnapd.snapshot.taking.settling import give_back_run_state, settle_migration
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm

LOOK_EVERY_S = 0.1
"""Backstop between looks at something that also sends events."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Also what could never be made, because the request named an impossible path."""

_log = logging.getLogger(__name__)


async def put_back(vm: AttachedVm, entry: JournalEntry, patience: Patience) -> str | None:
    """Make VM and files as if the checkpoint of *entry* had never been asked for.

    The guest comes first: it runs again before the disks are merged back. *patience* hears of
    all that comes further.

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
    await _unpivot(vm.session, plan, patience)
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


async def _unpivot(session: QmpSession, plan: CheckpointPlan, patience: Patience) -> None:
    """Merge what the guest wrote into the overlays back, and drop the overlays."""
    in_use = {
        device.inserted.node_name
        for device in await session.execute(QueryBlock())
        if device.inserted is not None
    }
    # An attempt that was cut off may have left its job, all but dismissed.
    jobs = {job.id for job in await session.execute(QueryJobs())}
    pivoted = [
        pivot
        for pivot in plan.pivots
        if pivot.overlay_node in in_use or _commit_job(pivot) in jobs
    ]
    if not pivoted:
        return
    if plan.nodes_can_be_activated:
        await session.execute(BlockdevSetActive(active=True))
    with session.watch("JOB_STATUS_CHANGE") as events:
        for pivot in pivoted:
            await _start_commit(session, pivot)
        await patience.reach(Point.UNDO_MERGING)
        waiting = {_commit_job(pivot) for pivot in pivoted}
        completing: set[str] = set()
        done_bytes = 0
        while waiting:
            found = await session.execute(QueryJobs())
            if done_bytes != (done_bytes := sum(job.done_bytes for job in found)):
                patience.tick()
            for job in found:
                if job.id not in waiting:
                    continue
                if job.status == "ready" and job.id not in completing:
                    completing.add(job.id)
                    await session.execute(JobComplete(id=job.id))
                elif job.status == "concluded":
                    await session.execute(JobDismiss(id=job.id))
                    waiting.discard(job.id)
                    if job.error:
                        raise VmError(
                            f"the disks stay on their overlays: merging back failed: {job.error}",
                            effect=Effect.PARTIAL,
                        )
            if waiting:
                with trio.move_on_after(LOOK_EVERY_S):
                    await events.receive()


def _commit_job(pivot: PivotPlan) -> str:
    return f"{pivot.overlay_node}-undo"


async def _start_commit(session: QmpSession, pivot: PivotPlan) -> None:
    jobs = {job.id for job in await session.execute(QueryJobs())}
    if _commit_job(pivot) in jobs:
        return  # an earlier attempt was cut off after this
    try:
        await session.execute(
            BlockCommit(
                job_id=_commit_job(pivot), device=pivot.overlay_node, base_node=pivot.node
            )
        )
    except CommandRefused as exc:
        raise VmError(
            f"disk {pivot.target} stays on its overlay {pivot.overlay.path}: {exc}",
            effect=Effect.PARTIAL,
        ) from exc


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
    back = {name: state for name, state in plan.capabilities_before.items() if now[name] != state}
    if back:
        await session.execute(MigrateSetCapabilities.of(back))
    if plan.parameters_before:
        await session.execute(MigrateSetParameters(parameters=plan.parameters_before))


def remove_files(entry: JournalEntry) -> None:
    """Remove what the job created, and nothing else. Blocks: call it in a thread."""
    plan = entry.plan
    made = {(file.device, file.inode) for file in entry.made}
    for overlay in _overlays(entry):
        _remove_temporary(Path(overlay.partial))
        for device, inode in made:
            remove_if_ours(Path(overlay.path), device, inode)
        if overlay.place is Place.EMPTY:
            _empty_again(overlay, entry)
    if isinstance(plan, CheckpointPlan):
        if plan.memory_file is not None and plan.memory_partial is not None:
            _remove_temporary(Path(plan.memory_partial))
            for device, inode in made:
                remove_if_ours(Path(plan.memory_file), device, inode)
    elif plan.loading is not None and plan.loading.view is not None:
        _remove_temporary(Path(plan.loading.view))


def _empty_again(overlay: OverlayPlan, entry: JournalEntry) -> None:
    """Take out of somebody's file what was put there."""
    given = {(file.device, file.inode) for file in entry.given}
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
        if (status.st_dev, status.st_ino) in given and stat.S_ISREG(status.st_mode):
            os.ftruncate(fd, 0)
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
