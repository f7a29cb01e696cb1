"""All VMs that the daemon looks after: those of the configuration, and clones, which come and go.

A clone is in the fleet from the moment its making begins; it outlives the daemon once it is
registered in the store.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from qsnapd.daemon.limits import Limits
from qsnapd.daemon.supervisor import NOTHING, Supervisor
from qsnapd.errors import QsnapError, StoreError, TargetRefused, UnknownVm, VmExists, WrongState
from qsnapd.model.event import Event
from qsnapd.model.plan import ClonePlan
from qsnapd.model.registration import Registration
from qsnapd.snapshot.restoring.clone import undo_clone
from qsnapd.snapshot.restoring.revert_plan import require_no_qemu
from qsnapd.store.layout import Store
from qsnapd.store.registry import read_registration, remove_made
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.last_seen import Remembering
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.provisions import NO_PROVISIONS, Provisions

UNDO_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0

_log = logging.getLogger(__name__)

LauncherOf = Callable[[str, str], Launcher]
"""Returns what starts a clone: of the VM called this, called that."""


@dataclass
class _Watched:
    supervisor: Supervisor
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class Fleet(Mapping[str, Supervisor]):
    """Starts and stops supervisors, which run in *watching*."""

    def __init__(
        self,
        store: Store,
        publish: Callable[[Event], None],
        watching: trio.Nursery,
        *,
        qemu_img: str,
        clone_launcher: LauncherOf,
        limits: Limits | None = None,
    ) -> None:
        self._store = store
        self._publish = publish
        self._watching = watching
        self._qemu_img = qemu_img
        self._clone_launcher = clone_launcher
        self._limits = limits or Limits()
        self._watched: dict[str, _Watched] = {}
        self._configured: set[str] = set()
        self._reserved: set[str] = set()

    def __getitem__(self, name: str) -> Supervisor:
        return self._watched[name].supervisor

    def __iter__(self) -> Iterator[str]:
        return iter(self._watched)

    def __len__(self) -> int:
        return len(self._watched)

    def find(self, word: str) -> Supervisor:
        """The VM called *word*, else the one that runs with this UUID or process id.

        Raises: UnknownVm: there is none, or several have that UUID.
        """
        if word in self._watched:
            return self[word]
        found = [self[name] for name in sorted(self) if _answers_to(self[name].attached, word)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(supervisor.name for supervisor in found)
            raise UnknownVm(f"{word} is the UUID of several VMs: {names}; say which by its name")
        known = ", ".join(sorted(self)) or "none"
        raise UnknownVm(f"there is no VM {word!r} here; there are: {known}")

    def add(
        self,
        name: str,
        qmp: Path,
        launcher: Launcher,
        *,
        instead: Mapping[str, str] = NOTHING,
        provisions: Provisions = NO_PROVISIONS,
        configured: bool,
    ) -> Supervisor:
        """Look after a VM from now on. Raises: StoreError."""
        supervisor = Supervisor(
            *(name, qmp, self._store.vm(name), self._publish),
            qemu_img=self._qemu_img,
            launcher=launcher,
            instead=instead,
            provisions=provisions,
            others=partial(self.other_stores, name),
            limits=self._limits,
        )
        watched = _Watched(supervisor)
        self._watched[name] = watched
        if configured:
            self._configured.add(name)
        self._watching.start_soon(self._watch, watched, name=f"supervise {name}")
        return supervisor

    async def _watch(self, watched: _Watched) -> None:
        try:
            with watched.scope:
                await watched.supervisor.run()
        finally:
            watched.ended.set()

    async def stop(self, name: str) -> None:
        """Look after a VM no more; its QEMU, if there is one, is left alone."""
        watched = self._watched.pop(name)
        watched.scope.cancel()
        await watched.ended.wait()

    # --- clones --------------------------------------------------------------------------

    async def open_clones(self) -> None:
        """Look after the clones of former daemons; undo those that were not complete.

        To be called when all VMs of the configuration have been added. What
        cannot be read or undone is logged.
        """
        for name in await in_thread(self._store.names):
            try:
                with trio.fail_after(UNDO_LIMIT_S):
                    await self._open_clone(name)
            except (QsnapError, trio.TooSlowError) as exc:
                _log.error("clone %s: %s", name, exc or "undoing it took too long")

    async def _open_clone(self, name: str) -> None:
        store = self._store.vm(name)
        registration = await in_thread(read_registration, store)
        if name in self._configured:
            if registration is not None:
                _log.warning("VM %s is the configuration's; the clone of that name is not", name)
            return
        if registration is not None:
            self.add_clone(registration.source, name, Path(registration.qmp))
            return
        entry = await in_thread(store.restoring.read)
        if entry is not None and isinstance(entry.plan, ClonePlan):
            await undo_clone(entry, store)
            await in_thread(self._store.forget, name)
            _log.warning("undid the unfinished clone %s of a former daemon", name)

    def add_clone(self, source: str, name: str, qmp: Path) -> Supervisor:
        """Look after a clone from now on; it is started like what it was made of at first."""
        launcher = self._clone_launcher(self._origin(source), name)
        remembering = Remembering(launcher, self._store.vm(name))
        return self.add(name, qmp, remembering, configured=False)

    def _origin(self, name: str) -> str:
        """The VM of the configuration that *name* was made of at first, as far as that is known.

        From the store, because the clones in between may not be in the fleet yet.
        """
        seen = set[str]()
        while name not in self._configured | seen and self._store.is_used(name):
            seen.add(name)
            try:
                registration = read_registration(self._store.vm(name))
            except StoreError as exc:
                _log.warning("clone %s: not known what it was made of: %s", name, exc)
                break
            if registration is None:
                break
            name = registration.source
        return name

    def store_of_source(self, clone: Registration) -> VmStore:
        """Where the snapshot is that a clone was made of; its VM need not be in the fleet.

        Raises: UnknownVm: nothing is kept of that VM. StoreError.
        """
        if not self._store.is_used(clone.source):
            raise UnknownVm(
                f"nothing is kept of VM {clone.source}, which VM {clone.name} was made of: there "
                f"should be its snapshot {clone.snapshot}"
            )
        return self._store.vm(clone.source)

    def other_stores(self, name: str) -> list[VmStore]:
        """The parts of all VMs but *name*, in the fleet or not. Blocks. Raises: StoreError."""
        return [self._store.vm(other) for other in self._store.names() if other != name]

    def require_own_monitor(self, name: str, qmp: Path) -> None:
        """Raise TargetRefused if *qmp*, meant for the new VM *name*, is another's."""
        path = os.path.realpath(qmp)  # of a VM that is shut off nobody serves it
        for other, watched in self._watched.items():
            if os.path.realpath(watched.supervisor.qmp) == path:
                raise TargetRefused(
                    f"{qmp} is the monitor of VM {other}: choose another path for that of VM {name}"
                )

    def registration(self, name: str) -> Registration | None:
        """What is known of a clone; None of a VM of the configuration. Raises: StoreError."""
        return None if name in self._configured else read_registration(self.find(name).store)

    @contextmanager
    def reserved(self, name: str) -> Iterator[None]:
        """Keep others from making a VM called *name* while the block decides on it.

        Raises: VmExists: there is one, or something is kept of one. StoreError.
        """
        if name in self._watched or name in self._reserved:
            raise VmExists(f"there is a VM {name!r} already")
        if self._store.is_used(name):
            raise VmExists(
                f"there are files of a former VM {name!r} in {self._store.state_dir / name}: "
                "choose another name"
            )
        self._reserved.add(name)
        try:
            yield
        finally:
            self._reserved.discard(name)

    def directory(self, name: str) -> Path:
        """Where all of a VM is kept, or would be."""
        return self._store.state_dir / name

    async def drop_unless_registered(self, name: str, *, is_undone: bool) -> None:
        """Look no more after a clone whose making has failed; one that exists stays.

        Its journal is removed if all that it tells of *is_undone*; else the next start of the
        daemon undoes it. Raises: StoreError.
        """
        store = self[name].store
        if await in_thread(read_registration, store) is not None:
            return
        await self.stop(name)
        if is_undone:
            await in_thread(self._store.forget, name)

    def _clones_of(self, name: str) -> list[str]:
        stores = {other: self[other].store for other in self if other not in self._configured}
        found = {other: read_registration(store) for other, store in stores.items()}
        return sorted(other for other, clone in found.items() if clone and clone.source == name)

    def clones_from(self, name: str, snapshot: str) -> list[str]:
        """The clones that were made of this snapshot of VM *name*. Raises: StoreError."""
        found = {other: read_registration(self[other].store) for other in self._clones_of(name)}
        return [other for other, clone in found.items() if clone and clone.snapshot == snapshot]

    async def undefine(self, name: str, *, remove_storage: bool) -> tuple[str, ...]:
        """Forget a clone that is shut off; returns the files that were removed.

        On failure: it is in the fleet as before, and can be undefined again.
        Raises: WrongState: it is not a clone, it runs, is busy, or something needs it. StoreError.
        """
        supervisor = self.find(name)
        if name in self._configured:
            raise WrongState(
                f"VM {name} is no clone: it is in the configuration file, remove it from there"
            )
        if supervisor.job is not None:
            raise WrongState(f"VM {name} is busy: a {supervisor.job.kind} job is running on it")
        if supervisor.attached is not None:
            raise WrongState(
                f"VM {name} is {supervisor.tracker.condition.state.text}: shut it down first"
            )
        await in_thread(require_no_qemu, name, supervisor.qmp)
        kept = sorted({*supervisor.store.snapshots(), *supervisor.store.problems()})
        if kept:
            raise WrongState(
                f"VM {name} has snapshots ({', '.join(kept)}), whose files would belong to nobody"
            )
        begun = await in_thread(supervisor.store.partials)
        if begun:
            raise WrongState(
                f"VM {name} is getting a snapshot right now ({', '.join(begun)}): wait for that to "
                "end"
            )
        clones = await in_thread(self._clones_of, name)
        if clones:
            raise WrongState(
                f"VM {name} is needed: clones were made of it: {', '.join(clones)}. Their disks "
                "lie over its own; undefine these first"
            )
        registration = await in_thread(read_registration, supervisor.store)
        stores = [supervisor.store]
        if registration is not None:
            with suppress(UnknownVm):
                stores.append(self.store_of_source(registration))
        await in_thread(_require_ended, name, stores)
        if self.get(name) is not supervisor or supervisor.job or supervisor.attached:
            raise WrongState(f"VM {name}: somebody else is changing it right now")
        with trio.CancelScope(shield=True):
            await self.stop(name)
            try:
                await in_thread(self._store.require_no_snapshots, name)
                removed: tuple[str, ...] = ()
                if registration is not None:
                    images = await in_thread(supervisor.store.made.files)
                    files = [made.file for made in images]
                    removed = await in_thread(
                        lambda: remove_made(registration, storage=remove_storage, images=files)
                    )
                await in_thread(self._store.forget, name)
            except StoreError:
                self.add(name, supervisor.qmp, supervisor.launcher, configured=False)
                raise
        return removed


def _answers_to(vm: AttachedVm | None, word: str) -> bool:
    return vm is not None and word.lower() in (vm.uuid.lower(), str(vm.identity.pid))


def _require_ended(name: str, stores: list[VmStore]) -> None:
    """Raise WrongState if one of *stores* knows of a QEMU of VM *name* that runs. Blocks."""
    for lease in (lease for store in stores for lease in store.leases.all()):
        if lease.holder == name:
            raise WrongState(
                f"VM {name} runs, as process {lease.pid}, though its monitor does not answer: "
                "shut it down first"
            )
