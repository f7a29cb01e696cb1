"""A snapshot's record out of a manifest that somebody brings: changed, or there again.

Nothing is believed that can be looked at: the files have to be there, be what was saved, and
show what they showed then.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qsnapd.errors import BadRequest, ImageInvalid, StoreError, WrongState
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import DiskLayer, Manifest
from qsnapd.model.transfer import MEMORY_NAME
from qsnapd.snapshot.moving.adopt import Adopted
from qsnapd.snapshot.moving.take_in import take_in
from qsnapd.store.manifests import MANIFEST_NAME
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.identity import key_of
from qsnapd.vm.proc import FileKey

_EDITABLE = {"description", "labels", "parent", "created_at", "format"}
"""All else says what was saved."""
_FORGOTTEN = ".forgotten"
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True)
class Present:
    """What is true of the VM now."""

    uuid: str | None = None
    """None: it does not run."""
    active: Mapping[FileKey, str] = field(default_factory=dict)
    """The images that its disks write to, and the disks' targets."""


def redefine(
    store: VmStore, manifest: Manifest, present: Present, *, check: Callable[[], object]
) -> Adopted:
    """Make *manifest* that of the snapshot it names, which need not be there yet. Blocks.

    Preconditions: the VM's one job calls it.
    On failure or cancellation (*check* raises): as if never called.
    Raises: BadRequest: it contradicts itself, the tree, or what there is. WrongState,
      ImageInvalid, ManifestTooNew, StoreFull, StoreError.
    """
    known = store.snapshots()
    if manifest.vm != store.vm:
        raise BadRequest(f"snapshot {manifest.name} is VM {manifest.vm}'s, not {store.vm}'s")
    _require_place(manifest, known)
    before = known.get(manifest.name)
    if before is not None:
        _require_only_edited(before, manifest)
        store.replace(manifest)
        return Adopted(manifest, ())
    _require_uuid(manifest, known, present)
    require_unwritten(manifest, store, known, present)
    with _memory(store, manifest, known) as (descriptor, folder):
        adopted = take_in(store, manifest, memory_fd=descriptor, check=check)
    if folder is not None:
        store.drop_forgotten(folder)
    return adopted


def _require_place(manifest: Manifest, known: Mapping[str, Manifest]) -> None:
    """Refuse what would not be a tree."""
    name, parent = manifest.name, manifest.parent
    if parent is None:
        return
    if parent == name:
        raise BadRequest(f"cannot set snapshot {name} as its own parent")
    if parent not in known:
        raise BadRequest(f"parent {parent} for snapshot {name} not found")
    above: str | None = parent
    seen = set[str]()
    while above is not None and above not in seen and above in known:
        if above == name:
            raise BadRequest(f"parent {parent} would create cycle to {name}")
        seen.add(above)
        above = known[above].parent


def _require_only_edited(before: Manifest, manifest: Manifest) -> None:
    name = manifest.name
    if before.deleting:
        raise WrongState(f"snapshot {name} is being deleted: finish that first")
    if before.machine.uuid != manifest.machine.uuid:
        raise BadRequest(f"definition for snapshot {name} must use uuid {before.machine.uuid}")
    if before.is_disk_only != manifest.is_disk_only:
        raise BadRequest(f"cannot change between disk only and full system in snapshot {name}")
    changed = [key for key, value in before if value != getattr(manifest, key)]
    if strange := [key for key in changed if key not in _EDITABLE]:
        raise BadRequest(
            f"snapshot {name} is there, and its {', '.join(strange)} cannot be changed: that says "
            "what was saved. To define it anew, forget it first: qsnapctl snapshot-delete "
            f"{manifest.vm} {name} --metadata"
        )


def _require_uuid(manifest: Manifest, known: Mapping[str, Manifest], present: Present) -> None:
    uuids = {other.machine.uuid for other in known.values()} | {present.uuid}
    uuids.discard(None)
    if manifest.machine.uuid is not None and uuids and manifest.machine.uuid not in uuids:
        ours = present.uuid or " or ".join(sorted(filter(None, uuids)))
        raise BadRequest(f"definition for snapshot {manifest.name} must use uuid {ours}")


def require_unwritten(
    manifest: Manifest, store: VmStore, known: Mapping[str, Manifest], present: Present
) -> None:
    """Return if the images of *manifest* still show what they did, as far as is known. Blocks.

    That they are the same files is not enough: they may have been written to, or another
    snapshot's data merged into them. Raises: ImageInvalid. StoreError.
    """
    for disk in manifest.disks:
        _require_unwritten(disk, manifest, store, known, present)


def _require_unwritten(
    disk: DiskLayer,
    manifest: Manifest,
    store: VmStore,
    known: Mapping[str, Manifest],
    present: Present,
) -> None:
    start = f"snapshot {manifest.name} cannot be defined again: {disk.frozen}"
    for image in disk.chain:
        key = key_of(image.path)
        if key is not None and (target := present.active.get(key)) is not None:
            raise ImageInvalid(
                f"snapshot {manifest.name} cannot be defined again: disk {target} of the running "
                f"VM writes to {image.path}, which is not what it was any more"
            )
    for other in known.values():
        shares = any(key_of(o.frozen) == key_of(disk.frozen) for o in other.disks)
        if shares and other.created_at != manifest.created_at:
            raise ImageInvalid(
                f"{start} holds disk {disk.target} as it was at snapshot {other.name}: what had "
                "been there before was merged with it"
            )
    known_then = {file.path for file in disk.known_as}
    merged = {file.path for file in store.made.former(disk.chain[:1])} - known_then
    if merged:
        raise ImageInvalid(
            f"{start} holds more than disk {disk.target} did then: {', '.join(sorted(merged))} "
            "was merged into it since"
        )


@contextmanager
def _memory(
    store: VmStore, manifest: Manifest, known: Mapping[str, Manifest]
) -> Iterator[tuple[int | None, Path | None]]:
    """The memory image, if it is not where it belongs but still there; and its forgotten folder.

    Another snapshot may have it by another name: a copy, or what this one was renamed to.
    """
    image = manifest.memory
    own = store.path(manifest.name) / MEMORY_NAME
    forgotten = list(_forgotten(store, manifest))
    if image is None or own.exists():
        yield None, next(iter(forgotten), None)
        return
    inode = image.file.inode if image.file is not None else None
    places: list[tuple[str, Path | None]] = [
        (other.memory.path, None) for other in known.values() if other.memory is not None
    ]
    places += ((str(f / MEMORY_NAME), f) for f in forgotten)
    for path, folder in places:
        try:
            descriptor = os.open(path, _FILE)
        except OSError:
            continue
        try:
            if folder is not None or path == image.path or os.fstat(descriptor).st_ino == inode:
                inside = Path(path).is_relative_to(store.directory)
                yield (descriptor if inside else None), folder
                return
        finally:
            os.close(descriptor)
    yield None, None


def _forgotten(store: VmStore, manifest: Manifest) -> Iterator[Path]:
    """The folders of this very snapshot, whose metadata was deleted."""
    above = store.directory / _FORGOTTEN
    try:
        names = sorted(os.listdir(above))
    except FileNotFoundError:
        return
    except OSError as exc:
        raise StoreError(f"cannot read {above}: {exc.strerror}") from exc
    for name in names:
        try:
            text = (above / name / MANIFEST_NAME).read_bytes()
            kept = parse_manifest(text, str(above / name))
        except (OSError, StoreError):
            continue  # not what is looked for; snapshot-fsck tells of it
        if (kept.name, kept.created_at) == (manifest.name, manifest.created_at):
            yield above / name
