"""Putting a VM back to a checkpoint: a new QEMU on new overlays over the frozen images.

Everything that can be wrong with the snapshot is found before the old QEMU is ended. That is
the point of no return; from there on the revert is not cancelled any more.
"""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import trio

from qsnapd.errors import (
    CommandRefused,
    Effect,
    QsnapError,
    ReplyTimeout,
    SessionLost,
    VmError,
)
from qsnapd.image.files import identity
from qsnapd.model.job import Phase
from qsnapd.model.plan import JournalEntry, RevertPlan
from qsnapd.model.request import RevertRequest
from qsnapd.model.snapshot import (
    Manifest,
    Process,
)
from qsnapd.model.state import Condition
from qsnapd.qmp.commands import Quit
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.load import load_memory
from qsnapd.snapshot.overlays import make_overlay, publish_overlays
from qsnapd.snapshot.revert_plan import check_snapshot, plan_revert, require_no_qemu
from qsnapd.snapshot.undo import remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import read_disks
from qsnapd.vm.process import KILL_LIMIT_S, Started, kill, start, wait_ended, wait_gone
from qsnapd.vm.tracker import Tracker

DETACH_LIMIT_S = 30.0
START_LIMIT_S = 60.0
LOAD_LIMIT_S = 3600.0
LOOK_EVERY_S = 0.1


class Seat(Protocol):
    """A VM's place, which outlives each of its QEMU processes."""

    name: str
    qmp: Path
    store: VmStore
    tracker: Tracker
    attached: AttachedVm | None
    starting: Condition | None

    async def wait_attached(self) -> AttachedVm: ...
    async def wait_detached(self) -> None: ...


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
          overlays of its own; the snapshot is current, and unchanged. The files of the state
          that was left are still there.
        On failure or cancellation before the old QEMU is ended: as if never asked. After
          that: the VM is shut off, and the error says what is where.
        Raises: UnknownSnapshot, WrongState, Blocked, ImageInvalid, StoreError, VmError.
        """
        store = self._seat.store
        manifest = store.manifest(request.name)
        await trio.to_thread.run_sync(check_snapshot, manifest)
        assert manifest.memory is not None
        if self._seat.attached is None:
            require_no_qemu(self._seat.name, self._seat.qmp)
        plan = plan_revert(
            manifest,
            manifest.memory,
            to_running=(request.state or manifest.state) == "running",
        )
        entry = self._entry(plan)
        await trio.to_thread.run_sync(store.journal.write, entry)
        try:
            await self._make_overlays(plan, entry)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._forget, entry)
            raise
        with trio.CancelScope(shield=True):
            try:
                vm = await self._switch(plan, manifest.machine.process)
            except QsnapError:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._forget, entry)
                raise
            await finish_revert(vm, plan, store)
        return manifest

    def _entry(self, plan: RevertPlan) -> JournalEntry:
        vm = self._seat.attached
        return JournalEntry(
            plan=plan,
            pid=vm.identity.pid if vm else 0,
            start_time_ticks=vm.identity.start_time_ticks if vm else 0,
        )

    async def _make_overlays(self, plan: RevertPlan, entry: JournalEntry) -> None:
        with ExitStack() as descriptors:
            overlays = []
            for overlay in plan.overlays:
                overlays.append(await make_overlay(overlay, qemu_img=self._qemu_img))
                descriptors.callback(os.close, overlays[-1])
            entry = entry.model_copy(update={"made": tuple(map(identity, overlays))})
        await trio.to_thread.run_sync(self._seat.store.journal.write, entry)
        await publish_overlays(plan.overlays)

    def _forget(self, entry: JournalEntry) -> None:
        """Remove the overlays, which no guest has written to. Blocks."""
        journal = self._seat.store.journal
        remove_files(journal.read() or entry)
        journal.clear()

    async def _switch(self, plan: RevertPlan, process: Process) -> AttachedVm:
        """End the old QEMU, start the new one and load; it stands still afterwards.

        Raises: VmError: the VM is shut off; says where the state is that it was in.
        """
        self._job.enter(Phase.STARTING)
        seat = self._seat
        left = await disks_in_use(seat.attached)
        if seat.attached is not None:
            await end_qemu(seat.attached)
            with trio.move_on_after(DETACH_LIMIT_S):  # its process is gone: this cannot be long
                await seat.wait_detached()
            seat.tracker.on_exit(Condition.SHUTOFF_FROM_SNAPSHOT)
        seat.starting = Condition.PAUSED_FROM_SNAPSHOT
        try:
            log = seat.store.directory / ".qemu.log"
            started = await trio.to_thread.run_sync(
                start, process, plan.executable, plan.argv, plan.cwd, log
            )
            vm = await self._wait_started(started, plan)
            try:
                with trio.fail_after(LOAD_LIMIT_S):
                    memory = Path(plan.memory_file)
                    await load_memory(vm, memory, plan.image_format, self._job)
            except (QsnapError, trio.TooSlowError):
                kill(vm.identity)  # it has not run: nothing is lost with it
                with trio.move_on_after(KILL_LIMIT_S, shield=True):
                    await wait_gone(vm.identity)
                raise
            return vm
        except (QsnapError, trio.TooSlowError) as exc:
            raise VmError(
                f"VM {seat.name} is shut off: it was ended to revert to {plan.name}, and QEMU "
                f"could not be started from that: {str(exc) or 'it took too long'}. The "
                f"snapshot is unharmed. The disks of the state before are: {left}",
                effect=Effect.PARTIAL,
            ) from exc
        finally:
            seat.starting = None

    async def _wait_started(self, started: Started, plan: RevertPlan) -> AttachedVm:
        """Wait until the supervisor has attached to the QEMU that was started.

        On failure: that QEMU is gone, if it could be found.
        Raises: VmError: it ended, did not answer in time, or another took its socket.
        """
        with trio.move_on_after(START_LIMIT_S):
            while True:
                with trio.move_on_after(LOOK_EVERY_S):
                    vm = await self._seat.wait_attached()
                    if is_started_by(plan, vm.process) and await vm.run_state() == "inmigrate":
                        return vm
                    started.kill()
                    raise VmError(
                        f"another QEMU, pid {vm.identity.pid}, serves {self._seat.qmp}; "
                        "it was left alone. Does a service start this VM whenever it ends?"
                    )
                if words := started.failed():
                    raise VmError(f"QEMU says: {words}")
        started.kill()
        raise VmError(f"QEMU did not answer within {START_LIMIT_S:g} s of its start")


def is_started_by(plan: RevertPlan, process: Process) -> bool:
    """Whether *process* runs the command line of *plan*, which names its new overlays."""
    return process.argv[1:] == plan.argv[1:]


async def finish_revert(vm: AttachedVm, plan: RevertPlan, store: VmStore) -> None:
    """Let a loaded VM go on and make the snapshot current; idempotent.

    The guest comes first: it has stood still since the old QEMU was ended.
    Raises: VmError: it cannot be made to run. StoreError.
    """
    if plan.to_running:
        await vm.ensure_running(Condition.RUNNING_FROM_SNAPSHOT)
    await trio.to_thread.run_sync(store.set_current, plan.name)
    await trio.to_thread.run_sync(store.journal.clear)


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
