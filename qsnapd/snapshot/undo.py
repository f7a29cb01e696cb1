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

from qsnapd.errors import CommandRefused, Effect, GuestLeftPaused, StoreError, VmError
from qsnapd.image.files import remove_if_ours
from qsnapd.model.plan import CheckpointPlan, JournalEntry, OverlayPlan, PivotPlan, Place
from qsnapd.model.state import Condition
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
    MigrateCancel,
    MigrateContinue,
    MigrateSetCapabilities,
    MigrateSetParameters,
    QueryMigrate,
    QueryMigrateCapabilities,
)
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.taking.rescuing import make_save_again, settle_drained
from qsnapd.vm.attached import AttachedVm

CANCEL_PATIENCE_S = 1.0
LOOK_EVERY_S = 0.1
"""Backstop between looks at something that also sends events."""

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Also what could never be made, because the request named an impossible path."""

_log = logging.getLogger(__name__)


async def put_back(vm: AttachedVm, entry: JournalEntry) -> str | None:
    """Make VM and files as if the checkpoint of *entry* had never been asked for.

    The guest comes first: it runs again before the disks are merged back.

    On success: no overlay, node, descriptor set, changed capability or file is left. Returns
      what else had to be done for the guest to run, in words (`rescuing`).
    Raises: GuestLeftPaused: the guest ran and cannot be resumed. SessionLost and other
      VmErrors: not finished; calling it again with the same entry is right.
    """
    plan = entry.plan
    assert isinstance(plan, CheckpointPlan)
    done = await settle_migration(vm, plan)
    await give_back_run_state(vm, plan)
    await _unpivot(vm.session, plan)
    if plan.drained:
        await make_save_again(vm, plan)
    await release_qemu(vm.session, plan)
    for pivot in plan.pivots:
        await _remove_node(vm.session, pivot)
    await trio.to_thread.run_sync(remove_files, entry)
    return done


async def settle_migration(vm: AttachedVm, plan: CheckpointPlan) -> str | None:
    """Return when no migration of ours is under way any more, by cancelling or by waiting.

    Cancelling is right only where QEMU survives it; elsewhere the save runs to its end. Returns
    what had to be done to the guest for that, in words.
    """
    if plan.disk_only:
        return None
    if plan.drained:
        return await settle_drained(vm, plan)
    session = vm.session
    with session.watch("MIGRATION") as events:
        cancelled_s: float | None = None
        while (await session.execute(QueryMigrate())).active:
            if plan.cancellable and cancelled_s is None:
                await session.execute(MigrateCancel())
                cancelled_s = trio.current_time()
            elif cancelled_s and trio.current_time() - cancelled_s > CANCEL_PATIENCE_S:
                await _kick(session)
            with trio.move_on_after(LOOK_EVERY_S):
                await events.receive()
    return None


async def _kick(session: QmpSession) -> None:
    """Wake a QEMU that was cancelled in the very moment of its switchover.

    It then waits for `migrate-continue`, in a state in which it says "cancelling", with the
    guest stopped, for ever (seen on 7.2). The command takes the state it is to be in.
    """
    with suppress(CommandRefused):  # it has moved on by itself
        await session.execute(MigrateContinue(state="cancelling"))


async def give_back_run_state(vm: AttachedVm, plan: CheckpointPlan) -> None:
    """Make a guest run that ran before, unless it stands still for another reason.

    Raises: GuestLeftPaused: it cannot be made to.
    """
    if not plan.stops_guest or not vm.tracker.is_to_run(ran_before=plan.was_running):
        return
    try:
        await vm.ensure_running()
    except VmError as exc:
        vm.tracker.become(Condition.PAUSED_API_ERROR)
        raise GuestLeftPaused(
            f"VM {plan.vm} is paused and could not be resumed ({exc}): look at QEMU's log, then "
            f"try qsnapctl resume {plan.vm}",
            effect=Effect.GUEST_PAUSED,
        ) from exc


async def _unpivot(session: QmpSession, plan: CheckpointPlan) -> None:
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
        waiting = {_commit_job(pivot) for pivot in pivoted}
        completing: set[str] = set()
        while waiting:
            for job in await session.execute(QueryJobs()):
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
    before = plan.capabilities_before.items()
    back = {name: state for name, state in before if now.get(name, state) != state}
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
