"""Starting a QEMU from a plan and loading its memory: what revert and clone share."""

import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from qsnapd.errors import ImageInvalid, VmError
from qsnapd.faults import Point
from qsnapd.image.files import identity
from qsnapd.image.mapped_ram import read_layout
from qsnapd.image.view import make_view
from qsnapd.model.job import Phase
from qsnapd.model.plan import JournalEntry, Loading, Restore
from qsnapd.model.snapshot import FileIdentity
from qsnapd.model.state import Condition
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring.load import finish_loading, load_memory
from qsnapd.snapshot.restoring.read_ahead import read_ahead
from qsnapd.snapshot.taking.overlays import make_overlay, publish_overlays
from qsnapd.snapshot.taking.room import Room
from qsnapd.snapshot.taking.saves import Saves
from qsnapd.store.journal import Journal
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.kept_ram import empty_file
from qsnapd.vm.launch import Parent
from qsnapd.vm.launcher import Launcher, Started
from qsnapd.vm.proc import launch_token, open_files
from qsnapd.vm.process import KILL_LIMIT_S, end_launched, kill, wait_gone
from qsnapd.vm.tracker import Tracker

LOAD_LIMIT_S = 3600.0
LOOK_EVERY_S = 0.1
LOG_NAME = ".qemu.log"


class Seat(Protocol):
    """A VM's place, which outlives each of its QEMU processes."""

    name: str
    qmp: Path
    store: VmStore
    tracker: Tracker
    launcher: Launcher
    parent: Parent
    room: Room
    saves: Saves
    attached: AttachedVm | None
    starting: Condition | None

    async def wait_attached(self) -> AttachedVm: ...
    async def wait_detached(self) -> None: ...
    def while_attached(self, work: Callable[[], Awaitable[object]]) -> None: ...


async def make_files(entry: JournalEntry, journal: Journal, *, qemu_img: str) -> JournalEntry:
    """Make what the plan's QEMU will be started on: overlays, and a lazy restore's view.

    Returns the entry that tells of them, as it now stands in *journal*.
    On failure or cancellation: `remove_files` on the journal's entry removes what exists.
    Raises: TargetRefused, StoreError, ImageInvalid.
    """
    plan = entry.plan
    assert isinstance(plan, Restore)
    with ExitStack() as descriptors:
        overlays = []
        for overlay in plan.overlays:
            overlays.append(await make_overlay(overlay, qemu_img=qemu_img))
            descriptors.callback(os.close, overlays[-1])
        entry = entry.model_copy(update={"made": tuple(map(identity, overlays))})
    await in_thread(journal.write, entry)
    if plan.loading is not None and plan.loading.view is not None:
        await in_thread(_make_view, plan.loading, Path(plan.loading.view))
    await publish_overlays(plan.overlays)
    return entry


def make_view_again(loading: Loading) -> None:
    """Make a lazy restore's view anew, if it is one. Blocks. Raises: as `make_files`."""
    if loading.view is not None:
        Path(loading.view).unlink(missing_ok=True)
        _make_view(loading, Path(loading.view))


def _make_view(loading: Loading, view: Path) -> None:
    try:
        descriptor = os.open(loading.memory_file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageInvalid(f"cannot open {loading.memory_file}: {exc.strerror}") from exc
    try:
        make_view(descriptor, read_layout(descriptor), loading.mapped, view)
    finally:
        os.close(descriptor)


async def start(
    seat: Seat, plan: Restore, job: Job, *, made: tuple[FileIdentity, ...], shown_as: Condition
) -> AttachedVm:
    """Start the plan's QEMU and load its memory; its guest stands still, *shown_as* that.

    Preconditions: no QEMU serves the seat; the plan's files are made.
    On failure or cancellation: that QEMU is gone, if it could be found; its guest has not
      run, so nothing is lost with it.
    Raises: VmError: it did not start, or could not load.
    """
    job.enter(Phase.STARTING)
    seat.starting = shown_as
    try:
        for path in plan.loading.emptied if plan.loading is not None else ():
            await in_thread(empty_file, path, plan.launch.uid)
        started = await seat.launcher.start(plan.launch, seat.store.directory / LOG_NAME)
        with job.patience.suspended():
            vm = await _wait_started(seat, started, plan, made)
        try:
            await job.reach(Point.REVERT_STARTED)
            if plan.loading is not None:
                with trio.fail_after(LOAD_LIMIT_S), job.patience.suspended():
                    await load_memory(vm, plan.loading, job)
            await job.reach(Point.REVERT_LOADED)
        except BaseException:
            with trio.move_on_after(KILL_LIMIT_S, shield=True):
                # First, because a service would start it again once it has ended.
                await in_thread(started.kill)
                kill(vm.identity)
                await wait_gone(vm.identity)
                await seat.wait_detached()
            raise
        return vm
    except trio.TooSlowError as exc:
        raise VmError(f"loading the memory took more than {LOAD_LIMIT_S:g} s") from exc
    finally:
        seat.starting = None


async def _wait_started(
    seat: Seat, started: Started, plan: Restore, made: tuple[FileIdentity, ...]
) -> AttachedVm:
    """Wait until the supervisor has attached to the QEMU that was started.

    Raises: VmError: it ended, did not answer in time, or another took its socket.
    """
    limit_s = started.patience_s
    try:
        with trio.move_on_after(limit_s):
            while True:
                with trio.move_on_after(LOOK_EVERY_S):
                    vm = await seat.wait_attached()
                    if await in_thread(runs_by, plan, made, vm.identity.pid):
                        return vm
                    raise VmError(
                        f"another QEMU, pid {vm.identity.pid}, serves {seat.qmp}; "
                        "it was left alone. Does a service start this VM whenever it ends?"
                    )
                if words := await in_thread(started.failed):
                    raise VmError(f"QEMU says: {words}")
        raise VmError(f"QEMU did not answer within {limit_s:g} s of its start")
    except BaseException:
        with trio.move_on_after(KILL_LIMIT_S, shield=True):
            await in_thread(started.kill)
            await end_launched(plan.token)  # with -daemonize it is another process by now
        raise


def runs_by(plan: Restore, made: tuple[FileIdentity, ...], pid: int) -> bool:
    """Whether a QEMU was started by *plan*, or by somebody else on its overlays. Blocks."""
    if launch_token(pid) == plan.token:
        return True
    overlays = {(file.device, file.inode) for file in made}
    return not overlays.isdisjoint(open_files(pid))


def look_after(seat: Seat, vm: AttachedVm, plan: Restore, job: Job, *, reads_ahead: bool) -> None:
    """See to it, in the background, that the rest of the memory comes in: the guest runs."""
    loading = plan.loading
    if loading is not None and loading.on_demand:
        seat.while_attached(partial(finish_loading, vm, job))
    if loading is not None and loading.view is not None and reads_ahead:
        seat.while_attached(partial(read_ahead, Path(loading.memory_file)))

