"""Starting another VM from a snapshot, beside the one it was taken of.

The clone exists from the moment it is registered: its QEMU has loaded the memory then, and
its guest has not run. Until then everything can be undone, by this process or the next one,
because nothing is lost with it. The original's store is only read.
"""

import os
import stat
from pathlib import Path

import trio

from qsnapd.errors import Effect, VmError
from qsnapd.faults import Point, reach
from qsnapd.image.files import identity, remove_if_ours, sync_removals
from qsnapd.model.plan import ClonePlan, JournalEntry
from qsnapd.model.registration import Registration
from qsnapd.model.snapshot import FileIdentity, Manifest
from qsnapd.model.state import Condition
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.start import Seat, look_after, make_files, start
from qsnapd.snapshot.restoring.switch import hold_lease
from qsnapd.snapshot.undo import remove_files
from qsnapd.store.registry import read_registration, register
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.process import end_launched


class Clone:
    """Makes one clone, once."""

    def __init__(self, seat: Seat, job: Job, source: VmStore, *, qemu_img: str) -> None:
        self._seat = seat
        """The clone's own."""
        self._job = job
        self._source = source
        self._qemu_img = qemu_img
        self.is_undone = False
        """Nothing is left of what `run` began, but for the journal that tells of it."""

    async def run(self, plan: ClonePlan, *, reads_ahead: bool = False) -> Manifest:
        """Start the clone; returns the snapshot it begins at.

        Preconditions: `preflight` let the snapshot pass; nobody uses the clone's name.
        On success: it runs (or stands, as planned) on disks of its own, and is registered.
        On failure or cancellation before it is registered: as if never asked, but for its
          folder with the journal, which is the caller's to remove. After that: it exists,
          and the error says in which state.
        Raises: TargetRefused, StoreError, VmError.
        """
        manifest = self._source.manifest(plan.name)
        store = self._seat.store
        entry = JournalEntry(plan=plan, pid=0, start_time_ticks=0)
        try:
            await in_thread(store.restoring.write, entry)
            await self._job.reach(Point.CLONE_PLANNED)
            await in_thread(_make_pipes, plan)
            entry = await make_files(entry, store.restoring, qemu_img=self._qemu_img)
            await self._job.reach(Point.CLONE_FILES_MADE)
            self._job.instruction = self._seat.launcher.instruction(plan.launch)
            shown_as = Condition.PAUSED_FROM_SNAPSHOT
            vm = await start(self._seat, plan, self._job, made=entry.made, shown_as=shown_as)
            await hold_lease(vm, plan, self._source)
            await self._job.reach(Point.CLONE_LOADED)
            await in_thread(register, store, _registration(plan, entry))
            await self._job.reach(Point.CLONE_REGISTERED)
        except BaseException:
            patience = self._job.patience
            with (
                trio.move_on_after(patience.limit_s, shield=True) as undoing,
                patience.extending(undoing),
            ):
                await undo_clone(entry, store)
                self.is_undone = True
            raise
        with self._job.shielded():
            self._job.effect = Effect.UNKNOWN
            await finish_clone(vm, plan, store)
            self._job.effect = Effect.NONE
        look_after(self._seat, vm, plan, self._job, reads_ahead=reads_ahead)
        return manifest


async def finish_clone(vm: AttachedVm, plan: ClonePlan, store: VmStore) -> None:
    """Let the guest of a registered clone go on, if it is to; idempotent.

    Raises: VmError: it cannot be made to run. StoreError.
    """
    if plan.to_running:
        await vm.ensure_running(Condition.RUNNING_FROM_SNAPSHOT)
    await reach(Point.CLONE_RUNS)
    await settle_clone(plan, store)


async def settle_clone(plan: ClonePlan, store: VmStore) -> None:
    """Remove what is of no use once the clone is registered. Idempotent. Raises: StoreError."""
    if plan.loading is not None and plan.loading.view is not None:
        await in_thread(Path(plan.loading.view).unlink, True)
        await in_thread(sync_removals, [store.directory])
    await in_thread(store.restoring.clear)
    await reach(Point.CLONED)


async def undo_clone(entry: JournalEntry, store: VmStore) -> None:
    """End the QEMU of a clone that was not registered, and remove all it was made of.

    Idempotent. The journal stays: whoever removes the clone's folder has undone it all.
    Raises: VmError: its QEMU does not end. StoreError: a file cannot be removed.
    """
    plan = entry.plan
    assert isinstance(plan, ClonePlan)
    if await in_thread(read_registration, store) is not None:
        return  # registering it was cut off after it had been done
    await end_launched(plan.token)
    standing = await in_thread(store.restoring.read)
    await in_thread(remove_files, standing or entry)
    await in_thread(_remove_made, plan)


def _make_pipes(plan: ClonePlan) -> None:
    """Make the FIFOs that QEMU will open, as the user it runs as. Raises: VmError."""
    for path in plan.pipes:
        try:
            os.mkfifo(path, 0o600)
            if os.geteuid() == 0:
                give_pipe(path, plan.launch.uid, plan.launch.gid)
        except OSError as exc:
            raise VmError(f"cannot make the pipe {path}: {exc.strerror}") from exc


def give_pipe(path: str, uid: int, gid: int) -> None:
    """Give a FIFO to the user that QEMU runs as. Raises: VmError: it is none. OSError."""
    # The folder may be that user's, who could put something else there meanwhile.
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise VmError(f"cannot make the pipe {path}: something else was put in its place")
        os.chown(f"/proc/self/fd/{descriptor}", uid, gid)
    finally:
        os.close(descriptor)


def _registration(plan: ClonePlan, entry: JournalEntry) -> Registration:
    made = {(file.device, file.inode): file for file in entry.made}
    overlays = (_known(overlay.path) for overlay in plan.overlays)
    return Registration(
        name=plan.vm,
        qmp=plan.qmp,
        source=plan.source,
        snapshot=plan.name,
        created_at=plan.requested_at,
        overlays=tuple(o for o in overlays if o and (o.device, o.inode) in made),
        files=tuple(file for path in _made_paths(plan) if (file := _known(path))),
    )


def _known(path: str) -> FileIdentity | None:
    return identity(Path(path)) if os.path.exists(path) else None


def _made_paths(plan: ClonePlan) -> tuple[str, ...]:
    return (*plan.files, *plan.pipes)


def _remove_made(plan: ClonePlan) -> None:
    """Remove what QEMU, or we for it, made under names that were free before. Blocks."""
    for path in map(Path, _made_paths(plan)):
        try:
            status = path.lstat()
        except OSError:
            continue
        is_of_qemu = any(
            kind(status.st_mode) for kind in (stat.S_ISSOCK, stat.S_ISFIFO, stat.S_ISREG)
        )
        if is_of_qemu and status.st_ctime >= plan.requested_at.timestamp() - 1:
            remove_if_ours(path, status.st_ino)
