"""All the VMs of one daemon: finds the one that is meant, and starts jobs on it.

Implements `control.host.Host`; decides nothing.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import trio

from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import Effect, WrongState
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobInfo, JobKind, Phase
from qsnapd.model.launch import LaunchInfo
from qsnapd.model.request import CloneRequest, CreateRequest, RevertRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.state import State
from qsnapd.model.transfer import Export, ExportRequest, ImportRequest
from qsnapd.model.verification import Verification
from qsnapd.model.vm import DiskInfo, VmInfo
from qsnapd.snapshot.boot import boot
from qsnapd.snapshot.clone import Clone
from qsnapd.snapshot.clone_boot import boot_clone
from qsnapd.snapshot.clone_plan import plan_clone
from qsnapd.snapshot.create import Checkpoint
from qsnapd.snapshot.export import export_snapshot
from qsnapd.snapshot.imported import import_snapshot, notes
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.meter import Tell
from qsnapd.snapshot.preflight import preflight
from qsnapd.snapshot.rehearsal import only_one
from qsnapd.snapshot.revert import Revert, eager_note
from qsnapd.snapshot.revert_plan import describe_launch
from qsnapd.snapshot.verify import verify_snapshot
from qsnapd.vm.disks import read_disks
from qsnapd.vm.launch import Parent

_SNAPSHOT_EVENTS = {
    (JobKind.CREATE, Phase.DONE): "created",
    (JobKind.REVERT, Phase.DONE): "reverted",
    (JobKind.CLONE, Phase.DONE): "cloned",
}


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
        self._jobs = jobs
        self._qemu_img = qemu_img
        self._numbers = count(1)
        self._rehearsals = set[str]()

    def vms(self) -> tuple[VmInfo, ...]:
        return tuple(self.vm(name) for name in sorted(self._fleet))

    def vm(self, name: str) -> VmInfo:
        supervisor = self._fleet.find(name)
        condition = supervisor.tracker.condition
        vm = supervisor.attached
        return VmInfo(
            name=name,
            state=condition.state.text,
            state_number=condition.state,
            reason=condition.reason_text,
            reason_number=condition.reason_number,
            connected=vm is not None,
            problem=supervisor.problem,
            qmp=str(supervisor.qmp),
            pid=vm.identity.pid if vm else None,
            uuid=vm.uuid if vm else None,
            qemu_version=vm.version.text if vm else None,
            machine=vm.machine_type if vm else None,
            ram_bytes=vm.ram_bytes if vm else None,
            vcpus=vm.vcpus if vm else None,
            snapshots=len(supervisor.store.snapshots()),
            current_snapshot=supervisor.store.current(),
        )

    async def disks(self, name: str) -> tuple[DiskInfo, ...]:
        vm = self._fleet.find(name).require_attached()
        return tuple(disk.info() for disk in await read_disks(vm.session, vm.identity.pid))

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

    async def create(self, name: str, request: CreateRequest) -> Job:
        supervisor = self._fleet.find(name)
        vm = supervisor.require_attached()
        job = self._new_job(name, JobKind.CREATE, request.name)
        supervisor.claim(job)
        checkpoint = Checkpoint(vm, supervisor.store, job, qemu_img=self._qemu_img)
        self._start(supervisor, job, lambda: checkpoint.take(request))
        return job

    async def revert(self, name: str, request: RevertRequest) -> Job:
        supervisor = self._fleet.find(name)
        supervisor.store.manifest(request.name)  # refuses an unknown one at once
        job = self._new_job(name, JobKind.REVERT, request.name)
        supervisor.claim(job)
        revert = Revert(supervisor, job, qemu_img=self._qemu_img)
        self._start(supervisor, job, lambda: revert.run(request))
        return job

    async def clone(self, name: str, request: CloneRequest) -> Job:
        source = self._fleet.find(name)
        manifest = source.store.manifest(request.name)
        with self._fleet.reserved(request.clone):
            found = await preflight(manifest, qemu_img=self._qemu_img, force=request.force)
            directory = self._fleet.directory(request.clone)
            plan = await trio.to_thread.run_sync(
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
        job = self._new_job(request.clone, JobKind.CLONE, request.name)
        differences = map(str, found.differences)
        job.notes = (*plan.notes, *differences, *found.notes, *eager_note(plan))
        supervisor.claim(job)
        clone = Clone(supervisor, job, source.store, qemu_img=self._qemu_img)

        async def make() -> Manifest:
            try:
                return await clone.run(plan, reads_ahead=request.read_ahead)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._fleet.drop_unless_registered(
                        request.clone, is_undone=clone.is_undone
                    )
                raise

        self._start(supervisor, job, make)
        return job

    async def undefine(self, name: str, *, remove_storage: bool) -> tuple[str, ...]:
        return await self._fleet.undefine(name, remove_storage=remove_storage)

    async def start(self, name: str) -> Job:
        supervisor = self._fleet.find(name)
        clone = await trio.to_thread.run_sync(self._fleet.registration, name)
        planned = await trio.to_thread.run_sync(supervisor.store.next_start.read)
        job = self._new_job(name, JobKind.START, supervisor.store.current())
        if clone is None or planned is not None:
            supervisor.claim(job)
            self._start(supervisor, job, lambda: boot(supervisor, job))
            return job
        source = self._fleet.store_of_source(clone)
        manifest = source.manifest(clone.snapshot)
        supervisor.claim(job)

        async def boot_again() -> Manifest:
            await boot_clone(supervisor, job, clone, source)
            return manifest

        self._start(supervisor, job, boot_again)
        return job

    async def launch(self, name: str, request: RevertRequest) -> LaunchInfo:
        supervisor = self._fleet.find(name)
        manifest = supervisor.store.manifest(request.name)
        return await trio.to_thread.run_sync(
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
        self._events.publish(
            Event(
                kind=EventKind.SNAPSHOT,
                vm=name,
                at=datetime.now(UTC),
                event="imported",
                snapshot=manifest.name,
            )
        )
        return manifest.name, await trio.to_thread.run_sync(notes, manifest, supervisor.qmp)

    async def verify(self, name: str, snapshot: str, *, deep: bool = False) -> Verification:
        store = self._fleet.find(name).store
        manifest = store.manifest(snapshot)
        with only_one(self._rehearsals, name) if deep else nullcontext():
            return await verify_snapshot(
                manifest, deep=deep, directory=store.directory, qemu_img=self._qemu_img
            )

    def _new_job(self, vm: str, kind: JobKind, snapshot: str | None) -> Job:
        return Job(next(self._numbers), vm, kind, snapshot, self._publish_job)

    def _start(
        self, supervisor: Supervisor, job: Job, work: Callable[[], Awaitable[Manifest]]
    ) -> None:
        async def mend_and_work() -> Manifest:
            await supervisor.mender.mend_before_job()
            manifest = await work()
            # Still within the job: who waits for its end may begin another one at once.
            with trio.CancelScope(shield=True):
                if supervisor.attached is not None:  # its disks may have moved
                    await supervisor.launcher.follow(supervisor.attached)
            return manifest

        async def run() -> None:
            try:
                await job.run(mend_and_work)
                if job.effect is Effect.UNKNOWN:  # undoing it has failed
                    await supervisor.mender.mend_after_job()
            finally:
                supervisor.let_go()

        self._jobs.start_soon(run, name=f"{job.kind} {job.vm}")

    def _publish_job(self, job: Job) -> None:
        publish = partial(
            Event, vm=job.vm, at=datetime.now(UTC), snapshot=job.snapshot, job=job.info()
        )
        self._events.publish(publish(kind=EventKind.JOB, event=job.phase.value))
        if job.phase.ended:
            event = _SNAPSHOT_EVENTS.get((job.kind, job.phase), "failed")
            detail = str(job.error) if job.error else ""
            self._events.publish(publish(kind=EventKind.SNAPSHOT, event=event, detail=detail))

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

    def subscribe(self) -> AbstractContextManager[trio.MemoryReceiveChannel[Event]]:
        return self._events.subscribe()
