"""Putting a VM back to a snapshot: a new QEMU on new overlays over the frozen images.

Everything that can be wrong with the snapshot is found, and the state that the VM is in is
kept as a snapshot, before the old QEMU is ended. That is the point of no return; from there
on the revert is not cancelled any more, and if it fails the kept state is brought back.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import (
    Blocked,
    CapabilityMissing,
    CommandRefused,
    Effect,
    QsnapError,
    ReplyTimeout,
    RequestError,
    SessionLost,
    StoreFull,
    VmError,
)
from qsnapd.model.plan import JournalEntry, Restore, RevertPlan
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.model.snapshot import Manifest, Strategy
from qsnapd.model.state import Condition, State
from qsnapd.qmp.commands import Quit
from qsnapd.snapshot.create import Checkpoint
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.preflight import preflight
from qsnapd.snapshot.read_ahead import read_ahead
from qsnapd.snapshot.revert_plan import plan_return, plan_revert, require_no_qemu
from qsnapd.snapshot.start import Seat, make_files, start
from qsnapd.snapshot.undo import remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import read_disks
from qsnapd.vm.process import wait_ended

DETACH_LIMIT_S = 30.0
UNDO_LIMIT_S = 60.0
KEPT = "before-"
"""How the names begin of snapshots that keep what a revert would lose."""
KEPT_NAME_LIMIT = 24
"""Of the snapshot reverted to, so many characters are repeated there."""


class Revert:
    """Reverts one VM once."""

    def __init__(self, seat: Seat, job: Job, *, qemu_img: str) -> None:
        self._seat = seat
        self._job = job
        self._qemu_img = qemu_img

    async def run(self, request: RevertRequest) -> Manifest:
        """Put the VM back.

        Preconditions: no other job changes this VM; the caller sees to that.
        On success: the VM runs (or stands, if it did then) as it was at the snapshot, on
          overlays of its own; the snapshot is current, and unchanged. A snapshot without
          memory leaves the VM shut off, unless a state was asked for. The state that was
          left is a snapshot too, `job.kept`, unless it was to be discarded.
        On failure or cancellation before the old QEMU is ended: as if never asked. After
          that: the VM is back in the state it was in, or, if that could not be or was to be
          discarded, shut off, and the error says what is where.
        Raises: UnknownSnapshot, WrongState, Blocked, SnapshotDiffers, ImageInvalid,
          StoreError, VmError.
        """
        seat = self._seat
        manifest = seat.store.manifest(request.name)
        found = await preflight(
            manifest,
            qemu_img=self._qemu_img,
            force=request.force,
            frees_bytes=seat.attached.ram_bytes if seat.attached else 0,
        )
        if seat.attached is None:
            require_no_qemu(seat.name, seat.qmp)
        plan = await trio.to_thread.run_sync(self._plan, manifest, request)
        self._job.notes = (*map(str, found.differences), *found.notes, *eager_note(plan))
        entry = self._entry(plan)
        try:
            await self._write(entry)
            entry = await make_files(entry, seat.store.restoring, qemu_img=self._qemu_img)
            if not request.discard and seat.attached is not None:
                entry = await self._keep(seat.attached, plan, entry)
            await seat.launcher.prepare(plan.launch, lasting=not plan.starts)
        except BaseException:
            with trio.move_on_after(UNDO_LIMIT_S, shield=True):
                await seat.launcher.abandon()
                await undo_revert(seat.attached, entry, seat.store)
            raise
        with trio.CancelScope(shield=True):
            await self._switch(entry)
        if request.read_ahead and plan.loading is not None and plan.loading.view is not None:
            seat.while_attached(partial(read_ahead, Path(plan.loading.memory_file)))
        return manifest

    async def go_on(self, entry: JournalEntry) -> Manifest:
        """Finish a revert whose daemon died when the old QEMU had ended; as `run` from there.

        Preconditions: no QEMU runs; the files of *entry* are those that were made then.
        """
        with trio.CancelScope(shield=True):
            await self._start(entry, left="those that the VM had")
        return self._seat.store.manifest(entry.plan.name)

    def _plan(self, manifest: Manifest, request: RevertRequest) -> RevertPlan:
        seat = self._seat
        return plan_revert(
            manifest,
            request,
            was_running=seat.tracker.condition.state is State.RUNNING,
            directory=seat.store.directory,
            parent=seat.parent,
        )

    def _entry(self, plan: RevertPlan) -> JournalEntry:
        vm = self._seat.attached
        return JournalEntry(
            plan=plan,
            pid=vm.identity.pid if vm else 0,
            start_time_ticks=vm.identity.start_time_ticks if vm else 0,
        )

    async def _write(self, entry: JournalEntry) -> None:
        await trio.to_thread.run_sync(self._seat.store.restoring.write, entry)

    async def _keep(self, vm: AttachedVm, plan: RevertPlan, entry: JournalEntry) -> JournalEntry:
        """Make a snapshot of the state that is about to be left; the guest stands afterwards.

        Raises: what taking a checkpoint raises, with the hint that --discard gives it up.
        """
        request = CreateRequest(
            name=f"{KEPT}{plan.name[:KEPT_NAME_LIMIT]}-{plan.token}",
            description=f"the state that was left by reverting to {plan.name}",
            strategy=Strategy.STOPPED,
            hash_memory=False,
        )
        checkpoint = Checkpoint(vm, self._seat.store, self._job, qemu_img=self._qemu_img)
        try:
            kept = await checkpoint.take(request, holds=True)
        except (RequestError, CapabilityMissing, StoreFull) as exc:
            raise Blocked(
                f"the state that VM {plan.vm} is in cannot be kept as a snapshot: {exc}. "
                "--discard gives it up",
                effect=exc.effect,
            ) from exc
        finally:
            self._job.snapshot = plan.name
        self._job.kept = kept.name
        back = partial(plan_return, kept, self._seat.parent, to_running=plan.was_running)
        fallback = await trio.to_thread.run_sync(back)
        entry = entry.model_copy(update={"plan": plan.model_copy(update={"fallback": fallback})})
        await self._write(entry)
        return entry

    async def _switch(self, entry: JournalEntry) -> None:
        """End the old QEMU, and start the new one."""
        seat, plan = self._seat, entry.plan
        assert isinstance(plan, RevertPlan)
        left = await disks_in_use(seat.attached)
        entry = entry.model_copy(update={"plan": plan.model_copy(update={"no_return": True})})
        await self._write(entry)
        if seat.attached is not None:
            await end_qemu(seat.attached)
            with trio.move_on_after(DETACH_LIMIT_S):  # its process is gone: this cannot be long
                await seat.wait_detached()
            seat.tracker.on_exit(Condition.SHUTOFF_FROM_SNAPSHOT)
        await self._start(entry, left)

    async def _start(self, entry: JournalEntry, left: str) -> None:
        seat, plan = self._seat, entry.plan
        assert isinstance(plan, RevertPlan)
        if not plan.starts:
            await trio.to_thread.run_sync(seat.store.next_start.clear)
            await trio.to_thread.run_sync(seat.store.next_start.write, entry)
            await settle_revert(plan, seat.store)
            self._job.notes += (
                f"VM {seat.name} is shut off, as the snapshot holds no memory; "
                f"qsnapctl start {seat.name} starts it",
            )
            return
        shown_as = Condition.PAUSED_FROM_SNAPSHOT
        self._job.instruction = seat.launcher.instruction(plan.launch)
        try:
            vm = await start(seat, plan, self._job, made=entry.made, shown_as=shown_as)
        except QsnapError as exc:
            await seat.launcher.abandon()
            await trio.to_thread.run_sync(remove_files, entry)
            await self._bring_back(plan, exc, left)
            raise
        await finish_revert(vm, plan, seat.store)

    async def _bring_back(self, plan: RevertPlan, cause: QsnapError, left: str) -> None:
        """Start the state that was left again. Always raises: VmError: what is true now."""
        seat, fallback = self._seat, plan.fallback
        what = f"VM {seat.name} was ended to revert to {plan.name}, and QEMU could not be started "
        what += f"from that: {cause}. The snapshot is unharmed. "
        if fallback is None:
            await trio.to_thread.run_sync(seat.store.restoring.clear)
            raise VmError(
                f"{what}The VM is shut off; the disks of the state before are: {left}",
                effect=Effect.PARTIAL,
            ) from cause
        kept = seat.store.manifest(fallback.name)
        try:
            await seat.launcher.prepare(fallback.launch)
            self._job.instruction = seat.launcher.instruction(fallback.launch)
            vm = await start(
                seat, fallback, self._job, made=(), shown_as=_shown_as(kept, fallback)
            )
            if fallback.to_running:
                await vm.ensure_running()
        except QsnapError as exc:
            await trio.to_thread.run_sync(seat.store.restoring.clear)
            raise VmError(
                f"{what}The VM is shut off, because the state it was in did not start either "
                f"({exc}); that is kept as snapshot {kept.name}, with its disks: {left}",
                effect=Effect.PARTIAL,
            ) from cause
        await trio.to_thread.run_sync(seat.store.restoring.clear)
        raise VmError(
            f"{what}The VM is back in the state it was in, which is also kept as snapshot "
            f"{kept.name}",
            effect=Effect.ROLLED_BACK,
        ) from cause


def _shown_as(kept: Manifest, fallback: Restore) -> Condition:
    return Condition.PAUSED_FROM_SNAPSHOT if fallback.to_running else Condition[kept.reason]


def eager_note(plan: Restore) -> tuple[str, ...]:
    """Why the memory is not mapped, if that was wanted."""
    return (f"memory is read eagerly: {plan.lazy_refusal}",) if plan.lazy_refusal else ()


async def finish_revert(vm: AttachedVm, plan: RevertPlan, store: VmStore) -> None:
    """Let a loaded VM go on and make the snapshot current; idempotent.

    The guest comes first: it has stood still since the old QEMU was ended.
    Raises: VmError: it cannot be made to run. StoreError.
    """
    if plan.to_running:
        await vm.ensure_running(Condition.RUNNING_FROM_SNAPSHOT)
    await hold_lease(vm, plan, store)
    await settle_revert(plan, store)


async def hold_lease(vm: AttachedVm, plan: Restore, store: VmStore) -> None:
    """Let it be known that a QEMU runs on the snapshot's files. Raises: StoreError."""
    mapped = plan.loading is not None and plan.loading.view is not None
    who = (plan.vm, vm.identity.pid, vm.identity.start_time_ticks)
    await trio.to_thread.run_sync(partial(store.leases.hold, plan.name, *who, mapped=mapped))


async def settle_revert(plan: RevertPlan, store: VmStore) -> None:
    """Write down that the VM goes on from the snapshot; idempotent. Raises: StoreError."""
    if plan.loading is not None and plan.loading.view is not None:
        await trio.to_thread.run_sync(Path(plan.loading.view).unlink, True)
    await trio.to_thread.run_sync(store.set_current, plan.name)
    await trio.to_thread.run_sync(store.restoring.clear)


async def undo_revert(vm: AttachedVm | None, entry: JournalEntry, store: VmStore) -> None:
    """Before the point of no return: let the guest go on, and remove what was made.

    Idempotent. Raises: VmError: the guest does not run again. StoreError.
    """
    plan = entry.plan
    assert isinstance(plan, RevertPlan)
    if vm is not None and vm.tracker.is_to_run(ran_before=plan.was_running):
        await vm.ensure_running()
    standing = await trio.to_thread.run_sync(store.restoring.read)
    await trio.to_thread.run_sync(remove_files, standing or entry)
    await trio.to_thread.run_sync(store.restoring.clear)


async def disks_in_use(vm: AttachedVm | None) -> str:
    """The files of a VM's active layers, for people."""
    try:
        disks = await read_disks(vm.session, vm.identity.pid) if vm else ()
    except VmError:
        return "not known, because QEMU does not answer"
    return ", ".join(disk.path for disk in disks if disk.path and not disk.left_out) or "none"


async def end_qemu(vm: AttachedVm) -> None:
    """Make a QEMU end, its disks flushed if it still answers."""
    with suppress(SessionLost, CommandRefused, ReplyTimeout):  # it ends first, or is killed
        await vm.session.execute(Quit())
    await wait_ended(vm.identity)
