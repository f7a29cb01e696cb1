"""One configured VM for as long as the daemon runs: attach, follow, reattach.

The supervisor owns the VM's condition and its one job; QEMU processes come and go below it.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType

import trio

from qsnapd.daemon.limits import Limits
from qsnapd.daemon.mending import Mender
from qsnapd.daemon.remembered import recall, remember
from qsnapd.daemon.thawing import Thawer
from qsnapd.errors import (
    NobodyListens,
    QsnapError,
    SessionLost,
    StoreError,
    VmBusy,
    VmError,
    WrongState,
)
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobKind
from qsnapd.model.state import Condition, State
from qsnapd.qmp.bridge import open_bridge
from qsnapd.qmp.commands import QueryStatus
from qsnapd.snapshot.deleting.delete import Others
from qsnapd.snapshot.deleting.former_names import note_disks
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.moving import export, imported
from qsnapd.snapshot.taking.room import Room
from qsnapd.store.renaming import finish_renaming
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm, attach
from qsnapd.vm.condition import lifecycle_event
from qsnapd.vm.launch import Parent
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.process import wait_gone
from qsnapd.vm.provisions import NO_PROVISIONS, Provisions
from qsnapd.vm.tracker import Tracker

RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 5.0
RETRY_STARTING_S = 0.01
"""While a job of ours starts QEMU, and its guest stands still for as long as we wait."""
NOTHING: Mapping[str, str] = MappingProxyType({})
CHORES_LIMIT = 4
FILE_CLOCK_LAG_S = 0.02
"""By which the times of files may be behind the clock: two of the kernel's ticks, at 100 Hz."""
EXIT_PATIENCE_S = 2.0
"""How long after losing the monitor the process may take to end."""

Chore = Callable[[], Awaitable[object]]

_log = logging.getLogger(__name__)


class Supervisor:
    """Watches one VM. Made at start, runs until the daemon ends."""

    def __init__(
        self,
        name: str,
        qmp: Path,
        store: VmStore,
        publish: Callable[[Event], None],
        *,
        qemu_img: str,
        launcher: Launcher,
        instead: Mapping[str, str] = NOTHING,
        provisions: Provisions = NO_PROVISIONS,
        others: Others = tuple,
        limits: Limits | None = None,
    ) -> None:
        self.name = name
        self.qmp = qmp
        self.store = store
        self.launcher = launcher
        self.parent = Parent(launcher.inherits_descriptors, instead)
        self.provisions = provisions
        self.others = others
        """Returns what is stored of all other VMs. Blocks."""
        self.tracker = Tracker(self._condition_changed)
        self.attached: AttachedVm | None = None
        self.is_entering = False
        """Some QEMU answers, and is about to be attached; a job that runs mends what it leaves."""
        self.problem: str | None = "not connected yet"
        self.job: Job | None = None
        self.last_job: Job | None = None
        self.starting: Condition | None = None
        """What the next QEMU that attaches stands still for, if a job is starting it."""
        limits = limits or Limits()
        self.stall_limit_s = limits.stall_limit_s
        self.saves = limits.saves
        self.room = Room(
            *(store, others),
            low_water_bytes=limits.low_water_bytes,
            quota_bytes=provisions.quota_bytes,
            total_quota_bytes=limits.quota_bytes,
        )
        self.mender = Mender(self, publish, qemu_img=qemu_img, stall_limit_s=self.stall_limit_s)
        self.thawer = Thawer(self, publish)
        self._publish = publish
        self.made_at_s = time.time() - FILE_CLOCK_LAG_S
        self._uuid: str | None = None
        self._changed = trio.Event()
        self._hurry = trio.Event()
        self._unsaved = trio.Event()
        self._unconfirmed = trio.Event()
        self._chores, self._to_do = trio.open_memory_channel[Chore](CHORES_LIMIT)

    async def run(self) -> None:
        """Keep the VM attached whenever its QEMU answers; never returns."""
        await in_thread(self._look_through_store)
        await self.mender.rescue()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_condition)
            nursery.start_soon(self._confirm_conditions)
            nursery.start_soon(self.mender.go_on_reverting)
            nursery.start_soon(self.mender.go_on_deleting)
            nursery.start_soon(self.thawer.run)
            nursery.start_soon(self._do_chores)
            delay_s = RETRY_FIRST_S
            while True:
                was_attached = await self._attach_once()
                delay_s = RETRY_FIRST_S if was_attached else min(2 * delay_s, RETRY_LONGEST_S)
                if self.starting is not None:
                    delay_s = RETRY_STARTING_S
                with trio.move_on_after(delay_s):
                    await self._hurry.wait()

    def _look_through_store(self) -> None:
        """Tell what is not listed, and remove what transfers of a killed daemon left. Blocks."""
        try:
            for problem in self.store.problems().values():
                _log.error("VM %s: a snapshot is not listed: %s", self.name, problem)
            if done := finish_renaming(self.store):  # before what imports left: it may look so
                _log.warning("VM %s: %s", self.name, done)
            self.store.remove_drafts(self.made_at_s)
            imported.remove_leftovers(self.store, self.made_at_s)
            export.remove_leftovers(self.store, self.made_at_s)
        except StoreError as exc:
            _log.warning("VM %s: %s", self.name, exc)

    async def _attach_once(self) -> bool:
        """Attach and stay until the session ends; returns whether it came to that."""
        vm: AttachedVm | None = None
        try:
            async with open_bridge(self.qmp, name=self.name) as (bridge, sock):
                vm = await attach(self.name, bridge, sock, self.tracker)
                self.is_entering = True
                await self._enter(vm)
                self.is_entering = False
                await trio.sleep_forever()
        except NobodyListens as exc:
            if self.tracker.condition is Condition.NOSTATE_UNKNOWN:
                self.tracker.on_exit(Condition.SHUTOFF_UNKNOWN)
            self.note_problem(exc)
        except QsnapError as exc:
            self.note_problem(exc)
        finally:
            self.attached, self.is_entering = None, False
            self._announce()
        if vm is not None:
            await self._leave(vm)
        elif self.job is None:
            await self.mender.mend_offline()
        return vm is not None

    async def _enter(self, vm: AttachedVm) -> None:
        status = (await vm.session.execute(QueryStatus())).status
        self.tracker.on_attached(status, self._remembered(vm))
        if self.job is None:
            self.problem = "an unfinished job of a former daemon is being finished or undone"
            await self.look_after(vm)
        await self.launcher.follow(vm)
        await note_disks(vm, self.store)
        _log.info("VM %s: attached to QEMU %s, pid %d", self.name, vm.version.text, vm.identity.pid)
        if self._uuid not in (None, vm.uuid):
            _log.warning("VM %s: another VM answers now: UUID %s", self.name, vm.uuid)
        self._uuid = vm.uuid
        self.problem = None
        self.attached = vm
        self.thawer.look()
        self._unsaved.set()
        self._unconfirmed.set()
        self._announce()

    async def look_after(self, vm: AttachedVm) -> None:
        """End what was left unfinished; what was to be started instead of *vm* is void.

        Preconditions: no job changes the VM.
        """
        await self.mender.mend_attached(vm)
        await in_thread(self.store.next_start.clear)
        await self.launcher.abandon()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _leave(self, vm: AttachedVm) -> None:
        """The session has ended: find out whether the process has, too."""
        with trio.move_on_after(EXIT_PATIENCE_S):
            await wait_gone(vm.identity)
            self.tracker.on_exit()
            self.problem = "QEMU has ended"
            _log.info("VM %s: QEMU has ended (%s)", self.name, self.tracker.condition.text)

    def note_problem(self, exc: QsnapError) -> None:
        """Keep *exc* as the reason why the VM is not attached, or not in order."""
        if str(exc) != self.problem:
            level = logging.INFO if isinstance(exc, SessionLost) else logging.WARNING
            _log.log(level, "VM %s: %s", self.name, exc)
        self.problem = str(exc)

    # --- condition -----------------------------------------------------------------------

    def _condition_changed(self, old: Condition, new: Condition) -> None:
        self._unsaved.set()
        self._unconfirmed.set()
        if new.state is State.RUNNING:
            self.thawer.look()  # while it stood still it could not be thawed
        texts = lifecycle_event(old, new)
        if texts is not None:
            event, detail = texts
            at, kind = datetime.now(UTC), EventKind.LIFECYCLE
            self._publish(Event(kind=kind, vm=self.name, at=at, event=event, detail=detail))

    async def _keep_condition(self) -> None:
        """Write the condition down after each change, so that the next daemon knows reasons."""
        while True:
            await self._unsaved.wait()
            self._unsaved = trio.Event()
            vm = self.attached
            if vm is None:
                continue
            remembered = partial(remember, self.store, vm.identity, self.tracker.condition)
            try:
                await in_thread(remembered)
            except StoreError as exc:
                _log.warning("VM %s: the next daemon will not know its state: %s", self.name, exc)

    async def _confirm_conditions(self) -> None:
        """Ask QEMU after each change, between jobs: the condition is only as true as events are."""
        while True:
            await self._unconfirmed.wait()
            self._unconfirmed = trio.Event()
            if self.attached is not None and self.job is None:  # a job asks for itself
                await self._confirm_condition(self.attached)

    async def _confirm_condition(self, vm: AttachedVm) -> None:
        heard = self.tracker.heard
        try:
            status = (await vm.session.execute(QueryStatus())).status
        except VmError as exc:
            _log.debug("VM %s: its state is not confirmed: %s", self.name, exc)
            return
        if (self.job, self.attached, self.tracker.heard) == (None, vm, heard):
            self.tracker.on_asked(status)

    def _remembered(self, vm: AttachedVm) -> Condition | None:
        """What is known of this very process from before this session."""
        if self.starting is not None:
            return self.starting
        return recall(self.store, vm.identity)

    # --- jobs ----------------------------------------------------------------------------

    def claim(self, job: Job) -> None:
        """Make *job* the one that may change this VM.

        Raises: VmBusy: another one runs.
        """
        if self.job is not None:
            info = self.job.info()
            if info.phase.ended:
                raise VmBusy(
                    f"VM {self.name} is busy: what a {info.kind} job has left is being put right"
                )
            raise VmBusy(
                f"VM {self.name} is busy: a {info.kind} job has been running for "
                f"{info.elapsed_ms / 1000:.1f} s (phase {info.phase})"
            )
        self.job = job

    def require_not_reverting(self) -> None:
        """Raise VmBusy while the guest's state is kept, or another's is put in its place."""
        if self.job is not None and self.job.kind is JobKind.REVERT:
            raise VmBusy(
                f"VM {self.name} is being put back to snapshot {self.job.snapshot}: its guest "
                "stands still for that, and goes on by itself"
            )

    def let_go(self) -> None:
        """The job has ended."""
        self.last_job, self.job = self.job, None
        self.thawer.look()
        self._unconfirmed.set()

    def require_attached(self) -> AttachedVm:
        """The VM as it is attached now. Raises: WrongState: it is not, and why."""
        if self.attached is None:
            raise WrongState(
                f"VM {self.name} is {self.tracker.condition.state.text}, or its QEMU does not "
                f"answer: {self.problem}"
            )
        return self.attached

    def while_attached(self, work: Chore) -> None:
        """Do *work* in the background, until it is done or the VM's QEMU is gone.

        It is nothing that anybody waits for: a failure is a warning.
        """
        try:
            self._chores.send_nowait(work)
        except trio.WouldBlock:
            _log.warning("VM %s: there is enough to do in the background already", self.name)

    async def _do_chores(self) -> None:
        async for work in self._to_do:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancel_when_detached, nursery.cancel_scope)
                try:
                    await work()
                except QsnapError as exc:
                    _log.warning("VM %s: %s", self.name, exc)
                nursery.cancel_scope.cancel()

    async def _cancel_when_detached(self, scope: trio.CancelScope) -> None:
        await self.wait_detached()
        scope.cancel()

    async def wait_attached(self) -> AttachedVm:
        """Wait until some QEMU is attached."""
        while self.attached is None:
            self._hurry.set()
            self._hurry = trio.Event()
            await self._changed.wait()
        return self.attached

    async def wait_entered(self) -> None:
        """Wait until no QEMU is about to be attached."""
        while self.is_entering:
            await self._changed.wait()

    async def wait_settled(self) -> None:
        """Wait until a QEMU is attached, or none can be."""
        while self.attached is None and self.tracker.condition.state is not State.SHUTOFF:
            await self._changed.wait()

    async def wait_detached(self) -> None:
        """Wait until none is."""
        while self.attached is not None:
            await self._changed.wait()
