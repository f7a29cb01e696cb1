"""One snapshot from request to commit, most often a checkpoint.

The shape of it: plan, write the plan to the journal, make everything that can be made
beforehand, capture, finish, commit. Whatever goes wrong before the commit, one function
(`undo.put_back`) makes it as if it had never been asked for. After the commit nothing is
undone; what still goes wrong is a warning on a snapshot that exists.
"""

import logging
from functools import partial

import trio

from qsnapd.errors import (
    AgentError,
    CommandRefused,
    DiskStalled,
    Effect,
    GuestLeftPaused,
    QsnapError,
)
from qsnapd.faults import Point
from qsnapd.model.job import Phase
from qsnapd.model.plan import CheckpointPlan, JournalEntry
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Manifest, Strategy
from qsnapd.qmp.migration import MigrateSetCapabilities
from qsnapd.snapshot.deleting.former_names import with_former_names
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.background import capture_background
from qsnapd.snapshot.taking.capture import Capture
from qsnapd.snapshot.taking.committing import commit, is_committed, settle_committed
from qsnapd.snapshot.taking.disk_only import capture_disks
from qsnapd.snapshot.taking.finish import describe, finish_image
from qsnapd.snapshot.taking.freeze import require_freezable
from qsnapd.snapshot.taking.halt import end_vm, where_disks_are
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.snapshot.taking.precopy import capture_precopy
from qsnapd.snapshot.taking.preparing import Preparation
from qsnapd.snapshot.taking.room import Room
from qsnapd.snapshot.taking.saves import Saves
from qsnapd.snapshot.taking.settling import let_guest_go
from qsnapd.snapshot.taking.situation import look
from qsnapd.snapshot.taking.stopped import capture_stopped
from qsnapd.snapshot.taking.targets import check_targets, flush_disks
from qsnapd.snapshot.undo import put_back
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_slow_thread, in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.provisions import NO_PROVISIONS, Provisions

HALT_LIMIT_S = 150.0
"""How long the end of QEMU may take, which may be for a service manager to bring about."""

_CAPTURES = {
    Strategy.STOPPED: capture_stopped,
    Strategy.PRECOPY: capture_precopy,
    Strategy.BACKGROUND: capture_background,
}
_log = logging.getLogger(__name__)


class Checkpoint:
    """Takes one snapshot of one VM; used once.

    *launcher*: who must know that the VM is ended, if a request may ask for that.
    """

    def __init__(
        self,
        vm: AttachedVm,
        store: VmStore,
        job: Job,
        *,
        qemu_img: str,
        provisions: Provisions = NO_PROVISIONS,
        launcher: Launcher | None = None,
        room: Room | None = None,
        saves: Saves | None = None,
    ) -> None:
        self._vm = vm
        self._store = store
        self._job = job
        self._qemu_img = qemu_img
        self._provisions = provisions
        self._launcher = launcher
        self._room = room or Room(store)
        self._saves = saves or Saves()
        self._preparation: Preparation | None = None

    async def take(self, request: CreateRequest, *, holds: bool = False) -> Manifest:
        """Take the snapshot.

        Preconditions: no other job changes this VM; the caller sees to that.
        On success: the snapshot exists and is current; a guest that ran runs on its overlays,
          unless this *holds* it, because the caller is about to end its QEMU. Without
          metadata the disks have moved and the memory is saved, and no snapshot is listed.
          With `halt` the VM's QEMU has ended.
        On failure or cancellation before the commit: as if never asked; the error's `effect`
          says so.
        Raises: RequestError: refused, nothing was touched. VmError, StoreError.
          GuestLeftPaused: the one failure that leaves something: somebody must act.
        """
        if request.disk_only:
            return await self._attempt(request, holds=holds)
        async with self._saves.turn(self._job):
            return await self._take_memory(request, holds=holds)

    async def _take_memory(self, request: CreateRequest, *, holds: bool) -> Manifest:
        try:
            return await self._attempt(request, holds=holds)
        except CommandRefused as exc:
            # QEMU says only now that this host does not let it save in the background:
            # plan again, with that known. It is the plan that refuses or takes another way.
            refused = exc.command == MigrateSetCapabilities.name
            if not refused or exc.effect is not Effect.ROLLED_BACK:
                raise
            self._job.enter(Phase.PREPARING)
            return await self._attempt(request, holds=holds, background_refusal=exc.desc)

    @property
    def can_be_taken_back(self) -> bool:
        """Whether `take_back` would succeed now: an old QEMU needs its guest to run for that."""
        plan = self._preparation.entry.plan if self._preparation is not None else None
        return isinstance(plan, CheckpointPlan) and (
            plan.was_running or plan.nodes_can_be_activated
        )

    async def take_back(self) -> None:
        """Make it as if the checkpoint, which was taken a moment ago, had never been asked for.

        Preconditions: nobody has used the snapshot, and the VM's QEMU is the same.
        On success: as `take` leaves it when it fails; a guest that ran runs.
        On failure: the journal tells the next daemon, or the next attempt, to go on.
        Raises: StoreError; what `put_back` raises.
        """
        assert self._preparation is not None, "it was taken"
        entry, store = self._preparation.entry, self._store
        plan = entry.plan
        assert isinstance(plan, CheckpointPlan)
        await in_thread(store.journal.write, entry)
        await self._job.reach(Point.TAKE_BACK_NOTED)
        await in_thread(store.set_current, plan.parent)
        await in_thread(store.uncommit, plan.name)
        await self._job.reach(Point.TAKE_BACK_WITHDRAWN)
        await put_back(self._vm, entry, store.journal, self._job.patience)
        await in_thread(store.made.forget_gone)
        await in_thread(store.unstage, plan.name)
        await in_thread(store.journal.clear)

    async def _attempt(
        self, request: CreateRequest, *, holds: bool, background_refusal: str | None = None
    ) -> Manifest:
        store = self._store
        try:
            self._vm = await self._vm.with_cpu()
            self._vm.tracker.resume_asked = False  # that was during an earlier job
            now = await look(
                self._vm,
                snapshots=frozenset(await in_thread(store.snapshots)),
                current=await in_thread(store.current),
                directory=store.directory,
                background_refusal=background_refusal,
                bandwidth_bytes_per_s=self._saves.share_bytes_per_s,
            )
        except QsnapError as exc:
            exc.effect = Effect.NONE  # a question without an answer: nothing was touched
            raise
        plan = plan_checkpoint(request, now, provisions=self._provisions, holds=holds)
        self._job.snapshot = plan.name
        staging = store.partial_path(plan.name)
        named = {disk.file for disk in request.disks}
        plan = await in_thread(check_targets, plan, self._room, staging, named)
        if plan.agent is not None:
            await require_freezable(self._vm, self._provisions.require_agent(plan.vm))
        identity_of_qemu = self._vm.identity
        entry = JournalEntry(
            plan=plan,
            pid=identity_of_qemu.pid,
            start_time_ticks=identity_of_qemu.start_time_ticks,
        )
        await in_thread(store.journal.write, entry)
        self._preparation = preparation = Preparation(self._vm, store, self._job, entry)
        try:
            await self._job.reach(Point.CREATE_PLANNED)
            with preparation:
                manifest = await self._run(plan, preparation)
        except BaseException as exc:
            was = exc.effect if isinstance(exc, QsnapError) else Effect.NONE
            self._set_effect(exc, Effect.UNKNOWN)  # until the journal has been worked through
            patience = self._job.patience
            with (
                trio.move_on_after(patience.limit_s, shield=True) as ending,
                patience.extending(ending),
            ):
                await self._end_badly(preparation, exc, was)
            raise
        await self._settle(plan)
        return manifest

    async def _end_badly(
        self, preparation: Preparation, cause: BaseException, was: Effect
    ) -> None:
        """Undo it all, if that can be done now; else the journal stands for the mender.

        *was*: the effect that *cause* had by itself.
        """
        plan = preparation.entry.plan
        assert isinstance(plan, CheckpointPlan)
        if not (plan.halts and await self._is_committed()):
            # Before any other file is looked at: their disk may stall.
            await self._let_guest_run(plan, cause)
        if isinstance(cause, DiskStalled):
            # What is stuck may yet be done, so no file is touched before.
            self._job.stalled = cause
        elif not await self._is_committed():
            await self._undo(preparation, cause, was)

    async def _let_guest_run(self, plan: CheckpointPlan, cause: BaseException) -> None:
        self._job.enter(Phase.UNDOING)
        try:
            self._tell_of(await let_guest_go(self._vm, plan, self._job.patience), cause)
        except GuestLeftPaused as exc:
            raise exc from cause
        except QsnapError as exc:
            _log.error("VM %s: undoing %s is not finished: %s", plan.vm, plan.name, exc)

    async def _is_committed(self) -> bool:
        entry = await in_thread(self._store.journal.read)
        assert entry is not None, "the journal holds the plan until the job has ended"
        assert isinstance(entry.plan, CheckpointPlan)
        return await in_thread(is_committed, entry.plan, self._store)

    async def _run(self, plan: CheckpointPlan, preparation: Preparation) -> Manifest:
        self._note(plan.notes)
        target = await preparation.make(qemu_img=self._qemu_img)
        capture = Capture(self._vm, plan, target, self._job, self._room, self._saves)
        if plan.strategy is None:
            agent = self._provisions.require_agent(plan.vm) if plan.agent else None
            await capture_disks(capture, self._store, agent)
            if agent is not None:
                await self._job.reach(Point.CAPTURE_THAWED)
        else:
            self._job.enter(Phase.SAVING)
            await _CAPTURES[plan.strategy](capture)
        await self._job.reach(Point.CAPTURE_LEFT)
        self._job.enter(Phase.FINISHING)
        await in_slow_thread(partial(flush_disks, plan), self._job.patience)
        image, ram_blocks = None, self._vm.ram_blocks
        if target is not None:
            image, ram_blocks = await finish_image(
                target, ram_blocks, self._job.patience
            )
        manifest = describe(self._vm, plan, capture, image, ram_blocks, self._job.elapsed_ms)
        manifest = await in_thread(with_former_names, manifest, self._store.made)
        await in_thread(commit, self._store, preparation.entry, manifest)
        return manifest

    def _note(self, notes: tuple[str, ...]) -> None:
        known = self._job.notes
        self._job.notes = (*known, *(note for note in notes if note not in known))

    async def _undo(
        self, preparation: Preparation, cause: BaseException, was: Effect
    ) -> None:
        """Put everything back; the journal stays if that fails, for the next attempt.

        *was*: the effect that *cause* had by itself.
        Raises: GuestLeftPaused: the one failure that is worse than *cause*.
        """
        self._job.enter(Phase.UNDOING)
        entry = await in_thread(self._store.journal.read)
        assert entry is not None, "the journal holds the plan until the job has ended"
        plan = entry.plan
        assert isinstance(plan, CheckpointPlan)
        try:
            done = await put_back(self._vm, entry, self._store.journal, self._job.patience)
            await in_thread(self._store.made.forget_gone)
            if preparation.has_staged:
                await in_thread(self._store.unstage, plan.name)
            await self._job.reach(Point.UNDO_UNSTAGED)
            await in_thread(self._store.journal.clear)
            await self._job.reach(Point.UNDONE)
        except GuestLeftPaused as exc:
            raise exc from cause
        except QsnapError as exc:
            if isinstance(exc, DiskStalled):
                self._job.stalled = exc
            _log.error("VM %s: undoing %s is not finished: %s", plan.vm, plan.name, exc)
        else:
            # An agent that has not answered may have frozen what nobody has thawed yet.
            frozen = isinstance(cause, AgentError) and was is Effect.UNKNOWN
            self._job.effect = Effect.ROLLED_BACK
            self._tell_of(done, cause)
            self._set_effect(cause, Effect.PARTIAL if frozen else Effect.ROLLED_BACK)

    def _tell_of(self, done: str | None, cause: BaseException) -> None:
        """*done*: what had to be done to the guest, if anything."""
        if done is None:
            return
        _log.warning("VM %s: %s", self._vm.name, done)
        self._note((done,))
        if isinstance(cause, QsnapError):
            cause.add(done)

    def _set_effect(self, cause: BaseException, effect: Effect) -> None:
        self._job.effect = effect
        if isinstance(cause, QsnapError):
            cause.effect = effect

    async def _settle(self, plan: CheckpointPlan) -> None:
        """After the commit: what is left to tidy up, none of which can harm the snapshot."""
        patience = self._job.patience
        with (
            trio.move_on_after(patience.limit_s, shield=True) as settling,
            patience.extending(settling),
        ):
            try:
                await self._job.reach(Point.COMMITTED)
                if plan.halts:
                    self._note(where_disks_are(plan))
                    with trio.move_on_after(HALT_LIMIT_S), patience.suspended():
                        await end_vm(self._vm, self._launcher)
                await settle_committed(
                    self._vm, plan, self._store, patience, is_ended=plan.halts
                )
                return
            except QsnapError as exc:
                problem = str(exc)
        if settling.cancelled_caught:
            problem = "tidying up behind it took too long"
        self._job.effect = Effect.UNKNOWN  # the journal stands
        _log.warning("VM %s: %s exists, but: %s", plan.vm, plan.name, problem)
        self._note((f"{plan.name} was taken, but: {problem}",))
