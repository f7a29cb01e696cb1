"""Putting a VM back to a checkpoint: a new QEMU on new overlays over the frozen images.

Everything that can be wrong with the snapshot is found before the old QEMU is ended. That is
the point of no return; from there on the revert is not cancelled any more.
"""

import logging
import os
import secrets
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import trio

from qsnapd.errors import (
    CommandRefused,
    Effect,
    ImageInvalid,
    QsnapError,
    SessionLost,
    VmError,
    WrongState,
)
from qsnapd.image import mapped_ram, stream
from qsnapd.model.job import Phase
from qsnapd.model.plan import JournalEntry, OverlayPlan, RevertPlan
from qsnapd.model.request import RevertRequest
from qsnapd.model.snapshot import DiskLayer, ImageFormat, Manifest, MemoryImage, Strategy
from qsnapd.model.state import Condition
from qsnapd.qmp.commands import Quit
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.load import load_memory
from qsnapd.snapshot.overlays import make_overlay, publish_overlays
from qsnapd.snapshot.undo import remove_files
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import key_of
from qsnapd.vm.launch import MovedDisk, plan_launch
from qsnapd.vm.process import Started, kill, start, wait_ended
from qsnapd.vm.tracker import Tracker

START_LIMIT_S = 60.0
LOAD_LIMIT_S = 3600.0
LOOK_EVERY_S = 0.1

_log = logging.getLogger(__name__)


class Seat(Protocol):
    """A VM's place, which outlives each of its QEMU processes."""

    name: str
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
        plan = plan_revert(manifest, manifest.memory, end_running=self._seat.attached is not None)
        entry = self._entry(plan)
        await trio.to_thread.run_sync(store.journal.write, entry)
        try:
            entry = await self._make_overlays(plan, entry)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._forget, entry)
            raise
        with trio.CancelScope(shield=True):
            await self._switch(plan, manifest, request)
            await trio.to_thread.run_sync(store.set_current, manifest.name)
            await trio.to_thread.run_sync(store.journal.clear)
        return manifest

    def _entry(self, plan: RevertPlan) -> JournalEntry:
        vm = self._seat.attached
        return JournalEntry(
            plan=plan,
            pid=vm.identity.pid if vm else 0,
            start_time_ticks=vm.identity.start_time_ticks if vm else 0,
        )

    async def _make_overlays(self, plan: RevertPlan, entry: JournalEntry) -> JournalEntry:
        made = [await make_overlay(o, qemu_img=self._qemu_img) for o in plan.overlays]
        entry = entry.model_copy(update={"made": tuple(made)})
        await trio.to_thread.run_sync(self._seat.store.journal.write, entry)
        await publish_overlays(plan.overlays)
        return entry

    def _forget(self, entry: JournalEntry) -> None:
        """Remove what was made before the point of no return. Blocks."""
        journal = self._seat.store.journal
        remove_files(journal.read() or entry)
        journal.clear()

    async def _switch(self, plan: RevertPlan, manifest: Manifest, request: RevertRequest) -> None:
        """End the old QEMU, start the new one, load, go on."""
        self._job.enter(Phase.STARTING)
        seat = self._seat
        if seat.attached is not None:
            await end_qemu(seat.attached)
            await seat.wait_detached()
            seat.tracker.on_exit(Condition.SHUTOFF_FROM_SNAPSHOT)
        seat.starting = Condition.PAUSED_FROM_SNAPSHOT
        try:
            log = seat.store.directory / ".qemu.log"
            process = manifest.machine.process
            started = await trio.to_thread.run_sync(
                start, process, plan.executable, plan.argv, plan.cwd, log
            )
            vm = await self._wait_started(started)
            try:
                with trio.fail_after(LOAD_LIMIT_S):
                    memory = Path(plan.memory_file)
                    await load_memory(vm, memory, plan.image_format, self._job)
            except (QsnapError, trio.TooSlowError):
                kill(vm.identity)  # it has not run: nothing is lost with it
                raise
            if (request.state or manifest.state) == "running":
                await vm.ensure_running(Condition.RUNNING_FROM_SNAPSHOT)
        except (QsnapError, trio.TooSlowError) as exc:
            raise VmError(
                f"VM {seat.name} is shut off: it was ended to revert to {plan.name}, and QEMU "
                f"could not be started from it: {exc}. The snapshot is unharmed; the new disks "
                f"are {_paths(plan)}",
                effect=Effect.PARTIAL,
            ) from exc
        finally:
            seat.starting = None

    async def _wait_started(self, started: Started) -> AttachedVm:
        """Wait until the supervisor has attached to the new QEMU."""
        with trio.fail_after(START_LIMIT_S):
            while True:
                with trio.move_on_after(LOOK_EVERY_S):
                    return await self._seat.wait_attached()
                if words := started.failed():
                    raise VmError(f"QEMU says: {words}")


def _paths(plan: RevertPlan) -> str:
    return ", ".join(overlay.path for overlay in plan.overlays) or "none"


async def end_qemu(vm: AttachedVm) -> None:
    """Make a QEMU end, its disks flushed if it still answers."""
    with suppress(SessionLost, CommandRefused):  # it may end before it answers
        await vm.session.execute(Quit())
    await wait_ended(vm.identity)


def plan_revert(manifest: Manifest, memory: MemoryImage, *, end_running: bool) -> RevertPlan:
    """Name the new overlays and compute the command line; reads file identities only.

    Raises: Blocked, WrongState: the recorded command line cannot be used again, and why.
    """
    token = secrets.token_hex(4)
    overlays = tuple(_overlay(disk, manifest.name, token) for disk in manifest.disks)
    launch = plan_launch(
        manifest.machine.process,
        manifest.machine,
        [
            MovedDisk(target=disk.target, chain=disk.chain, overlay=overlay.path)
            for disk, overlay in zip(manifest.disks, overlays, strict=True)
        ],
        identify=key_of,
    )
    return RevertPlan(
        token=token,
        vm=manifest.vm,
        name=manifest.name,
        requested_at=datetime.now(UTC),
        end_running=end_running,
        executable=launch.executable,
        argv=launch.argv,
        cwd=launch.cwd,
        memory_file=memory.path,
        image_format=manifest.image_format,
        overlays=overlays,
    )


def _overlay(disk: DiskLayer, snapshot: str, token: str) -> OverlayPlan:
    frozen = Path(disk.frozen)
    oldest = Path(disk.chain[-1].path).name if disk.chain else frozen.name
    stem = oldest.rsplit(".", 1)[0] if "." in oldest.lstrip(".") else oldest
    path = frozen.with_name(f"{stem}.after-{snapshot}.{token}.qcow2")
    return OverlayPlan(
        target=disk.target,
        path=str(path),
        partial=str(path.with_name(f"{path.name}.partial")),
        backing=disk.frozen,
        backing_format=disk.frozen_format,
        virtual_size_bytes=disk.virtual_size_bytes,
    )


def check_snapshot(manifest: Manifest) -> None:
    """Refuse a snapshot that would not restore, before anything is touched. Blocks.

    Raises: WrongState: it holds no memory. ImageInvalid: a file is missing, was replaced or
      is damaged.
    """
    if manifest.memory is None:
        raise WrongState(f"snapshot {manifest.name} holds no memory: it cannot be reverted to yet")
    for disk in manifest.disks:
        for file in disk.chain:
            if key_of(file.path) != (file.device, file.inode):
                raise ImageInvalid(
                    f"disk {disk.target}: {file.path} is missing or is another file than when "
                    f"snapshot {manifest.name} was taken"
                )
    with ExitStack() as descriptors:
        try:
            descriptor = os.open(manifest.memory.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise ImageInvalid(
                f"the memory image {manifest.memory.path} cannot be opened: {exc.strerror}"
            ) from exc
        descriptors.callback(os.close, descriptor)
        size_bytes = os.fstat(descriptor).st_size
        if size_bytes != manifest.memory.size_bytes:
            raise ImageInvalid(
                f"the memory image {manifest.memory.path} has {size_bytes} bytes, it was saved "
                f"with {manifest.memory.size_bytes}"
            )
        if manifest.image_format is ImageFormat.MAPPED_RAM:
            repeated = manifest.strategy is Strategy.PRECOPY
            writes = mapped_ram.Writes.REPEATED if repeated else mapped_ram.Writes.ONCE
            mapped_ram.verify(descriptor, manifest.machine.ram_blocks, writes)
        else:
            stream.verify(descriptor, manifest.machine.ram_blocks)
