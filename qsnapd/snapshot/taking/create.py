"""One snapshot from request to commit, most often a checkpoint.

The shape of it: plan, write the plan to the journal, make everything that can be made
beforehand, capture, finish, commit. Whatever goes wrong before the commit, one function
(`undo.put_back`) makes it as if it had never been asked for. After the commit nothing is
undone; what still goes wrong is a warning on a snapshot that exists.
"""

import logging
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import (
    AgentError,
    CommandRefused,
    Effect,
    GuestLeftPaused,
    QsnapError,
)
from qsnapd.image.files import create_exclusive, identity, publish
from qsnapd.model.job import Phase
from qsnapd.model.plan import CheckpointPlan, JournalEntry, Place
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import Manifest, Strategy
from qsnapd.qmp.migration import MigrateSetCapabilities, MigrateSetParameters
from qsnapd.snapshot.deleting.former_names import note_made, with_former_names
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.background import capture_background
from qsnapd.snapshot.taking.capture import Capture
from qsnapd.snapshot.taking.disk_only import capture_disks
from qsnapd.snapshot.taking.finish import describe, finish_image
from qsnapd.snapshot.taking.freeze import require_freezable
from qsnapd.snapshot.taking.halt import end_vm, where_disks_are
from qsnapd.snapshot.taking.memory import MemoryTarget
from qsnapd.snapshot.taking.overlay_node import add_overlay_node
from qsnapd.snapshot.taking.overlays import complete_overlay, open_overlay, publish_overlays
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.snapshot.taking.precopy import capture_precopy
from qsnapd.snapshot.taking.situation import look
from qsnapd.snapshot.taking.stopped import capture_stopped
from qsnapd.snapshot.taking.targets import check_targets, flush_disks
from qsnapd.snapshot.undo import put_back, release_qemu
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.provisions import NO_PROVISIONS, Provisions

UNDO_LIMIT_S = 300.0
"""Merging back what the guest wrote meanwhile takes as long as the disk needs."""
SETTLE_LIMIT_S = 30.0
HALT_LIMIT_S = 150.0
"""The same with the end of QEMU, which may be for a service manager to bring about."""
COMMIT_LIMIT_S = 60.0

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
    ) -> None:
        self._vm = vm
        self._store = store
        self._job = job
        self._qemu_img = qemu_img
        self._provisions = provisions
        self._launcher = launcher
        self._made = ExitStack()
        self._entry: JournalEntry | None = None
        self._has_staged = False

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
        plan = self._entry.plan if self._entry is not None else None
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
        entry, store = self._entry, self._store
        assert entry is not None, "it was taken"
        plan = entry.plan
        assert isinstance(plan, CheckpointPlan)
        await trio.to_thread.run_sync(store.journal.write, entry)
        await trio.to_thread.run_sync(store.set_current, plan.parent)
        await trio.to_thread.run_sync(store.uncommit, plan.name)
        await put_back(self._vm, entry)
        await trio.to_thread.run_sync(store.made.forget_gone)
        await trio.to_thread.run_sync(store.unstage, plan.name)
        await trio.to_thread.run_sync(store.journal.clear)

    async def _attempt(
        self, request: CreateRequest, *, holds: bool, background_refusal: str | None = None
    ) -> Manifest:
        store = self._store
        try:
            self._vm = await self._vm.with_cpu()
            self._vm.tracker.resume_asked = False  # that was during an earlier job
            now = await look(
                self._vm,
                snapshots=frozenset(store.snapshots()),
                current=store.current(),
                directory=store.directory,
                background_refusal=background_refusal,
            )
        except QsnapError as exc:
            exc.effect = Effect.NONE  # a question without an answer: nothing was touched
            raise
        plan = plan_checkpoint(request, now, provisions=self._provisions, holds=holds)
        self._job.snapshot = plan.name
        staging = store.partial_path(plan.name)
        named = {disk.file for disk in request.disks}
        plan = await trio.to_thread.run_sync(check_targets, plan, store.directory, staging, named)
        if plan.agent is not None:
            await require_freezable(self._vm, self._provisions.require_agent(plan.vm))
        identity_of_qemu = self._vm.identity
        entry = JournalEntry(
            plan=plan,
            pid=identity_of_qemu.pid,
            start_time_ticks=identity_of_qemu.start_time_ticks,
        )
        await trio.to_thread.run_sync(store.journal.write, entry)
        try:
            with self._made:
                manifest = await self._run(plan, entry)
        except BaseException as exc:
            was = exc.effect if isinstance(exc, QsnapError) else Effect.NONE
            self._set_effect(exc, Effect.UNKNOWN)  # until the journal has been worked through
            with trio.move_on_after(UNDO_LIMIT_S, shield=True):
                # Committed all the same? Then the mender settles it, by the journal.
                if not await self._is_committed():
                    await self._undo(plan, exc, was)
            raise
        await self._settle(plan)
        return manifest

    async def _is_committed(self) -> bool:
        entry = await trio.to_thread.run_sync(self._store.journal.read)
        assert entry is not None, "the journal holds the plan until the job has ended"
        assert isinstance(entry.plan, CheckpointPlan)
        return is_committed(entry.plan, self._store)

    async def _run(self, plan: CheckpointPlan, entry: JournalEntry) -> Manifest:
        self._note(plan.notes)
        target = await self._prepare(plan, entry)
        capture = Capture(self._vm, plan, target, self._job)
        if plan.strategy is None:
            agent = self._provisions.require_agent(plan.vm) if plan.agent else None
            await capture_disks(capture, self._store, agent)
        else:
            self._job.enter(Phase.SAVING)
            await _CAPTURES[plan.strategy](capture)
        self._job.enter(Phase.FINISHING)
        image, ram_blocks = None, self._vm.ram_blocks
        if target is not None:
            image, ram_blocks = await finish_image(target, ram_blocks)
        manifest = describe(self._vm, plan, capture, image, ram_blocks, self._job.elapsed_ms)
        manifest = await trio.to_thread.run_sync(with_former_names, manifest, self._store.made)
        with trio.fail_after(COMMIT_LIMIT_S, shield=True):
            await trio.to_thread.run_sync(self._commit, plan, manifest)
        return manifest

    def _note(self, notes: tuple[str, ...]) -> None:
        known = self._job.notes
        self._job.notes = (*known, *(note for note in notes if note not in known))

    async def _prepare(self, plan: CheckpointPlan, entry: JournalEntry) -> MemoryTarget | None:
        """Make files and nodes; the guest runs and notices nothing."""
        session = self._vm.session
        if plan.capabilities:  # first, because QEMU may refuse them
            await session.execute(MigrateSetCapabilities.of(plan.capabilities))
        if plan.keeps_metadata:
            await trio.to_thread.run_sync(self._store.stage, plan.name)
            self._has_staged = True
        target = None
        if plan.memory_partial is not None:
            memory = await self._open(partial(create_exclusive, Path(plan.memory_partial)))
            target = MemoryTarget(plan, memory)
        plans = [pivot.overlay for pivot in plan.pivots]
        overlays = [await self._open(partial(open_overlay, overlay)) for overlay in plans]
        files = list(zip(plans, map(identity, overlays), strict=True))
        made = [file for overlay, file in files if overlay.place is Place.NEW]
        given = [file for overlay, file in files if overlay.place is not Place.NEW]
        empty = [file for overlay, file in files if overlay.place is Place.EMPTY]
        memories = [identity(target.descriptor)] if target else []
        entry = entry.model_copy(update={"made": (*memories, *made), "given": tuple(empty)})
        await self._write_down(entry)
        for overlay, descriptor in zip(plans, overlays, strict=True):
            await complete_overlay(overlay, descriptor, qemu_img=self._qemu_img)
        if given != empty:  # what these held before must never be merged into a disk
            await self._write_down(entry.model_copy(update={"given": tuple(given)}))
        await publish_overlays(plans)
        for pivot, descriptor in zip(plan.pivots, overlays, strict=True):
            await add_overlay_node(self._vm, pivot, descriptor)
        if target is not None:
            await session.execute(MigrateSetParameters(parameters=plan.parameters))
            await target.hand_over(session)
        await trio.to_thread.run_sync(flush_disks, plan)
        return target

    async def _write_down(self, entry: JournalEntry) -> None:
        self._entry = entry
        await trio.to_thread.run_sync(self._store.journal.write, entry)

    async def _open(self, opening: partial[int]) -> int:
        descriptor = await trio.to_thread.run_sync(opening)
        self._made.callback(os.close, descriptor)
        return descriptor

    def _commit(self, plan: CheckpointPlan, manifest: Manifest) -> None:
        """Give the image its name, then the snapshot its existence. Blocks."""
        partial_file = Path(plan.memory_partial) if plan.memory_partial else None
        if partial_file and partial_file.parent != self._store.partial_path(plan.name):
            assert plan.memory_file is not None, "it has a name to be given"
            publish(partial_file, Path(plan.memory_file))
        created = self._entry.made if self._entry else ()
        note_made(self._store.made, [pivot.overlay for pivot in plan.pivots], created)
        if plan.keeps_metadata:
            self._store.commit(plan.name, manifest)
            return
        assert self._entry is not None, "it was prepared"
        committed = plan.model_copy(update={"committed": True})
        self._store.journal.write(self._entry.model_copy(update={"plan": committed}))

    async def _undo(self, plan: CheckpointPlan, cause: BaseException, was: Effect) -> None:
        """Put everything back; the journal stays if that fails, for the next attempt.

        *was*: the effect that *cause* had by itself.
        Raises: GuestLeftPaused: the one failure that is worse than *cause*.
        """
        self._job.enter(Phase.UNDOING)
        entry = await trio.to_thread.run_sync(self._store.journal.read)
        assert entry is not None, "the journal holds the plan until the job has ended"
        try:
            done = await put_back(self._vm, entry)
            await trio.to_thread.run_sync(self._store.made.forget_gone)
            if self._has_staged:  # else what lies there is an import's of that name
                await trio.to_thread.run_sync(self._store.unstage, plan.name)
                self._has_staged = False
            await trio.to_thread.run_sync(self._store.journal.clear)
        except GuestLeftPaused as exc:
            raise exc from cause
        except QsnapError as exc:
            _log.error("VM %s: undoing %s is not finished: %s", plan.vm, plan.name, exc)
        else:
            # An agent that has not answered may have frozen what nobody has thawed yet.
            frozen = isinstance(cause, AgentError) and was is Effect.UNKNOWN
            self._job.effect = Effect.ROLLED_BACK
            if done:
                _log.warning("VM %s: %s", plan.vm, done)
                self._note((done,))
                if isinstance(cause, QsnapError):
                    cause.add(done)
            self._set_effect(cause, Effect.PARTIAL if frozen else Effect.ROLLED_BACK)

    def _set_effect(self, cause: BaseException, effect: Effect) -> None:
        self._job.effect = effect
        if isinstance(cause, QsnapError):
            cause.effect = effect

    async def _settle(self, plan: CheckpointPlan) -> None:
        """After the commit: what is left to tidy up, none of which can harm the snapshot."""
        limit_s = HALT_LIMIT_S if plan.halts else SETTLE_LIMIT_S
        with trio.move_on_after(limit_s, shield=True) as patience:
            try:
                if plan.halts:
                    self._note(where_disks_are(plan))
                    await end_vm(self._vm, self._launcher)
                await settle_committed(self._vm, plan, self._store, is_ended=plan.halts)
            except QsnapError as exc:
                _log.warning("VM %s: %s exists, but: %s", plan.vm, plan.name, exc)
                self._note((f"{plan.name} was taken, but: {exc}",))
        if patience.cancelled_caught:
            _log.warning("VM %s: %s exists; tidying up took too long", plan.vm, plan.name)


def is_committed(plan: CheckpointPlan, store: VmStore) -> bool:
    """Whether the job of *plan*, as it stands in the journal, has come past its commit."""
    return plan.name in store.snapshots() if plan.keeps_metadata else plan.committed


async def settle_committed(
    vm: AttachedVm, plan: CheckpointPlan, store: VmStore, *, is_ended: bool = False
) -> None:
    """Finish a snapshot that is committed; idempotent, so that a restart can do it too.

    *is_ended*: the VM's QEMU was ended since, as was asked for.
    """
    if plan.keeps_metadata:
        await trio.to_thread.run_sync(store.set_current, plan.name)
    if not is_ended:
        await release_qemu(vm.session, plan)
    await trio.to_thread.run_sync(store.journal.clear)
