"""Other names for snapshots: whatever happens, the tree consists of whole snapshots.

    STATE_DIR/VM/.renaming.json    which snapshot gets which name, until that is done

Files stay where they are, but for a memory image in the snapshot's own folder, which gets a
second name there (a hard link). A rename first makes a copy under the new name, then moves what
refers to the old one, then removes that: at every moment either name, or both, can be restored.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qsnapd.errors import (
    Effect,
    QsnapError,
    SnapshotExists,
    StoreError,
    WrongState,
)
from qsnapd.faults import Point, reach_in_thread
from qsnapd.image.files import sync_directory
from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName
from qsnapd.model.snapshot import MANIFEST_FORMAT, Manifest
from qsnapd.store.own_files import is_of_a_snapshot
from qsnapd.store.record import Record
from qsnapd.store.snapshots import VmStore

_log = logging.getLogger(__name__)

RENAMING_NAME = ".renaming.json"
_MEMORY_NAME = "memory.img"
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV)


class Renaming(Frozen):
    """A snapshot that is getting another name."""

    old: SnapshotName
    new: SnapshotName
    keeps_old: bool = False
    """It will have both: a copy."""


def copy_snapshot(store: VmStore, name: str, new_name: str) -> Manifest:
    """Give the snapshot *name* a second name, under which it is another child of its parent.

    Preconditions: the VM's one job calls it.
    On success: both exist and need the same files. On failure: as if never called.
    Raises: UnknownSnapshot, SnapshotExists, WrongState, StoreError.
    """
    renaming = Renaming(old=name, new=new_name, keeps_old=True)
    manifest = _begin(store, renaming)
    _clear_later(store)
    return manifest


def rename_snapshot(store: VmStore, name: str, new_name: str) -> Manifest:
    """Call the snapshot *name* something else; its children, and who runs on it, go along.

    Preconditions: the VM's one job calls it; nobody reads the snapshot's files, no clone was
    made of it, and nothing is to be started from it.
    On failure: as if never called; with effect PARTIAL, both names exist until
      `finish_renaming` has gone on, as the next start of the daemon does.
    Raises: UnknownSnapshot, SnapshotExists, WrongState, StoreError.
    """
    renaming = Renaming(old=name, new=new_name)
    manifest = _begin(store, renaming)
    try:
        _move(store, renaming)
    except (OSError, QsnapError) as exc:
        raise StoreError(
            f"snapshot {name} is called {new_name} now, but its old name is not gone yet: {exc}; "
            "that is tried again by the next such request, or when qsnapd starts",
            effect=Effect.PARTIAL,
        ) from exc
    return manifest


def finish_renaming(store: VmStore) -> str | None:
    """Finish or undo what a rename or a copy has left unfinished; says what, if anything.

    Idempotent. Raises: StoreError: it cannot, and is to be called again.
    """
    renaming = _record(store).read()
    if renaming is None:
        return None
    store.unstage(renaming.new)
    known = store.snapshots()
    if renaming.new not in known:
        _record(store).clear()
        return f"undid an unfinished second name of snapshot {renaming.old}: {renaming.new}"
    old = known.get(renaming.old)
    if renaming.keeps_old or (old is not None and not _are_same(old, known[renaming.new])):
        _record(store).clear()
        return None
    with _failing(f"rename snapshot {renaming.old}"):
        _move(store, renaming)
    return f"finished renaming snapshot {renaming.old} to {renaming.new}"


def _begin(store: VmStore, renaming: Renaming) -> Manifest:
    """Have the snapshot under the new name, too."""
    manifest = store.manifest(renaming.old)
    if manifest.deleting:
        raise WrongState(f"snapshot {manifest.name} is being deleted: finish that first")
    if os.path.lexists(store.path(renaming.new)):
        raise SnapshotExists(f"VM {store.vm!r} already has a snapshot {renaming.new!r}")
    _record(store).write(renaming)
    reach_in_thread(Point.RENAME_NOTED)
    try:
        staging = store.stage(renaming.new)
    except BaseException:  # what is there is somebody else's: an import's
        _record(store).clear()
        raise
    try:
        with _failing(f"give the files of snapshot {renaming.old} a second name"):
            for name in _own_files(store.path(renaming.old)):
                os.link(store.path(renaming.old) / name, staging / name, follow_symlinks=False)
            sync_directory(staging)
        renamed = _renamed(store, manifest, renaming.new)
        store.commit(renaming.new, renamed)
    except BaseException:
        if renaming.new not in store.snapshots():
            store.unstage(renaming.new)
            _record(store).clear()
        raise
    reach_in_thread(Point.RENAME_COPIED)
    return renamed


def _are_same(old: Manifest, new: Manifest) -> bool:
    """Whether these are one snapshot; either name may have been taken for another one since."""
    return (old.created_at, old.disks) == (new.created_at, new.disks)


def _own_files(folder: Path) -> list[str]:
    with _failing(f"look into {folder}"):
        names = sorted(os.listdir(folder))
    if strangers := [name for name in names if not is_of_a_snapshot(name)]:
        raise WrongState(
            f"{folder} holds what qsnapd has not put there ({', '.join(strangers)}): move that "
            "away first"
        )
    return [name for name in names if name == _MEMORY_NAME]  # the rest tells of the old name


def _renamed(store: VmStore, manifest: Manifest, name: str) -> Manifest:
    memory = manifest.memory
    own = str(store.path(manifest.name) / _MEMORY_NAME)
    if memory is not None and memory.path == own:
        path = str(store.path(name) / _MEMORY_NAME)
        file = memory.file.model_copy(update={"path": path}) if memory.file else None
        memory = memory.model_copy(update={"path": path, "file": file})
    changed = {"name": name, "memory": memory, "format": MANIFEST_FORMAT}
    return manifest.model_copy(update=changed)


def _move(store: VmStore, renaming: Renaming) -> None:
    """Let what refers to the old name refer to the new one, and remove the old. Idempotent."""
    for manifest in store.snapshots().values():
        if manifest.parent == renaming.old and manifest.name != renaming.new:
            store.replace(manifest.model_copy(update={"parent": renaming.new}))
    if store.current_as_written() == renaming.old:
        store.set_current(renaming.new)
    store.leases.rename(renaming.old, renaming.new)
    reach_in_thread(Point.RENAME_MOVED)
    store.remove(renaming.old)
    reach_in_thread(Point.RENAMED)
    _clear_later(store)


def _record(store: VmStore) -> Record[Renaming]:
    return Record(store.directory / RENAMING_NAME, Renaming, kind="the record of the new name")


def _clear_later(store: VmStore) -> None:
    """All is done: a record that stays is found to be of no consequence by the next who looks."""
    try:
        _record(store).clear()
    except StoreError as exc:
        _log.warning("VM %s: %s", store.vm, exc)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        why = exc.strerror or str(exc)
        if exc.errno in _NO_LINKS:
            why += " (this file system has no hard links)"
        raise StoreError(f"cannot {what}: {why}") from exc
