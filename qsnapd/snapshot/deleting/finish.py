"""The last part of a deletion, when all is copied: names are put right, and files go.

Every step asks what is true and goes on from there; so whoever finds the journal may do it
again. Everything here blocks.
"""

import fcntl
import logging
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from qsnapd.errors import StoreError, UnknownSnapshot
from qsnapd.faults import Point, reach_in_thread
from qsnapd.image.files import remove_if_ours, sync_removals
from qsnapd.model.deletion import DeletePlan, Image, Merge
from qsnapd.model.registration import LastSeen
from qsnapd.model.snapshot import MANIFEST_FORMAT, DiskLayer, FileIdentity, Manifest
from qsnapd.store.made import by_path
from qsnapd.store.manifests import MANIFEST_NAME, read_manifest, replace_manifest
from qsnapd.store.registry import note_last_seen, read_last_seen
from qsnapd.store.snapshots import VmStore

STALE_S = 5
"""How much younger than the note that it is merged an image may look that nobody wrote to since."""

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock: type, whence, start, length, pid."""
_QEMU_LOCKS = (100, 200)
"""Where in an image QEMU locks bytes (block/file-posix.c), from 100 to 299 at most."""

_log = logging.getLogger(__name__)


def mark(store: VmStore, name: str, *, deleting: bool) -> None:
    """Note in the manifest whether the snapshot can be restored. Raises: StoreError."""
    manifest = store.manifest(name)
    if manifest.deleting != deleting:
        store.replace(manifest.model_copy(update={"deleting": deleting}))


def _settle_forgotten(store: VmStore, merge: Merge) -> None:
    for folder in store.forgotten():
        path = folder / MANIFEST_NAME
        try:
            manifest = read_manifest(path)
            changed = without(manifest, merge)
            if changed != manifest:
                changed = changed.model_copy(update={"format": MANIFEST_FORMAT})
                replace_manifest(path, changed)
        except (OSError, StoreError) as exc:
            _log.warning("%s is not kept up to date: %s", path, exc)


def settle_images(store: VmStore, merges: Iterable[Merge], *, but: str) -> None:
    """Make manifests say what the images are like after *merges*; the one called *but* is left.

    Idempotent. Raises: StoreError.
    """
    for merge in merges:
        store.made.moved(merge.source.file, merge.destination.file)
        for name, manifest in store.snapshots().items():
            changed = without(manifest, merge)
            if name != but and changed != manifest:
                store.replace(changed)
        _settle_forgotten(store, merge)
        _settle_last_seen(store, merge)


def without(manifest: Manifest, merge: Merge) -> Manifest:
    """The manifest with one image fewer in its chains, where it has both; pure."""
    disks = tuple(_merged(disk, merge) for disk in manifest.disks)
    left_out = tuple(_merged(disk, merge) for disk in manifest.left_out)
    if (disks, left_out) == (manifest.disks, manifest.left_out):
        return manifest
    return manifest.model_copy(update={"disks": disks, "left_out": left_out})


def _merged(disk: DiskLayer, merge: Merge) -> DiskLayer:
    chain = _shorter(disk.chain, merge)
    if chain == disk.chain:
        return disk
    changed: dict[str, object] = {"chain": chain}
    gone = by_path(merge.source.path)
    if gone not in disk.known_as:
        changed["known_as"] = (*disk.known_as, gone)
    if chain[0] != disk.chain[0]:
        changed |= {"frozen": chain[0].path, "frozen_format": merge.lower.format}
    return disk.model_copy(update=changed)


def _shorter(chain: tuple[FileIdentity, ...], merge: Merge) -> tuple[FileIdentity, ...]:
    for depth, (above, below) in enumerate(pairwise(chain)):
        if _is(above, merge.upper) and _is(below, merge.lower):
            gone = depth if merge.kind == "commit" else depth + 1
            return (*chain[:gone], *chain[gone + 1 :])
    return chain


def _is(file: FileIdentity, image: Image) -> bool:
    # Device numbers may have changed since the snapshot was taken.
    return (file.path, file.inode) == (image.path, image.file.inode)


def _settle_last_seen(store: VmStore, merge: Merge) -> None:
    """A clone that is shut off is started on what it had last."""
    seen = read_last_seen(store)
    if seen is None:
        return
    disks = tuple(
        disk.model_copy(update={"chain": _shorter(disk.chain, merge)}) for disk in seen.disks
    )
    note_last_seen(store, LastSeen(machine=seen.machine, disks=disks))


def remove_snapshot(
    store: VmStore, plan: DeletePlan, *, is_vouched_for: bool
) -> tuple[str, ...]:
    """Take the snapshot out of the tree, and its files away; idempotent.

    *is_vouched_for*: the running QEMU uses none of the images that go.
    Returns what the person should know. Raises: StoreError.
    """
    notes = list(plan.notes)
    adopt_children(store, plan.name, plan.parent)
    left = store.remove(plan.name)
    store.leases.forget(plan.name)
    reach_in_thread(Point.DELETE_UNLISTED)
    if left is not None:
        notes.append(f"{left} holds files that qsnapd has not put there: they are left")
    if plan.was_current:
        store.set_current(plan.parent)
    doomed = (*plan.doomed, *([plan.memory] if plan.memory else []))
    for file in doomed:
        if not is_vouched_for:
            _refuse_newer(store, plan, file)
            _refuse_open(file)
        remove_if_ours(Path(file.path), file.inode)
        if Path(file.path).exists():
            notes.append(f"{file.path} is left: it is another file than it was")
    folders = {Path(file.path).parent for file in doomed}
    for folder in folders:
        with suppress(OSError):  # an import's folder; others are not empty
            if folder.parent == store.directory / ".disks":
                folder.rmdir()
    sync_removals((*folders, store.directory / ".disks"))
    store.made.forget_gone()
    reach_in_thread(Point.DELETE_FILES_REMOVED)
    store.deletion.clear()
    reach_in_thread(Point.DELETED)
    return tuple(notes)


def _refuse_newer(store: VmStore, plan: DeletePlan, file: FileIdentity) -> None:
    """Keep an image that somebody has written to since it was merged. Raises: StoreError."""
    if not any(merge.kind == "commit" and merge.upper.file == file for merge in plan.merges):
        return
    with suppress(OSError):
        newer_s = (Path(file.path).stat().st_mtime_ns - store.deletion.written_ns()) / 1e9
        if newer_s > STALE_S:
            raise StoreError(
                f"{file.path} was written to after it had been merged: the VM has been started "
                "from it again. Look at it and at the image below it, keep the right one, and "
                "remove the other"
            )


def _refuse_open(file: FileIdentity) -> None:
    """Keep an image that some QEMU has open. Raises: StoreError."""
    if is_locked(file):
        raise StoreError(
            f"{file.path} is open in a QEMU, which may have been started on it just now: it is "
            "looked at again when that answers, or has ended"
        )


def is_locked(file: FileIdentity) -> bool:
    """Whether some QEMU has an image open, by the locks that it takes."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *_QEMU_LOCKS, 0)
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(fd)


def adopt_children(store: VmStore, name: str, parent: str | None) -> None:
    """Make the children of a snapshot those of its parent; idempotent. Raises: StoreError."""
    for manifest in store.snapshots().values():
        if manifest.parent == name:
            with suppress(UnknownSnapshot):
                store.replace(manifest.model_copy(update={"parent": parent}))


def give_back_children(store: VmStore, name: str, before: Mapping[str, Manifest]) -> None:
    """Undo `adopt_children`; *before*: the snapshots as they were. Raises: StoreError."""
    for manifest in before.values():
        if manifest.parent == name and store.manifest(manifest.name) != manifest:
            store.replace(manifest)
