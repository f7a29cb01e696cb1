"""Snapshots of manifests alone: proven, given a folder of their own, and committed.

All of it blocks. The memory image is brought into the snapshot's folder if it lies beside its
manifest; disks stay where they are.
"""

import os
from collections.abc import Callable, Set
from pathlib import Path

from qsnapd.errors import (
    ImageInvalid,
    ManifestTooNew,
    SnapshotExists,
    StoreError,
    UnknownSnapshot,
)
from qsnapd.image import digest
from qsnapd.image.files import (
    allocated_bytes,
    create_exclusive,
    identity,
    require_space,
    sync_directory,
    sync_file,
    sync_image,
)
from qsnapd.image.sparse import copy_sparse, data_bytes
from qsnapd.model.snapshot import FileIdentity, Manifest, MemoryImage
from qsnapd.model.transfer import MEMORY_NAME
from qsnapd.snapshot.checking.disk import look_at
from qsnapd.snapshot.checking.store import DAMAGED_SUFFIX
from qsnapd.snapshot.intact import check_memory
from qsnapd.snapshot.moving.adopt import Adopted, adopt
from qsnapd.store.manifests import MANIFEST_NAME, write_manifest
from qsnapd.store.snapshots import VmStore

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Check = Callable[[], object]
"""Called now and then; cancels by raising."""


def prove_memory(
    manifest: Manifest, image: MemoryImage, before: FileIdentity | None, check: Check
) -> None:
    """Check the memory image where *image* says it is; all of it, if it is not *before*.

    Raises: ImageInvalid, StoreError.
    """
    check_memory(manifest, image, check)
    if image.sha256 is None or (before and before.inode == look_at(image.path).key[1]):
        return
    try:
        descriptor = os.open(image.path, _FILE)
    except OSError as exc:
        raise ImageInvalid(f"{image.path} cannot be opened: {exc.strerror}") from exc
    try:
        found = digest.sha256(descriptor, check)
    finally:
        os.close(descriptor)
    if found != image.sha256:
        raise ImageInvalid(f"{image.path} has other content than the memory that was saved")


def take_in(
    store: VmStore,
    manifest: Manifest,
    *,
    name: str | None = None,
    memory_fd: int | None = None,
    parents: frozenset[str] = frozenset(),
    check: Check,
) -> Adopted:
    """Adopt *manifest*, prove its memory, and commit it. Blocks.

    *memory_fd*: its memory image, open for reading, which is linked or copied into the
    snapshot's folder; by default it is where the manifest says.
    On failure or cancellation: as if never called.
    Raises: SnapshotExists, what `adopt` raises, StoreFull, StoreError.
    """
    name = name or manifest.name
    with store.leases.reading(name, "an import"):
        broken = _is_broken(store, name)
        own = store.path(name) / MEMORY_NAME
        beside = own if memory_fd is not None or (broken and own.exists()) else None
        adopted = adopt(manifest, store=store, name=name, memory=beside, parents=parents)
        before = manifest.memory.file if manifest.memory is not None else None
        if broken:
            return _put_back(store, name, adopted, before, check)
        return _commit(store, name, adopted, before, memory_fd, check)


def forget_lost_parents(store: VmStore, names: Set[str]) -> None:
    """Make roots of those of *names* whose parents are not there. Blocks. Raises: StoreError."""
    known = store.snapshots()
    for name in names & known.keys():
        if known[name].parent is not None and known[name].parent not in known:
            store.replace(known[name].model_copy(update={"parent": None}))


def bring_children_back(store: VmStore, names: Set[str]) -> None:
    """Let those come from one of *names* again that did before its record was deleted.

    A deletion gives them to its parent. They are those whose images lie right over its own.
    Blocks. Raises: StoreError.
    """
    known = store.snapshots()
    for name in sorted(names & known.keys(), key=lambda n: known[n].created_at, reverse=True):
        parent = known[name]
        frozen = {_number(disk.chain[0]) for disk in parent.disks if disk.chain}
        for child in known.values():
            below = {_number(disk.chain[1]) for disk in child.disks if len(disk.chain) > 1}
            is_sibling = child.parent == parent.parent and child.created_at > parent.created_at
            if is_sibling and not frozen.isdisjoint(below):
                store.replace(child.model_copy(update={"parent": name}))


def _number(image: FileIdentity) -> tuple[str, int]:
    return image.path, image.inode


def _is_broken(store: VmStore, name: str) -> bool:
    """Whether there is a folder of that name which is no snapshot.

    Raises: SnapshotExists: it is one. ManifestTooNew: it is a newer version's.
    """
    try:
        store.manifest(name)
    except ManifestTooNew:
        raise
    except UnknownSnapshot:
        return False
    except StoreError:
        return True
    raise SnapshotExists(f"VM {store.vm!r} already has a snapshot {name!r}")


def _commit(
    store: VmStore,
    name: str,
    adopted: Adopted,
    before: FileIdentity | None,
    memory_fd: int | None,
    check: Check,
) -> Adopted:
    staging = store.stage(name)
    try:
        manifest = adopted.manifest
        if manifest.memory is not None:
            place = manifest.memory
            if memory_fd is not None:
                _bring(memory_fd, staging / MEMORY_NAME, manifest.memory.size_bytes, check)
                place = place.model_copy(update={"path": str(staging / MEMORY_NAME)})
            manifest = _proven(manifest, place, before, check)
        check()
        _sync_images(manifest)
        store.commit(name, manifest)
    except BaseException:
        if name not in store.snapshots():
            store.unstage(name)
        raise
    return Adopted(manifest, adopted.notes)


def _proven(
    manifest: Manifest, place: MemoryImage, before: FileIdentity | None, check: Check
) -> Manifest:
    """The manifest with its memory, as that lies at *place* now."""
    prove_memory(manifest, place, before, check)
    assert manifest.memory is not None, "the caller has looked"
    found = identity(Path(place.path)).model_copy(update={"path": manifest.memory.path})
    with open(place.path, "rb") as file:
        sync_file(file.fileno())
        memory = manifest.memory.model_copy(
            update={"file": found, "allocated_bytes": allocated_bytes(file.fileno())}
        )
    return manifest.model_copy(update={"memory": memory})


def _sync_images(manifest: Manifest) -> None:
    """Have the disks on stable storage: somebody may have copied them there a moment ago."""
    for path in {image.path for disk in manifest.disks for image in disk.chain}:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise ImageInvalid(f"{path} cannot be opened: {exc.strerror}") from exc
        try:
            sync_image(fd)
        finally:
            os.close(fd)


def _bring(memory_fd: int, target: Path, size_bytes: int, check: Check) -> None:
    """Have the memory image at *target*: the same file, where that is possible and ours alone."""
    status = os.fstat(memory_fd)
    is_ours = status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
    try:
        if is_ours:
            _link(memory_fd, target)
            return
    except OSError:
        pass  # another file system: it is copied then
    try:
        require_space(target.parent, data_bytes(memory_fd))
        copy = create_exclusive(target)
        try:
            copy_sparse(memory_fd, copy, size_bytes, lambda _: check())
            sync_file(copy)
        finally:
            os.close(copy)
    except OSError as exc:
        raise StoreError(f"cannot copy the memory image: {exc.strerror}") from exc


def _link(fd: int, target: Path) -> None:
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Python follows the link, which /proc/self/fd is full of, only with a folder given.
        os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=folder, follow_symlinks=True)
        os.fsync(folder)
    finally:
        os.close(folder)


def _put_back(
    store: VmStore, name: str, adopted: Adopted, before: FileIdentity | None, check: Check
) -> Adopted:
    """Give a folder that has lost its manifest this one; what was there is kept apart."""
    manifest, path = adopted.manifest, store.path(name) / MANIFEST_NAME
    if manifest.memory is not None:
        manifest = _proven(manifest, manifest.memory, before, check)
    _sync_images(manifest)
    draft = path.with_name(f".{MANIFEST_NAME}.new")
    try:
        draft.unlink(missing_ok=True)
        write_manifest(draft, manifest)
        if path.exists():
            path.rename(store.directory / f".{name}{DAMAGED_SUFFIX}")
        draft.rename(path)
        sync_directory(path.parent)
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
    return Adopted(manifest, adopted.notes)
