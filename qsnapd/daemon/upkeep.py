"""What keeps a VM's part of the store in order: examining it, and taking snapshots in again."""

import os
from collections.abc import Sequence, Set
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from qsnapd.daemon.editing import claimed, present_of
from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import QsnapError, SnapshotExists, VmError
from qsnapd.model.event import Event, EventKind
from qsnapd.model.findings import StoreCheck
from qsnapd.model.job import JobKind
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import Export, ImportRequest, Scanned, ScanOutcome, ScanResult
from qsnapd.snapshot.checking.facts import Around, gather
from qsnapd.snapshot.checking.fsck import Examination
from qsnapd.snapshot.checking.graph import goes_on_from
from qsnapd.snapshot.checking.live import look_live
from qsnapd.snapshot.moving.adopt import Adopted
from qsnapd.snapshot.moving.imported import import_snapshot, notes
from qsnapd.snapshot.moving.meter import Meter, Tell
from qsnapd.snapshot.moving.redefine import require_unwritten
from qsnapd.snapshot.moving.scan import Found, current_in, look_through, open_memory
from qsnapd.snapshot.moving.take_in import bring_children_back, forget_lost_parents, take_in
from qsnapd.threads import SLOW


class Upkeep:
    """For all VMs of a daemon."""

    def __init__(self, fleet: Fleet, events: EventHub) -> None:
        self._fleet = fleet
        self._events = events

    async def fsck(self, name: str, *, repair: bool) -> StoreCheck:
        """See `Host.fsck`."""
        supervisor = self._fleet.find(name)
        others = await trio.to_thread.run_sync(self._fleet.other_stores, name)
        examination = Examination(
            supervisor.store,
            vm=supervisor.attached,
            others=others,
            before_s=supervisor.made_at_s,
            job=lambda: (supervisor.job, supervisor.last_job),
        )
        if not repair:
            return await examination.check(is_busy=supervisor.job is not None)
        async with claimed(supervisor, JobKind.REPAIR):
            return await examination.check(is_busy=False, repairs=True)

    async def take_in_metadata(
        self, name: str, text: str, new_name: str | None, tell: Tell
    ) -> tuple[str, tuple[str, ...]]:
        """See `Host.take_in_metadata`."""
        supervisor = self._fleet.find(name)
        manifest = parse_manifest(text, "the manifest that was sent")
        async with claimed(supervisor, JobKind.REPAIR):
            adopted = await _take_in(supervisor, manifest, tell, name=new_name)
            taken = {adopted.manifest.name}
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(bring_children_back, supervisor.store, taken)
                await self._find_current(supervisor, taken)
        self._tell_imported(name, adopted.manifest.name)
        host_notes = await trio.to_thread.run_sync(notes, adopted.manifest, supervisor.qmp)
        return adopted.manifest.name, (*adopted.notes, *host_notes)

    async def scan(self, name: str, directory: str, tell: Tell) -> ScanResult:
        """See `Host.scan`."""
        supervisor = self._fleet.find(name)
        async with claimed(supervisor, JobKind.REPAIR):
            found = await trio.to_thread.run_sync(look_through, Path(directory))
            names = frozenset(each.manifest.name for each in found if each.manifest)
            take = partial(self._take_in_found, supervisor, tell=tell, parents=names)
            scanned = [await take(each) for each in found]
            taken = {s.name for s in scanned if s.name and s.outcome is ScanOutcome.IMPORTED}
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(forget_lost_parents, supervisor.store, taken)
                await trio.to_thread.run_sync(bring_children_back, supervisor.store, taken)
                folders = [each.folder.parent for each in found]
                current = await self._find_current(supervisor, taken, folders)
        return ScanResult(found=tuple(scanned), current=current)

    async def _take_in_found(
        self, supervisor: Supervisor, found: Found, *, tell: Tell, parents: frozenset[str]
    ) -> Scanned:
        manifest, store = found.manifest, supervisor.store
        told = partial(Scanned, path=str(found.path), name=manifest.name if manifest else None)
        if manifest is None:
            return told(outcome=ScanOutcome.REFUSED, detail=str(found.what))
        if manifest.vm != store.vm:
            words = f"it is one of VM {manifest.vm}"
            return told(outcome=ScanOutcome.REFUSED, detail=words)
        before = (await trio.to_thread.run_sync(store.snapshots)).get(manifest.name)
        if before is not None:
            same = before.created_at == manifest.created_at
            words = "" if same else "another snapshot has this name"
            outcome = ScanOutcome.PRESENT if same else ScanOutcome.REFUSED
            return told(outcome=outcome, detail=words)
        try:
            if isinstance(found.what, Export):
                taken: tuple[str, ...] = ("it was an export: its data was copied",)
                request = ImportRequest(directory=str(found.folder))
                await import_snapshot(store, request, descriptor=None, tell=tell)
            else:
                taken = (await _take_in_place(supervisor, found, manifest, tell, parents)).notes
        except SnapshotExists as exc:
            return told(outcome=ScanOutcome.PRESENT, detail=str(exc))
        except QsnapError as exc:
            return told(outcome=ScanOutcome.REFUSED, detail=str(exc))
        self._tell_imported(store.vm, manifest.name)
        return told(outcome=ScanOutcome.IMPORTED, notes=taken)

    async def _find_current(
        self, supervisor: Supervisor, taken: Set[str], folders: Sequence[Path] = ()
    ) -> str | None:
        """Make one of those that were taken in the current one, if the VM goes on from it.

        If it does not run, and there is none, its former *folders* say which it was.
        """
        store = supervisor.store
        current = await trio.to_thread.run_sync(store.current)
        name: str | None = None
        if supervisor.attached is not None:
            name = await self._goes_on_from(supervisor)
        elif current is None:
            for folder in dict.fromkeys(folders):
                name = name or await trio.to_thread.run_sync(current_in, folder)
        if name not in taken or name == current:
            return None
        await trio.to_thread.run_sync(store.set_current, name)
        return name

    async def _goes_on_from(self, supervisor: Supervisor) -> str | None:
        vm = supervisor.require_attached()
        with suppress(VmError):
            live = await look_live(vm.session, vm.identity.pid)
            look = partial(
                gather,
                *(supervisor.store,),
                before_s=supervisor.made_at_s,
                around=Around(),
                live=live,
                is_busy=True,
            )
            return goes_on_from(await trio.to_thread.run_sync(look))
        return None

    def _tell_imported(self, vm: str, snapshot: str) -> None:
        at, kind = datetime.now(UTC), EventKind.SNAPSHOT
        self._events.publish(
            Event(kind=kind, vm=vm, at=at, event="imported", snapshot=snapshot)
        )


async def _take_in_place(
    supervisor: Supervisor, found: Found, manifest: Manifest, tell: Tell, parents: frozenset[str]
) -> Adopted:
    """Take in a manifest of a store, with the memory image beside it."""
    memory_fd = await trio.to_thread.run_sync(open_memory, found)
    try:
        adopted = await _take_in(
            supervisor, manifest, tell, memory_fd=memory_fd, parents=parents
        )
    finally:
        if memory_fd is not None:
            os.close(memory_fd)
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(supervisor.store.drop_forgotten, found.folder)
    return adopted


async def _take_in(
    supervisor: Supervisor,
    manifest: Manifest,
    tell: Tell,
    *,
    name: str | None = None,
    memory_fd: int | None = None,
    parents: frozenset[str] = frozenset(),
) -> Adopted:
    store, present = supervisor.store, await present_of(supervisor)
    meter = Meter(tell)
    meter.begin(f"checking {name or manifest.name}", 0)

    def work() -> Adopted:
        require_unwritten(manifest, store, store.snapshots(), present)
        return take_in(
            *(store, manifest),
            name=name,
            memory_fd=memory_fd,
            parents=parents,
            check=trio.from_thread.check_cancelled,
        )

    return await trio.to_thread.run_sync(work, limiter=SLOW)
