"""One checkpoint from request to commit.

The shape of it: plan, write the plan to the journal, make everything that can be made
beforehand, capture, finish, commit. Whatever goes wrong before the commit, one function
(`undo.put_back`) makes it as if it had never been asked for. After the commit nothing is
undone; what still goes wrong is a warning on a snapshot that exists.
"""

import logging
import os
from contextlib import ExitStack
from pathlib import Path

import trio

from qsnapd.errors import (
    CommandRefused,
    Effect,
    GuestLeftPaused,
    QsnapError,
    StoreError,
    TargetRefused,
)
from qsnapd.image.files import create_exclusive, identity, publish, require_space
from qsnapd.model.job import Phase
from qsnapd.model.plan import CheckpointPlan, JournalEntry, PivotPlan
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, Manifest, Strategy
from qsnapd.qmp.migration import MigrateSetCapabilities, MigrateSetParameters
from qsnapd.snapshot.background import capture_background
from qsnapd.snapshot.capture import Capture
from qsnapd.snapshot.finish import describe, finish_image
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.memory import MemoryTarget
from qsnapd.snapshot.overlays import add_overlay_node, make_overlay, publish_overlays
from qsnapd.snapshot.plan import plan_checkpoint
from qsnapd.snapshot.precopy import capture_precopy
from qsnapd.snapshot.situation import look
from qsnapd.snapshot.stopped import capture_stopped
from qsnapd.snapshot.undo import put_back, release_qemu
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm

UNDO_LIMIT_S = 300.0
"""Merging back what the guest wrote meanwhile takes as long as the disk needs."""
SETTLE_LIMIT_S = 30.0
COMMIT_LIMIT_S = 60.0
DEVICE_STATE_BYTES = 64 << 20
"""Room for everything in an image that is not guest RAM."""

_CAPTURES = {
    Strategy.STOPPED: capture_stopped,
    Strategy.PRECOPY: capture_precopy,
    Strategy.BACKGROUND: capture_background,
}
_log = logging.getLogger(__name__)


class Checkpoint:
    """Takes one checkpoint of one VM; used once."""

    def __init__(self, vm: AttachedVm, store: VmStore, job: Job, *, qemu_img: str) -> None:
        self._vm = vm
        self._store = store
        self._job = job
        self._qemu_img = qemu_img
        self._made = ExitStack()
        self._entry: JournalEntry | None = None
        self._has_staged = False

    async def take(self, request: CreateRequest, *, holds: bool = False) -> Manifest:
        """Take the checkpoint.

        Preconditions: no other job changes this VM; the caller sees to that.
        On success: the snapshot exists and is current; a guest that ran runs on its overlays,
          unless this *holds* it, because the caller is about to end its QEMU.
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
        await trio.to_thread.run_sync(store.unstage, plan.name)
        await trio.to_thread.run_sync(store.journal.clear)

    async def _attempt(
        self, request: CreateRequest, *, holds: bool, background_refusal: str | None = None
    ) -> Manifest:
        store = self._store
        try:
            self._vm = await self._vm.with_cpu()
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
        plan = plan_checkpoint(request, now, holds=holds)
        self._job.snapshot = plan.name
        staging = store.partial_path(plan.name)
        await trio.to_thread.run_sync(check_targets, plan, store.directory, staging)
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
            # Committed all the same? Then the next start settles it, by the journal.
            if plan.name not in store.snapshots():
                with trio.move_on_after(UNDO_LIMIT_S, shield=True):
                    await self._undo(plan, exc)
            raise
        await self._settle(plan)
        return manifest

    async def _run(self, plan: CheckpointPlan, entry: JournalEntry) -> Manifest:
        target = await self._prepare(plan, entry)
        self._job.enter(Phase.SAVING)
        capture = Capture(self._vm, plan, target, self._job)
        await _CAPTURES[plan.strategy](capture)
        self._job.enter(Phase.FINISHING)
        image, ram_blocks = await finish_image(target, self._vm.ram_blocks)
        manifest = describe(self._vm, plan, capture, image, ram_blocks, self._job.elapsed_ms)
        with trio.fail_after(COMMIT_LIMIT_S, shield=True):
            await trio.to_thread.run_sync(self._commit, plan, manifest)
        return manifest

    async def _prepare(self, plan: CheckpointPlan, entry: JournalEntry) -> MemoryTarget:
        """Make files and nodes; the guest runs and notices nothing."""
        session = self._vm.session
        if plan.capabilities:  # first, because QEMU may refuse them
            await session.execute(MigrateSetCapabilities.of(plan.capabilities))
        await trio.to_thread.run_sync(self._store.stage, plan.name)
        self._has_staged = True
        memory = await trio.to_thread.run_sync(create_exclusive, Path(plan.memory_partial))
        self._made.callback(os.close, memory)
        overlays = [await self._make_overlay(pivot) for pivot in plan.pivots]
        entry = entry.model_copy(update={"made": tuple(map(identity, (memory, *overlays)))})
        self._entry = entry
        await trio.to_thread.run_sync(self._store.journal.write, entry)
        await publish_overlays([pivot.overlay for pivot in plan.pivots])
        for pivot, overlay in zip(plan.pivots, overlays, strict=True):
            await add_overlay_node(session, pivot, overlay)
        await session.execute(MigrateSetParameters(parameters=plan.parameters))
        target = MemoryTarget(plan, memory)
        await target.hand_over(session)
        await trio.to_thread.run_sync(_flush_disks, plan)
        return target

    async def _make_overlay(self, pivot: PivotPlan) -> int:
        overlay = await make_overlay(pivot.overlay, qemu_img=self._qemu_img)
        self._made.callback(os.close, overlay)
        return overlay

    def _commit(self, plan: CheckpointPlan, manifest: Manifest) -> None:
        """Give the image its name, then the snapshot its existence. Blocks."""
        if Path(plan.memory_partial).parent != self._store.partial_path(plan.name):
            publish(Path(plan.memory_partial), Path(plan.memory_file))
        self._store.commit(plan.name, manifest)

    async def _undo(self, plan: CheckpointPlan, cause: BaseException) -> None:
        """Put everything back; the journal stays if that fails, for the next attempt.

        Raises: GuestLeftPaused: the one failure that is worse than *cause*.
        """
        self._job.enter(Phase.UNDOING)
        self._set_effect(cause, Effect.UNKNOWN)
        entry = await trio.to_thread.run_sync(self._store.journal.read)
        assert entry is not None, "the journal holds the plan until the job has ended"
        try:
            await put_back(self._vm, entry)
            if self._has_staged:  # else what lies there is an import's of that name
                await trio.to_thread.run_sync(self._store.unstage, plan.name)
                self._has_staged = False
            await trio.to_thread.run_sync(self._store.journal.clear)
        except GuestLeftPaused as exc:
            raise exc from cause
        except QsnapError as exc:
            _log.error("VM %s: undoing %s is not finished: %s", plan.vm, plan.name, exc)
        else:
            self._set_effect(cause, Effect.ROLLED_BACK)

    def _set_effect(self, cause: BaseException, effect: Effect) -> None:
        self._job.effect = effect
        if isinstance(cause, QsnapError):
            cause.effect = effect

    async def _settle(self, plan: CheckpointPlan) -> None:
        """After the commit: what is left to tidy up, none of which can harm the snapshot."""
        with trio.move_on_after(SETTLE_LIMIT_S, shield=True):
            try:
                await settle_committed(self._vm, plan, self._store)
            except QsnapError as exc:
                _log.warning("VM %s: %s exists, but: %s", plan.vm, plan.name, exc)


async def settle_committed(vm: AttachedVm, plan: CheckpointPlan, store: VmStore) -> None:
    """Finish a checkpoint that is committed; idempotent, so that a restart can do it too."""
    await trio.to_thread.run_sync(store.set_current, plan.name)
    await release_qemu(vm.session, plan)
    await trio.to_thread.run_sync(store.journal.clear)


def check_targets(plan: CheckpointPlan, directory: Path, staging: Path) -> None:
    """Refuse what could only fail later: files in the way, no room for the image. Blocks.

    A mapped-ram image is never larger than RAM; neither is a stream that sends each page
    once, but for a few bytes a page. A precopy stream may become as large as its limit.
    Raises: StoreFull, TargetRefused.
    """
    if os.path.lexists(staging):
        raise TargetRefused(
            f"{staging} is there: a snapshot {plan.name} is being imported, or was begun and never "
            "ended"
        )
    memory = Path(plan.memory_file)
    for path in (memory, *(Path(pivot.overlay.path) for pivot in plan.pivots)):
        if os.path.lexists(path):
            raise TargetRefused(f"{path} exists already, and an existing file is never overwritten")
    # The snapshot's own folder does not exist yet.
    where = directory if memory.parent.parent == directory else memory.parent
    needed_bytes = plan.ram_bytes
    if plan.image_format is ImageFormat.STREAM:
        needed_bytes += plan.ram_bytes // 256
        if plan.strategy is Strategy.PRECOPY:
            needed_bytes = max(needed_bytes, plan.precopy_limit_bytes)
    require_space(where, needed_bytes + DEVICE_STATE_BYTES)


def _flush_disks(plan: CheckpointPlan) -> None:
    """Sync the disks' files now, so that `stop` finds little to flush. Blocks."""
    for pivot in plan.pivots:
        try:
            descriptor = os.open(pivot.overlay.backing, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            _log.debug("cannot pre-flush %s: %s", pivot.overlay.backing, exc)
            continue
        try:
            os.fdatasync(descriptor)
        except OSError as exc:
            raise StoreError(
                f"disk {pivot.target}: {pivot.overlay.backing} cannot be synced: {exc.strerror}"
            ) from exc
        finally:
            os.close(descriptor)
