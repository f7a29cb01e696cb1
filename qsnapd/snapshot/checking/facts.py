"""What there is of a VM's snapshots: in the store and on its disks. Reads only, judges nothing.

Everything here blocks. Nobody is kept from changing what is looked at: journals are read after
the files that they tell of, so that a running job's are never taken for leftovers.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from qsnapd.errors import ManifestTooNew, StoreError
from qsnapd.model.deletion import DeletePlan
from qsnapd.model.plan import CheckpointPlan, JournalEntry, Restore
from qsnapd.model.registration import LastSeen, Registration
from qsnapd.model.snapshot import FileIdentity, Manifest
from qsnapd.snapshot.checking.disk import FileFact, Leftover, find_leftovers, look_at
from qsnapd.snapshot.checking.live import Live
from qsnapd.snapshot.moving.imported import DISKS_NAME
from qsnapd.snapshot.moving.scan import FORGOTTEN_NAME
from qsnapd.snapshot.restoring.revert_plan import VIEW_SUFFIX
from qsnapd.store.deletions import DELETION_NAME
from qsnapd.store.leases import Lease
from qsnapd.store.made import MADE_NAME
from qsnapd.store.manifests import MANIFEST_NAME, read_manifest
from qsnapd.store.own_files import is_view
from qsnapd.store.registry import read_last_seen, read_registration
from qsnapd.store.renaming import RENAMING_NAME
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.identity import key_of
from qsnapd.vm.proc import FileKey

T = TypeVar("T")

_JOURNALS = frozenset({".journal.json", ".restoring.json", ".next-start.json", DELETION_NAME})


@dataclass(frozen=True)
class Broken:
    """A snapshot's folder whose manifest is of no use."""

    name: str
    code: str
    words: str


@dataclass(frozen=True)
class Partial:
    """A snapshot that was begun."""

    name: str
    is_old: bool
    """Begun before this daemon was."""


@dataclass(frozen=True)
class Around:
    """What the other VMs of the daemon have to do with this one's files."""

    tokens: frozenset[str] = frozenset()
    """Of their unfinished jobs."""
    knows_jobs: bool = True
    """All records of these were understood."""
    needed: frozenset[FileKey] = frozenset()
    """The files that their snapshots and they themselves lie over."""
    snapshots: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """The names of their snapshots."""
    frozen: Mapping[FileKey, str] = field(default_factory=dict)
    """The frozen images of these, and whose they are, in words."""


@dataclass(frozen=True)
class Facts:
    """One look at everything that is kept of a VM."""

    vm: str
    directory: str
    manifests: Mapping[str, Manifest]
    forgotten: tuple[Manifest, ...] = ()
    """Of snapshots whose metadata was deleted: they can be taken in again, with their files."""
    broken: tuple[Broken, ...] = ()
    current: str = ""
    """What `.current` says."""
    entries: frozenset[str] = frozenset()
    inside: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """What lies in each snapshot's folder."""
    disk_folders: frozenset[str] = frozenset()
    partials: tuple[Partial, ...] = ()
    checkpoint: JournalEntry | None = None
    restoring: JournalEntry | None = None
    next_start: JournalEntry | None = None
    deletion: DeletePlan | None = None
    unreadable: tuple[tuple[str, str], ...] = ()
    """Other records that are not understood: path, and why."""
    leases: tuple[tuple[Lease, bool], ...] = ()
    """And whether the process lives."""
    registration: Registration | None = None
    last_seen: LastSeen | None = None
    files: Mapping[str, FileFact] = field(default_factory=dict)
    leftovers: tuple[Leftover, ...] = ()
    made: tuple[FileIdentity, ...] = ()
    """Disk images that qsnapd has made for this VM, as far as it was recorded."""
    around: Around = Around()
    is_busy: bool = False
    """A job is running on the VM."""
    live: Live | None = None
    """None: its QEMU is not attached, or its disks are changing right now."""

    @property
    def knows_jobs(self) -> bool:
        """Whether all records of unfinished jobs were understood, its own and other VMs'."""
        lost = {os.path.basename(path) for path, _ in self.unreadable}
        return self.around.knows_jobs and lost.isdisjoint(_JOURNALS)

    def journals(self) -> Iterator[JournalEntry]:
        for entry in (self.checkpoint, self.restoring, self.next_start):
            if entry is not None:
                yield entry


def gather(
    store: VmStore, *, before_s: float, around: Around, live: Live | None, is_busy: bool
) -> Facts:
    """Look at all of it. *before_s*: when this daemon began. Raises: StoreError."""
    try:
        return _gather(store, before_s, around, live, is_busy)
    except OSError as exc:
        where = exc.filename or store.directory
        raise StoreError(f"cannot look into {where}: {exc.strerror}") from exc


def _gather(
    store: VmStore, before_s: float, around: Around, live: Live | None, is_busy: bool
) -> Facts:
    directory = store.directory
    unreadable: list[tuple[str, str]] = []

    def read(name: str, reader: Callable[[], T | None]) -> T | None:
        try:
            return reader()
        except StoreError as exc:
            unreadable.append((str(directory / name), str(exc)))
            return None

    names = frozenset(os.listdir(directory))
    folders = {n for n in names if not n.startswith(".") and (directory / n).is_dir()}
    partials = tuple(_partial(store, name, before_s) for name in store.partials())
    registration = read(".vm.json", partial(read_registration, store))
    last_seen = read(".last-seen.json", partial(read_last_seen, store))
    manifests = store.snapshots()
    made = tuple(m.file for m in read(MADE_NAME, store.made.files) or ())
    leftovers = tuple(
        find_leftovers(manifests.values(), made, apart=directory, before_s=before_s)
    )
    # Last, because what they tell of may only be what was seen before.
    checkpoint = read(".journal.json", store.journal.read)
    restoring = read(".restoring.json", store.restoring.read)
    next_start = read(".next-start.json", store.next_start.read)
    deletion = read(DELETION_NAME, store.deletion.read)
    leases = read(".leases.json", store.leases.recorded) or ()
    broken = tuple(filter(None, (_broken(store, n) for n in sorted(store.problems()))))
    forgotten = tuple(_forgotten(directory / FORGOTTEN_NAME))
    paths = {p for manifest in (*manifests.values(), *forgotten) for p in _paths(manifest)}
    paths |= {file.path for file in made}
    if last_seen is not None:
        paths |= {file.path for disk in last_seen.disks for file in disk.chain}
    if next_start is not None and isinstance(next_start.plan, Restore):
        paths |= {overlay.path for overlay in next_start.plan.overlays}
    return Facts(
        vm=store.vm,
        directory=str(directory),
        manifests=manifests,
        forgotten=forgotten,
        broken=broken,
        current=store.current_as_written(),
        entries=names,
        inside={name: frozenset(_listed(directory / name)) for name in folders},
        disk_folders=frozenset(_listed(directory / DISKS_NAME)),
        partials=partials,
        checkpoint=checkpoint,
        restoring=restoring,
        next_start=next_start,
        deletion=deletion,
        unreadable=tuple(unreadable),
        leases=tuple((lease, lease.is_true) for lease in leases),
        registration=registration,
        last_seen=last_seen,
        files={path: look_at(path) for path in sorted(paths)},
        leftovers=leftovers,
        made=made,
        around=around,
        is_busy=is_busy,
        live=live,
    )


def look_around(stores: Sequence[VmStore]) -> Around:
    """What the VMs of *stores* need. Whatever cannot be read there is not known. Blocks."""
    tokens, paths = set[str](), set[str]()
    knows_jobs = True
    frozen: dict[str, str] = {}
    snapshots: dict[str, frozenset[str]] = {}
    for store in stores:
        manifests = store.snapshots()
        snapshots[store.vm] = frozenset(manifests)
        chains = [disk.chain for m in manifests.values() for disk in m.disks]
        for name, manifest in manifests.items():
            frozen |= {disk.frozen: f"{name} of VM {store.vm}" for disk in manifest.disks}
        try:
            for journal in (store.journal, store.restoring, store.next_start):
                if (entry := journal.read()) is not None:
                    tokens.add(entry.plan.token)
                    chains.append(entry.made)
            if (deletion := store.deletion.read()) is not None:
                tokens.add(deletion.token)
        except StoreError:
            knows_jobs = False
        if (registration := _unless_unreadable(partial(read_registration, store))) is not None:
            chains.append(registration.overlays)
        if (seen := _unless_unreadable(partial(read_last_seen, store))) is not None:
            chains += [disk.chain for disk in seen.disks]
        paths |= {file.path for chain in chains for file in chain}
    keys = {path: key for path in paths if (key := key_of(path)) is not None}
    return Around(
        tokens=frozenset(tokens),
        knows_jobs=knows_jobs,
        needed=frozenset(keys.values()),
        snapshots=snapshots,
        frozen={keys[path]: words for path, words in frozen.items() if path in keys},
    )


def _unless_unreadable(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except StoreError:
        return None


def _paths(manifest: Manifest) -> Iterator[str]:
    if manifest.memory is not None:
        yield manifest.memory.path
    for disk in manifest.disks:
        yield from (file.path for file in disk.chain)
        yield from (disk.frozen, *([disk.overlay] if disk.overlay else ()))


def _broken(store: VmStore, name: str) -> Broken | None:
    """Why a folder is no snapshot; None if it is one by now."""
    path = store.directory / name / MANIFEST_NAME
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return Broken(name, "manifest-missing", f"{path.parent} has no {MANIFEST_NAME}")
    except ManifestTooNew as exc:
        return Broken(name, "manifest-too-new", str(exc))
    except StoreError as exc:
        return Broken(name, "manifest-unreadable", str(exc))
    except OSError as exc:
        return Broken(name, "manifest-unreadable", f"{path} cannot be read: {exc.strerror}")
    if (manifest.vm, manifest.name) != (store.vm, name):
        words = f"{path} is that of snapshot {manifest.name} of VM {manifest.vm}"
        return Broken(name, "manifest-misplaced", words)
    return None


def _forgotten(folder: Path) -> Iterator[Manifest]:
    for name in _listed(folder):
        try:
            yield read_manifest(folder / name / MANIFEST_NAME)
        except (StoreError, OSError):
            continue  # nobody counts on it: a scan tells of it


def _partial(store: VmStore, name: str, before_s: float) -> Partial:
    try:
        is_old = store.partial_path(name).stat().st_ctime < before_s
    except FileNotFoundError:  # it has ended since
        is_old = False
    return Partial(name, is_old)


def _listed(folder: Path) -> Iterable[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return ()


def named_tokens(facts: Facts) -> frozenset[str]:
    """Of all unfinished jobs."""
    deleting = {facts.deletion.token} if facts.deletion is not None else set()
    return facts.around.tokens | deleting | {entry.plan.token for entry in facts.journals()}


def abandoned_partials(facts: Facts) -> tuple[Partial, ...]:
    """The snapshots that were begun, and that nobody is going to end."""
    if RENAMING_NAME in facts.entries or not facts.knows_jobs:
        return ()  # it may be a second name that is being given
    begun = {
        entry.plan.name for entry in facts.journals() if isinstance(entry.plan, CheckpointPlan)
    }
    return tuple(part for part in facts.partials if part.is_old and part.name not in begun)


def abandoned_views(facts: Facts) -> tuple[str, ...]:
    """Names of parts of memory images that a lazy restore loads, and none does any more."""
    if not facts.knows_jobs:
        return ()
    tokens = named_tokens(facts)
    views = (name for name in sorted(facts.entries) if is_view(name))
    return tuple(name for name in views if name[1 : -len(VIEW_SUFFIX)] not in tokens)


def abandoned_files(facts: Facts) -> tuple[Leftover, ...]:
    """Unfinished files of jobs that are not under way any more, and that no disk lies over."""
    if not facts.knows_jobs:
        return ()
    tokens = named_tokens(facts)
    chains = [disk.chain for m in facts.manifests.values() for disk in m.disks]
    chains += [disk.chain for disk in facts.live.disks] if facts.live is not None else []
    used = {(image.device, image.inode) for chain in chains for image in chain}
    used |= facts.around.needed
    return tuple(
        leftover
        for leftover in facts.leftovers
        if leftover.token not in tokens and leftover.key not in used
    )
