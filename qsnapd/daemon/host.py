"""All the VMs of one daemon: finds the one that is meant, and starts jobs on it.

Implements `control.host.Host`; decides nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from qsnapd.daemon import agents
from qsnapd.daemon.editing import Editing
from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.jobs import Jobs
from qsnapd.daemon.looks import Looks, look_past_store
from qsnapd.daemon.upkeep import Upkeep
from qsnapd.errors import WrongState
from qsnapd.model.event import Event, EventKind
from qsnapd.model.findings import StoreCheck
from qsnapd.model.freeze import Filesystem
from qsnapd.model.job import JobInfo, JobKind
from qsnapd.model.launch import LaunchInfo
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    DeleteRequest,
    PruneRequest,
    RevertRequest,
)
from qsnapd.model.retention import Pruned
from qsnapd.model.snapshot import Manifest
from qsnapd.model.state import State
from qsnapd.model.transfer import Export, ExportRequest, ImportRequest, ScanResult
from qsnapd.model.verification import Verification
from qsnapd.model.vm import DiskInfo, VmInfo
from qsnapd.snapshot.deleting.deletions import Deletions
from qsnapd.snapshot.deleting.pruning import Pruning, foresee
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.moving.export import export_snapshot
from qsnapd.snapshot.moving.imported import import_snapshot, notes
from qsnapd.snapshot.moving.meter import Tell
from qsnapd.snapshot.restoring.boot import boot
from qsnapd.snapshot.restoring.clone import Clone
from qsnapd.snapshot.restoring.clone_boot import boot_clone
from qsnapd.snapshot.restoring.clone_plan import plan_clone
from qsnapd.snapshot.restoring.preflight import preflight
from qsnapd.snapshot.restoring.rehearsal import only_one
from qsnapd.snapshot.restoring.revert import Revert, eager_note
from qsnapd.snapshot.restoring.revert_plan import describe_launch
from qsnapd.snapshot.restoring.switch import DETACH_LIMIT_S
from qsnapd.snapshot.restoring.verify import verify_snapshot
from qsnapd.snapshot.taking.create import Checkpoint
from qsnapd.threads import in_thread
from qsnapd.vm.disks import read_disks
from qsnapd.vm.launch import Parent
from qsnapd.vm.process import still_runs

_ASKERS_OWN = (JobKind.EDIT, JobKind.REPAIR)
"""Jobs that are part of a client's call."""


class LocalHost:
    """The daemon's VMs, by name. Jobs run in *jobs*, so that no client's leaving ends them."""

    def __init__(
        self,
        fleet: Fleet,
        events: EventHub,
        jobs: trio.Nursery,
        *,
        qemu_img: str,
    ) -> None:
        self._fleet = fleet
        self._events = events
        self._jobs = Jobs(events, jobs)
        self._qemu_img = qemu_img
        self._rehearsals = set[str]()
        self._looks = Looks(fleet)
        self._editing = Editing(fleet, events)
        self._upkeep = Upkeep(fleet, events)

    async def look_at_all(self) -> tuple[VmInfo, ...]:
        return await self._looks.look_at_all()

    async def look(self, name: str) -> VmInfo:
        return await self._looks.look(name)

    def vm(self, name: str) -> VmInfo:
        """The same without its snapshots: no file is read."""
        return look_past_store(self._fleet.find(name))

    def name_of(self, word: str) -> str:
        return self._fleet.find(word).name

    async def disks(self, name: str) -> tuple[DiskInfo, ...]:
        vm = self._fleet.find(name).require_attached()
        disks = await read_disks(vm.session, vm.identity.pid)
        return await in_thread(lambda: tuple(disk.info() for disk in disks))

    async def suspend(self, name: str) -> None:
        supervisor = self._fleet.find(name)
        vm = supervisor.require_attached()
        if supervisor.tracker.condition.state not in (State.RUNNING, State.PAUSED):
            raise WrongState(
                f"VM {name} is {supervisor.tracker.condition.text}: it cannot be paused"
            )
        supervisor.require_not_reverting()
        await vm.suspend()

    async def resume(self, name: str) -> None:
        supervisor = self._fleet.find(name)
        vm = supervisor.require_attached()
        if supervisor.tracker.condition.state in (State.SHUTDOWN, State.CRASHED):
            raise WrongState(
                f"VM {name} is {supervisor.tracker.condition.text}: it cannot be resumed"
            )
        supervisor.require_not_reverting()
        await vm.resume()
        if supervisor.job is not None:  # it may be what the job waits for
            supervisor.job.tell()

    async def freeze_filesystems(self, name: str, mountpoints: Sequence[str]) -> int:
        return await agents.freeze_filesystems(self._fleet.find(name), mountpoints)

    async def thaw_filesystems(self, name: str) -> int:
        return await agents.thaw_filesystems(self._fleet.find(name))

    async def filesystems(self, name: str) -> tuple[Filesystem, ...]:
        return await agents.filesystems(self._fleet.find(name))

    async def create(self, name: str, request: CreateRequest) -> Job:
        supervisor = self._fleet.find(name)
        vm = supervisor.require_attached()
        job = self._jobs.new(supervisor, JobKind.CREATE, request.name)
        supervisor.claim(job)
        checkpoint = Checkpoint(
            *(vm, supervisor.store, job),
            qemu_img=self._qemu_img,
            provisions=supervisor.provisions,
            launcher=supervisor.launcher,
            room=supervisor.room,
            saves=supervisor.saves,
        )

        async def take() -> Manifest:
            manifest = await checkpoint.take(request)
            if request.halt and not still_runs(vm.identity.pid, vm.identity.start_time_ticks):
                with trio.move_on_after(DETACH_LIMIT_S, shield=True):
                    await supervisor.wait_detached()
            return manifest

        self._jobs.start(supervisor, job, take)
        return job

    async def revert(self, name: str, request: RevertRequest) -> Job:
        supervisor = self._fleet.find(name)
        await in_thread(supervisor.store.manifest, request.name)  # refuses an unknown one
        job = self._jobs.new(supervisor, JobKind.REVERT, request.name)
        supervisor.claim(job)
        revert = Revert(supervisor, job, qemu_img=self._qemu_img)
        self._jobs.start(supervisor, job, lambda: revert.run(request))
        return job

    async def delete(self, name: str, request: DeleteRequest) -> Job:
        supervisor = self._fleet.find(name)
        await in_thread(supervisor.store.manifest, request.name)  # refuses an unknown one
        job = self._jobs.new(supervisor, JobKind.DELETE, request.name)
        supervisor.claim(job)
        deletions = Deletions(
            *(supervisor, job, supervisor.others),
            qemu_img=self._qemu_img,
            tell=partial(self._publish_snapshot, supervisor.name, "deleted"),
        )
        self._jobs.start(supervisor, job, lambda: deletions.run(request))
        return job

    async def prune(self, name: str, request: PruneRequest) -> Pruning:
        supervisor = self._fleet.find(name)
        job = self._jobs.new(supervisor, JobKind.DELETE, None)
        supervisor.claim(job)
        pruning = Pruning(
            *(supervisor, job, supervisor.others),
            qemu_img=self._qemu_img,
            tell=partial(self._publish_snapshot, supervisor.name, "deleted"),
        )
        self._jobs.start(supervisor, job, lambda: pruning.run(request))
        return pruning

    async def foresee_prune(self, name: str, request: PruneRequest) -> Pruned:
        supervisor = self._fleet.find(name)
        return await in_thread(foresee, supervisor.store, supervisor.others, request)

    async def clone(self, name: str, request: CloneRequest) -> Job:
        source = self._fleet.find(name)
        manifest = await in_thread(source.store.manifest, request.name)
        with ExitStack() as reading, self._fleet.reserved(request.clone):
            reader = f"clone {request.clone}, which is being made,"
            reading.enter_context(source.store.leases.reading(request.name, reader))
            found = await preflight(
                manifest,
                qemu_img=self._qemu_img,
                force=request.force,
                others=(await in_thread(source.store.snapshots)).values(),
            )
            directory = self._fleet.directory(request.clone)
            plan = await in_thread(
                partial(
                    plan_clone,
                    *(manifest, request, Parent(instead=source.parent.instead)),
                    source=name,
                    qmp_from=source.qmp,
                    directory=directory,
                    loads_lazily=found.loads_lazily,
                )
            )
            self._fleet.require_own_monitor(request.clone, Path(plan.qmp))
            supervisor = self._fleet.add_clone(name, request.clone, Path(plan.qmp))
            needed = reading.pop_all()
        job = self._jobs.new(supervisor, JobKind.CLONE, request.name)
        differences = map(str, found.differences)
        job.notes = (*plan.notes, *differences, *found.notes, *eager_note(plan))
        supervisor.claim(job)
        clone = Clone(supervisor, job, source.store, qemu_img=self._qemu_img)

        async def make() -> Manifest:
            try:
                with needed:
                    return await clone.run(plan, reads_ahead=request.read_ahead)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._fleet.drop_unless_registered(
                        request.clone, is_undone=clone.is_undone
                    )
                raise

        self._jobs.start(supervisor, job, make)
        return job

    async def undefine(self, name: str, *, remove_storage: bool) -> tuple[str, ...]:
        return await self._fleet.undefine(name, remove_storage=remove_storage)

    async def start(self, name: str) -> Job:
        supervisor = self._fleet.find(name)
        clone = await in_thread(self._fleet.registration, name)
        planned = await in_thread(supervisor.store.next_start.read)
        current = await in_thread(supervisor.store.current)
        job = self._jobs.new(supervisor, JobKind.START, current)
        if clone is None or planned is not None:
            supervisor.claim(job)
            self._jobs.start(supervisor, job, lambda: boot(supervisor, job))
            return job
        source = self._fleet.store_of_source(clone)
        manifest = await in_thread(source.manifest, clone.snapshot)
        supervisor.claim(job)

        async def boot_again() -> Manifest:
            await boot_clone(supervisor, job, clone, source)
            return manifest

        self._jobs.start(supervisor, job, boot_again)
        return job

    async def launch(self, name: str, request: RevertRequest) -> LaunchInfo:
        supervisor = self._fleet.find(name)
        manifest = await in_thread(supervisor.store.manifest, request.name)
        return await in_thread(
            describe_launch, manifest, request, supervisor.parent
        )

    async def export(
        self, name: str, request: ExportRequest, descriptor: int | None, tell: Tell
    ) -> Export:
        store, qemu_img = self._fleet.find(name).store, self._qemu_img
        return await export_snapshot(
            store, request, qemu_img=qemu_img, descriptor=descriptor, tell=tell
        )

    async def take_in(
        self, name: str, request: ImportRequest, descriptor: int | None, tell: Tell
    ) -> tuple[str, tuple[str, ...]]:
        supervisor = self._fleet.find(name)
        manifest = await import_snapshot(
            supervisor.store, request, descriptor=descriptor, tell=tell
        )
        self._publish_snapshot(name, "imported", manifest.name)
        return manifest.name, await in_thread(notes, manifest, supervisor.qmp)

    async def take_in_metadata(
        self, name: str, text: str, new_name: str | None, tell: Tell
    ) -> tuple[str, tuple[str, ...]]:
        return await self._upkeep.take_in_metadata(name, text, new_name, tell)

    async def scan(self, name: str, directory: str, tell: Tell) -> ScanResult:
        return await self._upkeep.scan(name, directory, tell)

    async def fsck(self, name: str, *, repair: bool) -> StoreCheck:
        return await self._upkeep.fsck(name, repair=repair)

    async def verify(self, name: str, snapshot: str, *, deep: bool = False) -> Verification:
        store = self._fleet.find(name).store
        manifest = await in_thread(store.manifest, snapshot)
        reading = store.leases.reading(snapshot, "a verification")
        with reading, only_one(self._rehearsals, name) if deep else nullcontext():
            return await verify_snapshot(
                manifest, deep=deep, directory=store.directory, qemu_img=self._qemu_img
            )

    def _publish_snapshot(self, vm: str, event: str, snapshot: str) -> None:
        at, kind = datetime.now(UTC), EventKind.SNAPSHOT
        self._events.publish(Event(kind=kind, vm=vm, at=at, event=event, snapshot=snapshot))

    def job(self, name: str) -> JobInfo | None:
        job = self._fleet.find(name).job
        return job.info() if job else None

    def last_job(self, name: str) -> JobInfo | None:
        job = self._fleet.find(name).last_job
        return job.info() if job else None

    def abort(self, name: str) -> None:
        job = self._fleet.find(name).job
        if job is None:
            raise WrongState(f"no job is running on VM {name}")
        if job.kind in _ASKERS_OWN:
            raise WrongState(
                f"VM {name} is busy with a {job.kind} job: it ends soon, or with the command that "
                "asked for it (Ctrl-C)"
            )
        job.cancel()

    def snapshots(self, name: str) -> tuple[Manifest, ...]:
        return tuple(self._fleet.find(name).store.snapshots().values())

    def snapshot(self, name: str, snapshot: str) -> Manifest:
        return self._fleet.find(name).store.manifest(snapshot)

    def users(self, name: str) -> dict[str, tuple[str, ...]]:
        users: dict[str, tuple[str, ...]] = {}
        for lease in self._fleet.find(name).store.leases.all():
            users[lease.snapshot] = (*users.get(lease.snapshot, ()), lease.holder)
        return users

    def current(self, name: str) -> str | None:
        return self._fleet.find(name).store.current()

    async def redefine(self, name: str, text: str, *, current: bool) -> str:
        return await self._editing.redefine(name, text, current=current)

    async def rename_snapshot(self, name: str, snapshot: str, new_name: str) -> None:
        await self._editing.rename(name, snapshot, new_name)

    async def copy_snapshot(self, name: str, snapshot: str, new_name: str) -> None:
        await self._editing.copy(name, snapshot, new_name)

    async def set_current(self, name: str, snapshot: str) -> None:
        await self._editing.set_current(name, snapshot)

    def subscribe(self) -> AbstractContextManager[trio.MemoryReceiveChannel[Event]]:
        return self._events.subscribe()
