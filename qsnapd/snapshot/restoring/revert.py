"""Putting a VM back to a snapshot: a new QEMU on new overlays over the frozen images.

Everything that can be wrong with the snapshot is found, and the state that the VM is in is
kept as a snapshot, before the old QEMU is ended. That is the point of no return; from there
on (`switch`) the revert is not cancelled any more.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import (
    Blocked,
    CapabilityMissing,
    Effect,
    ImageInvalid,
    QsnapError,
    RequestError,
    SessionLost,
    StoreError,
    StoreFull,
    WrongState,
)
from qsnapd.faults import Point, reach
from qsnapd.image.files import identity
from qsnapd.image.qcow2 import is_blank
from qsnapd.model.plan import CheckpointPlan, JournalEntry, Restore, RevertPlan
from qsnapd.model.request import CreateRequest, DiskRequest, RevertRequest
from qsnapd.model.snapshot import FileIdentity, Manifest, Strategy
from qsnapd.model.state import State
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.left_out import is_left_out_of
from qsnapd.snapshot.restoring.preflight import preflight
from qsnapd.snapshot.restoring.revert_plan import plan_return, plan_revert, require_no_qemu
from qsnapd.snapshot.restoring.start import Seat, look_after, make_files
from qsnapd.snapshot.restoring.switch import Switch
from qsnapd.snapshot.taking.committing import settle_committed
from qsnapd.snapshot.taking.create import Checkpoint
from qsnapd.snapshot.undo import remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import read_disks
from qsnapd.vm.proc import resident_bytes
from qsnapd.vm.process import still_runs

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
        self._keeping: Checkpoint | None = None
        """Has kept the state that is about to be left."""

    async def run(self, request: RevertRequest) -> Manifest:
        """Put the VM back.

        Preconditions: no other job changes this VM; the caller sees to that.
        On success: the VM runs (or stands, if it did then) as it was at the snapshot, on
          overlays of its own; the snapshot is current, and unchanged. A snapshot without
          memory leaves the VM shut off, unless a state was asked for. The state that was
          left is a snapshot too, `job.kept`, unless it was to be discarded.
        On failure or cancellation before the old QEMU is ended: as if never asked (if the VM
          was paused, on QEMU < 10.0, the state that was kept may stand: effect `partial`).
          After that: the VM is back in the state it was in, or, if that could not be or was to be
          discarded, shut off, and the error says what is where.
        Raises: UnknownSnapshot, WrongState, Blocked, SnapshotDiffers, ImageInvalid,
          StoreError, VmError.
        """
        seat = self._seat
        vm = seat.attached
        manifest = await in_thread(seat.store.manifest, request.name)
        present = await read_disks(vm.session, vm.identity.pid) if vm else ()
        found = await preflight(
            manifest,
            qemu_img=self._qemu_img,
            force=request.force,
            frees_bytes=resident_bytes(vm.identity.pid) if vm else 0,
            others=(await in_thread(seat.store.snapshots)).values(),
            present=present,
        )
        if vm is None:
            require_no_qemu(seat.name, seat.qmp)
        plan = await in_thread(self._plan, manifest, request, found.loads_lazily)
        self._job.notes = (*map(str, found.differences), *found.notes, *eager_note(plan))
        entry = JournalEntry(
            plan=plan,
            pid=vm.identity.pid if vm else 0,
            start_time_ticks=vm.identity.start_time_ticks if vm else 0,
        )
        try:
            await self._write(entry)
            await self._job.reach(Point.REVERT_PLANNED)
            entry = await make_files(entry, seat.store.restoring, qemu_img=self._qemu_img)
            await self._job.reach(Point.REVERT_FILES_MADE)
            left: tuple[str, ...] = ()
            if vm is not None:
                if not request.discard:
                    leaves = [d.target for d in present if is_left_out_of(d, manifest)]
                    entry = await self._keep(vm, entry, leaves)
                else:
                    left = await _disks_in_use(vm)
            else:
                unused, left = await in_thread(_never_started, seat.store)
                entry = entry.model_copy(update={"unused": unused})
            await seat.launcher.prepare(plan.launch, lasting=not plan.starts)
            await self._job.reach(Point.REVERT_PREPARED)
            entry = await self._commit_to_it(vm, entry)
        except BaseException as exc:
            patience = self._job.patience
            with (
                trio.move_on_after(patience.limit_s, shield=True) as undoing,
                patience.extending(undoing),
            ):
                await self._undo(vm, entry, exc)
            raise
        with self._job.shielded():
            await Switch(seat, self._job, left).run(vm, entry)
        if seat.attached is not None:
            look_after(seat, seat.attached, plan, self._job, reads_ahead=request.read_ahead)
        return manifest

    def _plan(
        self, manifest: Manifest, request: RevertRequest, loads_lazily: bool
    ) -> RevertPlan:
        seat = self._seat
        return plan_revert(
            manifest,
            request,
            was_running=seat.tracker.condition.state is State.RUNNING,
            directory=seat.store.directory,
            parent=seat.parent,
            loads_lazily=loads_lazily,
        )

    async def _write(self, entry: JournalEntry) -> None:
        await in_thread(self._seat.store.restoring.write, entry)

    async def _keep(
        self, vm: AttachedVm, entry: JournalEntry, leaves: Sequence[str]
    ) -> JournalEntry:
        """Make a snapshot of the state that is about to be left; the guest stands afterwards.

        It *leaves* out the disks that the VM goes on with as they are.
        Raises: what taking a checkpoint raises, with the hint that --discard gives it up.
        """
        plan = entry.plan
        request = CreateRequest(
            name=f"{KEPT}{plan.name[:KEPT_NAME_LIMIT]}-{plan.token}",
            description=f"the state that was left by reverting to {plan.name}",
            strategy=Strategy.STOPPED,
            hash_memory=False,
            disks=tuple(DiskRequest(target=target, snapshot="no") for target in leaves),
        )
        entry = _changed(entry, holds=True)
        await self._write(entry)
        checkpoint = Checkpoint(
            *(vm, self._seat.store, self._job),
            qemu_img=self._qemu_img,
            room=self._seat.room,
            saves=self._seat.saves,
        )
        try:
            kept = await checkpoint.take(request, holds=True)
            self._keeping = checkpoint
            await self._job.reach(Point.REVERT_KEPT)
            await self._require_settled(vm)
        except (RequestError, CapabilityMissing, StoreFull) as exc:
            raise Blocked(
                f"the state that VM {plan.vm} is in cannot be kept as a snapshot: {exc}. "
                "--discard gives it up",
                effect=exc.effect,
            ) from exc
        finally:
            self._job.snapshot = plan.name
        if await in_thread(self._seat.store.journal.read) is not None:
            # Whoever worked through that later would take the kept state for the current one.
            raise StoreError(
                f"the state that VM {plan.vm} is in was kept, and tidying up behind that is not "
                "finished: see the log, and try again"
            )
        self._job.kept = kept.name
        ran = kept.state == "running"
        back = partial(plan_return, kept, self._seat.parent, to_running=ran)
        overlays = [Path(disk.overlay) for disk in kept.disks if disk.overlay]
        unused = [await in_thread(identity, path) for path in overlays]
        entry = _changed(
            entry, was_running=ran, fallback=await in_thread(back)
        ).model_copy(update={"unused": tuple(unused)})
        await self._write(entry)
        await self._job.reach(Point.REVERT_RETURN_NOTED)
        return entry

    async def _require_settled(self, vm: AttachedVm) -> None:
        """End what keeping the state has left: later it would be ended on top of the revert.

        Raises: StoreError, VmError.
        """
        store = self._seat.store
        entry = await in_thread(store.journal.read)
        if entry is not None:
            assert isinstance(entry.plan, CheckpointPlan)
            await settle_committed(vm, entry.plan, store, self._job.patience)

    async def _commit_to_it(self, vm: AttachedVm | None, entry: JournalEntry) -> JournalEntry:
        """The last look before the point of no return, and its note in the journal.

        Raises: WrongState: the guest was let go since its state was kept, or another QEMU
          has taken this one's place.
        """
        now = self._seat.attached
        if vm is None and now is not None:
            raise WrongState(f"VM {self._seat.name} was started meanwhile: try again")
        if vm is not None and now is not None and now.identity != vm.identity:
            raise WrongState(f"VM {self._seat.name} was started anew meanwhile: try again")
        kept = isinstance(entry.plan, RevertPlan) and entry.plan.fallback is not None
        if kept and vm is not None and await vm.run_state() == "running":
            raise WrongState(
                f"somebody let the guest of VM {self._seat.name} run after its state was kept: "
                "what it has done since would be lost. Try again"
            )
        entry = _changed(entry, no_return=True)
        await self._write(entry)
        await self._job.reach(Point.REVERT_NO_RETURN)
        return entry

    async def _undo(
        self, vm: AttachedVm | None, entry: JournalEntry, cause: BaseException
    ) -> None:
        """Before the point of no return: as if never asked.

        But a paused VM on QEMU < 10.0 cannot leave the snapshot that its state was kept as.
        """
        self._set_effect(cause, Effect.UNKNOWN)
        await self._seat.launcher.abandon()
        if self._keeping is not None and self._keeping.can_be_taken_back:
            await self._keeping.take_back()
            self._job.kept = None
        await undo_revert(vm, entry, self._seat.store)
        kept = self._job.kept is not None
        self._set_effect(cause, Effect.PARTIAL if kept else Effect.ROLLED_BACK)
        if kept and isinstance(cause, QsnapError):
            stands = f"snapshot {self._job.kept} of the present state was taken, and stands"
            cause.args = (f"{cause}. The VM goes on as before; {stands}",)

    def _set_effect(self, cause: BaseException, effect: Effect) -> None:
        self._job.effect = effect
        if isinstance(cause, QsnapError):
            cause.effect = effect


def _never_started(store: VmStore) -> tuple[tuple[FileIdentity, ...], tuple[str, ...]]:
    """What the VM, which an earlier revert has left shut off, was to be started on. Blocks.

    Returns the overlays that nobody has written to, and the paths of the others.
    """
    entry = store.next_start.read()
    if entry is None or not isinstance(entry.plan, Restore):
        return (), ()
    made = {file.inode for file in entry.made}
    unused, disks = list[FileIdentity](), list[str]()
    for overlay in entry.plan.overlays:
        try:
            descriptor = os.open(
                overlay.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except OSError:
            continue
        try:
            file = identity(descriptor)
            if file.inode in made and is_blank(descriptor):
                unused.append(file)
            else:  # somebody has started it after all
                disks.append(overlay.path)
        except (OSError, ImageInvalid):
            disks.append(overlay.path)
        finally:
            os.close(descriptor)
    return tuple(unused), tuple(disks)


def _changed(entry: JournalEntry, **what: object) -> JournalEntry:
    return entry.model_copy(update={"plan": entry.plan.model_copy(update=what)})


def eager_note(plan: Restore) -> tuple[str, ...]:
    """Why the memory is not mapped, if that was wanted."""
    return (f"memory is read eagerly: {plan.lazy_refusal}",) if plan.lazy_refusal else ()


async def undo_revert(vm: AttachedVm | None, entry: JournalEntry, store: VmStore) -> None:
    """Before the point of no return: let the guest go on, and remove what was made.

    Idempotent. Raises: SessionLost: the old QEMU lives, and is not at hand. VmError: the
      guest does not run again. StoreError.
    """
    standing = await in_thread(store.restoring.read)
    entry = standing or entry
    plan = entry.plan
    assert isinstance(plan, RevertPlan)
    if _lives(entry) and plan.holds:
        if vm is None or not is_same(vm, entry):
            raise SessionLost(
                f"the revert to {plan.name} is undone as soon as QEMU, pid {entry.pid}, answers"
            )
        await give_up_revert(vm, entry, store)
    await in_thread(remove_files, entry)
    await in_thread(store.restoring.clear)
    await reach(Point.REVERT_UNDONE)


async def give_up_revert(vm: AttachedVm, entry: JournalEntry, store: VmStore) -> None:
    """Let the guest go on that the revert holds.

    The journal is first made to say that there is a return: a guest that works on must not
    be reverted later. Idempotent. Raises: VmError: it does not run again. StoreError.
    """
    plan = entry.plan
    assert isinstance(plan, RevertPlan)
    if plan.no_return:
        await in_thread(store.restoring.write, _changed(entry, no_return=False))
    if vm.tracker.is_to_run(ran_before=plan.was_running):
        await vm.ensure_running()


def _lives(entry: JournalEntry) -> bool:
    return entry.pid != 0 and still_runs(entry.pid, entry.start_time_ticks)


def is_same(vm: AttachedVm, entry: JournalEntry) -> bool:
    """Whether *vm* is the very process that the entry's job worked on."""
    return (entry.pid, entry.start_time_ticks) == (vm.identity.pid, vm.identity.start_time_ticks)


async def _disks_in_use(vm: AttachedVm) -> tuple[str, ...]:
    """The files of a VM's active layers. Raises: VmError."""
    disks = await read_disks(vm.session, vm.identity.pid)
    return tuple(disk.path for disk in disks if disk.path and not disk.left_out)
