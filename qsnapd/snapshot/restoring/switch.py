"""From one QEMU to the next: the part of a revert behind its point of no return.

If the new QEMU does not load, the state that was kept is brought back. The journal says
which guest was let go before it is: whatever happens later, nothing is loaded beneath it.
"""

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from qsnapd.errors import (
    CommandRefused,
    Effect,
    QsnapError,
    ReplyTimeout,
    SessionLost,
    StoreError,
    VmError,
)
from qsnapd.faults import Point, reach
from qsnapd.image.files import remove_if_ours, sync_removals
from qsnapd.model.plan import JournalEntry, Restore, RevertPlan
from qsnapd.model.snapshot import Manifest
from qsnapd.model.state import Condition
from qsnapd.qmp.commands import Quit
from qsnapd.snapshot.deleting.former_names import note_made
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.revert_plan import require_no_qemu
from qsnapd.snapshot.restoring.start import Seat, make_view_again, start
from qsnapd.snapshot.undo import remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.process import wait_ended

DETACH_LIMIT_S = 30.0

_log = logging.getLogger(__name__)


class Switch:
    """Ends a VM's QEMU and starts another. Not to be cancelled: the caller shields it."""

    def __init__(self, seat: Seat, job: Job, left: tuple[str, ...] = ()) -> None:
        """*left*: what a state that is discarded is on; it stays."""
        self._seat = seat
        self._job = job
        self._left = left

    async def run(self, vm: AttachedVm | None, entry: JournalEntry) -> None:
        """End *vm*, if it runs, and start what *entry* plans.

        Preconditions: the journal has *entry*; its files are made; the launcher is prepared.
        On success: the guest goes on from the snapshot, or stands, as planned; settled.
        Raises: VmError: the VM is back in the state it was in, or shut off; says what is
          where. Its effect is UNKNOWN if the next daemon, or a retry, has to settle it.
        """
        seat, plan = self._seat, _revert(entry)
        self._job.effect = Effect.UNKNOWN
        if vm is not None:
            if not plan.starts:
                await seat.launcher.keep_off()
            with seat.tracker.ending(Condition.SHUTOFF_FROM_SNAPSHOT):
                await end_qemu(vm)
                with trio.move_on_after(DETACH_LIMIT_S):  # its process is gone: it cannot be long
                    await seat.wait_detached()
        await self._job.reach(Point.REVERT_ENDED)
        await self._start(entry)

    async def go_on(self, entry: JournalEntry) -> Manifest:
        """Finish a revert whose daemon died when the old QEMU had ended; as `run` from there.

        Preconditions: no QEMU runs that the entry tells of, and no guest was let go.
        Raises: WrongState: somebody serves the monitor. What `run` raises.
        """
        seat, plan = self._seat, _revert(entry)
        self._job.effect = Effect.UNKNOWN
        with self._job.shielded():
            require_no_qemu(seat.name, seat.qmp)
            if plan.loading is not None:  # after a power failure it may be incomplete
                await in_thread(make_view_again, plan.loading)
            await seat.launcher.prepare(plan.launch, lasting=not plan.starts)
            await self._start(entry)
        return await in_thread(seat.store.manifest, plan.name)

    async def _start(self, entry: JournalEntry) -> None:
        seat, plan = self._seat, _revert(entry)
        if not plan.starts:
            await self._leave_off(entry)
            return
        shown_as = Condition.PAUSED_FROM_SNAPSHOT
        self._job.instruction = seat.launcher.instruction(plan.launch)
        try:
            vm = await start(seat, plan, self._job, made=entry.made, shown_as=shown_as)
        except QsnapError as exc:
            await seat.launcher.abandon()
            await self._bring_back(entry, exc)
        await finish_revert(vm, entry, seat.store)
        await seat.launcher.follow(vm)
        self._job.effect = Effect.NONE
        self._tell_what_is_left()

    async def _leave_off(self, entry: JournalEntry) -> None:
        seat, plan = self._seat, _revert(entry)
        await in_thread(seat.store.next_start.clear)
        await in_thread(seat.store.next_start.write, entry)
        await settle_revert(plan, seat.store)
        self._job.effect = Effect.NONE
        self._job.notes += (
            f"VM {seat.name} is shut off, as the snapshot holds no memory; "
            f"qsnapctl start {seat.name} starts it",
        )
        self._tell_what_is_left()

    def _tell_what_is_left(self) -> None:
        if self._left:
            disks = ", ".join(self._left)
            note = f"the disks of the state that was given up are still there: {disks}"
            self._job.notes += (note,)

    async def _bring_back(self, entry: JournalEntry, cause: QsnapError) -> NoReturn:
        """Start the state that was left again. Always raises: VmError: what is true now."""
        seat, plan = self._seat, _revert(entry)
        what = f"VM {seat.name} could not be started from snapshot {plan.name}: {cause}. The "
        what += "snapshot is unharmed. "
        fallback = plan.fallback
        if fallback is None:
            await drop_revert(entry, seat.store)
            disks = ", ".join(self._left) or "those it had"
            raise self._failed(
                f"{what}The VM is shut off; the disks of the state before are: {disks}",
                Effect.PARTIAL,
            ) from cause
        kept = await in_thread(seat.store.manifest, fallback.name)
        shown_as = (
            Condition.PAUSED_FROM_SNAPSHOT if fallback.to_running else Condition[kept.reason]
        )
        try:
            require_no_qemu(seat.name, seat.qmp)
            await seat.launcher.prepare(fallback.launch)
            self._job.instruction = seat.launcher.instruction(fallback.launch)
            vm = await start(seat, fallback, self._job, made=(), shown_as=shown_as)
        except QsnapError as exc:
            why = str(exc)
        else:
            await finish_return(vm, entry, seat.store)
            await seat.launcher.follow(vm)
            raise self._failed(
                f"{what}The VM is back in the state it was in, which is also kept as snapshot "
                f"{kept.name}",
                Effect.ROLLED_BACK,
            ) from cause
        await seat.launcher.abandon()
        await drop_revert(entry, seat.store)
        raise self._failed(
            f"{what}The state it was in did not start again either ({why}). That is kept as "
            f"snapshot {kept.name}: try snapshot-revert {seat.name} {kept.name}",
            Effect.PARTIAL,
        ) from cause

    def _failed(self, message: str, effect: Effect) -> VmError:
        self._job.effect = effect
        return VmError(message, effect=effect)


def _revert(entry: JournalEntry) -> RevertPlan:
    assert isinstance(entry.plan, RevertPlan)
    return entry.plan


async def finish_revert(vm: AttachedVm, entry: JournalEntry, store: VmStore) -> None:
    """Let a loaded VM go on and make the snapshot current; idempotent.

    The guest comes first: it has stood still since the old QEMU was ended.
    Raises: VmError: it cannot be made to run. StoreError.
    """
    plan = _revert(entry)
    await _let_go(entry, plan, store)
    await reach(Point.REVERT_LET_GO)
    if plan.to_running:
        await vm.ensure_running(Condition.RUNNING_FROM_SNAPSHOT)
    await reach(Point.REVERT_RUNS)
    await hold_lease(vm, plan, store)
    await reach(Point.REVERT_LEASED)
    await settle_revert(plan, store)


async def finish_return(vm: AttachedVm, entry: JournalEntry, store: VmStore) -> None:
    """The same for the state that was left, and the files of the revert go. Idempotent."""
    fallback = _revert(entry).fallback
    assert fallback is not None
    await _let_go(entry, fallback, store)
    if fallback.to_running:
        await vm.ensure_running()
    await hold_lease(vm, fallback, store)
    await in_thread(store.set_current, fallback.name)
    await drop_revert(entry, store)


async def _let_go(entry: JournalEntry, restore: Restore, store: VmStore) -> None:
    plan = entry.plan.model_copy(update={"let_go": restore.name})
    await in_thread(store.restoring.write, entry.model_copy(update={"plan": plan}))


async def hold_lease(vm: AttachedVm, plan: Restore, store: VmStore) -> None:
    """Let it be known that a QEMU runs on the snapshot's files. Raises: StoreError."""
    mapped = plan.loading is not None and plan.loading.view is not None
    who = (plan.vm, vm.identity.pid, vm.identity.start_time_ticks)
    await in_thread(partial(store.leases.hold, plan.name, *who, mapped=mapped))


async def settle_revert(plan: Restore, store: VmStore) -> None:
    """Write down that the VM goes on from the snapshot; idempotent. Raises: StoreError."""
    if plan.loading is not None and plan.loading.view is not None:
        await in_thread(Path(plan.loading.view).unlink, True)
    await in_thread(store.set_current, plan.name)
    await reach(Point.REVERT_CURRENT_SET)
    if (entry := await in_thread(store.restoring.read)) is not None:
        await in_thread(note_made, store.made, plan.overlays, entry.made)
        await in_thread(_remove_unused, entry)
    if not isinstance(plan, RevertPlan) or plan.starts:  # how it was to start before is void
        await in_thread(store.next_start.clear)
    await in_thread(store.restoring.clear)
    await reach(Point.REVERTED)


def _remove_unused(entry: JournalEntry) -> None:
    """Remove the overlays over the state that was left; what cannot be is logged. Blocks."""
    for file in entry.unused:
        try:
            remove_if_ours(Path(file.path), file.inode)
        except StoreError as exc:
            _log.warning("VM %s: %s", entry.plan.vm, exc)
    sync_removals(Path(file.path).parent for file in entry.unused)


async def drop_revert(entry: JournalEntry, store: VmStore) -> None:
    """Remove the files of a revert whose guest has never run, and forget it. Idempotent.

    Raises: StoreError.
    """
    await in_thread(remove_files, entry)
    await in_thread(store.restoring.clear)


async def end_qemu(vm: AttachedVm) -> None:
    """Make a QEMU end, its disks flushed if it still answers. Raises: VmError: it does not."""
    with suppress(SessionLost, CommandRefused, ReplyTimeout):  # it ends first, or is killed
        await vm.session.execute(Quit())
    await wait_ended(vm.identity)
