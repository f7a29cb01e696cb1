"""Changes of what is kept of snapshots: names, descriptions, places in the tree."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial

import trio

from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import DiskStalled, QsnapError, SnapshotExists, WrongState
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobKind
from qsnapd.model.parsing import parse_manifest
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.moving.redefine import Present, redefine
from qsnapd.store.renaming import copy_snapshot, finish_renaming, rename_snapshot
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import SLOW, in_thread
from qsnapd.vm.disks import read_disks

MEND_LIMIT_S = 60.0


class Editing:
    """For all VMs of a daemon."""

    def __init__(self, fleet: Fleet, events: EventHub) -> None:
        self._fleet = fleet
        self._events = events

    async def redefine(self, name: str, text: str, *, current: bool) -> str:
        """See `Host.redefine`."""
        manifest = parse_manifest(text, "the manifest that was sent")
        supervisor = self._fleet.find(name)
        async with _prepared(supervisor, manifest.name):
            work = partial(
                redefine,
                *(supervisor.store, manifest, await present_of(supervisor)),
                check=trio.from_thread.check_cancelled,
            )
            await trio.to_thread.run_sync(work, limiter=SLOW)
            if current:
                await _finishing(partial(supervisor.store.set_current, manifest.name))
        self._tell(name, manifest.name, "defined again")
        return manifest.name

    async def rename(self, name: str, snapshot: str, new_name: str) -> None:
        """See `Host.rename_snapshot`."""
        supervisor = self._fleet.find(name)
        _require_another(snapshot, new_name)
        async with _prepared(supervisor, snapshot):
            what = f"snapshot {snapshot} is being renamed"
            # first of all: who makes a clone reads it, and is registered before that ends
            with supervisor.store.leases.changing([snapshot], what):
                await self._require_no_clones(name, snapshot)
                await _require_no_start(supervisor, snapshot)
                await _finishing(partial(rename_snapshot, supervisor.store, snapshot, new_name))
        self._tell(name, new_name, f"renamed from {snapshot}")

    async def copy(self, name: str, snapshot: str, new_name: str) -> None:
        """See `Host.copy_snapshot`."""
        supervisor = self._fleet.find(name)
        _require_another(snapshot, new_name)
        async with _prepared(supervisor, snapshot):
            with supervisor.store.leases.reading(snapshot, "a copy"):
                await _finishing(partial(copy_snapshot, supervisor.store, snapshot, new_name))
        self._tell(name, new_name, f"copied from {snapshot}")

    async def set_current(self, name: str, snapshot: str) -> None:
        """See `Host.set_current`."""
        supervisor = self._fleet.find(name)
        async with _prepared(supervisor, snapshot):
            await in_thread(supervisor.store.manifest, snapshot)  # refuses an unknown one
            await _finishing(partial(supervisor.store.set_current, snapshot))
        self._tell(name, snapshot, "set as current")

    async def _require_no_clones(self, name: str, snapshot: str) -> None:
        clones = await in_thread(self._fleet.clones_from, name, snapshot)
        if clones:
            raise WrongState(
                f"snapshot {snapshot} of VM {name} cannot be renamed: clones were made of it "
                f"({', '.join(clones)}), and are started again from what is called so; "
                "snapshot-edit --clone gives it a second name"
            )

    def _tell(self, vm: str, snapshot: str, detail: str) -> None:
        self._events.publish(
            Event(
                kind=EventKind.SNAPSHOT,
                vm=vm,
                at=datetime.now(UTC),
                event="redefined",
                snapshot=snapshot,
                detail=detail,
            )
        )


@asynccontextmanager
async def claimed(
    supervisor: Supervisor, kind: JobKind, snapshot: str | None = None
) -> AsyncIterator[None]:
    """Keep jobs from changing the VM meanwhile. Raises: VmBusy: one does."""
    job = Job(0, supervisor.name, kind, snapshot, lambda job: None)
    supervisor.claim(job)
    before = supervisor.attached
    try:
        yield
    except DiskStalled as exc:
        supervisor.mender.leave_alone(exc)
        raise
    finally:
        supervisor.job = None  # not worth being anybody's last one
        supervisor.thawer.look()
        with trio.move_on_after(MEND_LIMIT_S, shield=True), suppress(QsnapError):
            await supervisor.wait_entered()
            vm = supervisor.attached
            if vm not in (None, before):  # who attaches while a job runs is not looked after
                await supervisor.look_after(vm)


@asynccontextmanager
async def _prepared(supervisor: Supervisor, snapshot: str) -> AsyncIterator[None]:
    """The same, once what jobs have left unfinished is ended.

    Raises: VmBusy. WrongState: it cannot be ended yet. What ending it raises.
    """
    async with claimed(supervisor, JobKind.EDIT, snapshot):
        await supervisor.mender.mend_before_job()
        await in_thread(_require_nothing_unfinished, supervisor.store)
        await _finishing(partial(finish_renaming, supervisor.store))
        yield


def _require_nothing_unfinished(store: VmStore) -> None:
    """Raise WrongState while a journal tells of a job: it may name any snapshot. Blocks."""
    entries = [journal.read() for journal in (store.journal, store.restoring)]
    names = [entry.plan.name for entry in entries if entry is not None]
    if (deletion := store.deletion.read()) is not None:
        names.append(deletion.name)
    if names:
        raise WrongState(
            f"VM {store.vm} has an unfinished job on snapshot {names[0]}, which is finished or "
            "undone as soon as its QEMU answers: wait for that"
        )


async def _finishing(work: Callable[[], object]) -> None:
    """Do it in a thread, whether or not who asked for it has left."""
    with trio.CancelScope(shield=True):
        await in_thread(work)


async def present_of(supervisor: Supervisor) -> Present:
    """What is true of the VM now, as QEMU tells it. Raises: VmError."""
    vm = supervisor.attached
    if vm is None:
        return Present()
    disks = await read_disks(vm.session, vm.identity.pid)
    active = {
        (disk.chain[0].device, disk.chain[0].inode): disk.target
        for disk in disks
        if disk.chain and disk.left_out is None
    }
    return Present(uuid=vm.uuid, active=active)


async def _require_no_start(supervisor: Supervisor, snapshot: str) -> None:
    entry = await in_thread(supervisor.store.next_start.read)
    if entry is not None and entry.plan.name == snapshot:
        raise WrongState(
            f"VM {supervisor.name} is started from snapshot {snapshot} next: start it first"
        )


def _require_another(name: str, new_name: str) -> None:
    if name == new_name:
        raise SnapshotExists(f"snapshot {name} is called so already")
