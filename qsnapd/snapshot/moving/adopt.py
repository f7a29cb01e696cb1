"""Holding a manifest against the files that it names, before it is believed.

It may come from anybody. The numbers of files change when they are copied or mounted elsewhere;
then format, sizes and what lies over what must agree, and the new numbers are recorded.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from qsnapd.errors import ImageInvalid, WrongState
from qsnapd.model.findings import Severity
from qsnapd.model.snapshot import MANIFEST_FORMAT, DiskLayer, FileIdentity, Manifest, MemoryImage
from qsnapd.model.transfer import MEMORY_NAME
from qsnapd.snapshot.checking.disk import FileFact, look_at
from qsnapd.snapshot.checking.facts import Facts
from qsnapd.snapshot.checking.files import judge_files
from qsnapd.snapshot.moving.imported import DISKS_NAME
from qsnapd.store.snapshots import VmStore


@dataclass(frozen=True)
class Adopted:
    """A manifest as it is true here."""

    manifest: Manifest
    notes: tuple[str, ...]
    """What was taken on trust."""


def adopt(
    manifest: Manifest,
    *,
    store: VmStore,
    name: str,
    memory: Path | None = None,
    parents: frozenset[str] = frozenset(),
) -> Adopted:
    """Hold *manifest* against the files that it names; it becomes that of snapshot *name*.

    *memory*: its memory image, if that lies elsewhere than it says; it is said to be in the
    snapshot's own folder then, for the caller to bring there. *parents*: the names of snapshots
    that will be there, too. Touches nothing. Blocks.
    Raises: ImageInvalid: a file is missing, or not what the snapshot needs. WrongState: it is
      another VM's, or was being deleted.
    """
    _require_ours(manifest, store)
    notes: list[str] = []
    files = {i.path: look_at(i.path) for disk in manifest.disks for i in disk.chain}
    disks = tuple(_recorded(disk, store, files, notes) for disk in manifest.disks)
    parent = manifest.parent if manifest.parent in {*store.snapshots(), *parents} else None
    if manifest.parent not in (None, parent):
        notes.append(f"its parent {manifest.parent} is not here: it becomes a root")
    image = manifest.memory
    if image is not None:
        image = _recorded_memory(image, store, name, memory, notes)
    adopted = manifest.model_copy(
        update={
            "format": MANIFEST_FORMAT,
            "name": name,
            "vm": store.vm,
            "parent": parent,
            "disks": disks,
            "memory": None,
        }
    )
    files = _with_overlays(adopted, files)
    facts = Facts(store.vm, str(store.directory), {name: adopted}, files=files)
    for finding in judge_files(facts):
        if finding.severity is Severity.ERROR:
            raise ImageInvalid(finding.what)
    return Adopted(adopted.model_copy(update={"memory": image}), tuple(notes))


def _require_ours(manifest: Manifest, store: VmStore) -> None:
    if manifest.deleting:
        raise WrongState(
            f"snapshot {manifest.name} was being deleted when this was written: its images are "
            "not what they were"
        )
    if manifest.vm != store.vm and (store.directory.parent / manifest.vm).is_dir():
        raise WrongState(
            f"snapshot {manifest.name} is VM {manifest.vm}'s, and so are its images: export it "
            "with its data, and import that"
        )


def _with_overlays(manifest: Manifest, files: dict[str, FileFact]) -> dict[str, FileFact]:
    overlays = {disk.overlay for disk in manifest.disks if disk.overlay}
    return files | {path: look_at(path) for path in overlays - files.keys()}


def _recorded(
    disk: DiskLayer, store: VmStore, files: dict[str, FileFact], notes: list[str]
) -> DiskLayer:
    """The disk with the numbers that its files have now."""
    if not disk.chain or disk.chain[0].path != disk.frozen:
        raise ImageInvalid(f"disk {disk.target}: the manifest does not say which images it has")
    chain = []
    for image in disk.chain:
        _require_place(disk, image.path, store)
        file = files[image.path]
        if file.missing or file.problem:
            chain.append(image)
            continue
        if not file.is_device and file.key[1] != image.inode:
            notes.append(
                f"{image.path} is another file than when the snapshot was taken; it is taken for "
                "a copy, because format, size and the images below are the same"
            )
        device, inode = file.key
        chain.append(FileIdentity(path=image.path, device=device, inode=inode))
    return disk.model_copy(update={"chain": tuple(chain)})


def _require_place(disk: DiskLayer, path: str, store: VmStore) -> None:
    """Refuse what can be no image of this VM: the store holds others' memory, and records."""
    if os.path.normpath(path) != path:
        raise ImageInvalid(f"disk {disk.target}: {path!r} is no plain path")
    place, own = Path(path), store.directory / DISKS_NAME
    if place.is_relative_to(store.directory.parent) and not place.is_relative_to(own):
        raise ImageInvalid(f"disk {disk.target}: {path} is a file of qsnapd's, and no disk")


def _recorded_memory(
    image: MemoryImage, store: VmStore, name: str, beside: Path | None, notes: list[str]
) -> MemoryImage:
    final = store.path(name) / MEMORY_NAME
    if beside is not None:
        return image.model_copy(update={"path": str(final), "file": None})
    place = Path(image.path)
    if place.is_relative_to(store.directory.parent) and place != final:
        raise ImageInvalid(
            f"the memory image {place} lies in the folder of another snapshot, or did: look for "
            f"it with qsnapctl snapshot-import {store.vm} --scan DIRECTORY"
        )
    file = look_at(image.path)
    if file.missing or file.problem:
        raise ImageInvalid(
            f"the memory image {image.path} "
            + ("is missing" if file.missing else f"cannot be looked at: {file.problem}")
        )
    found = FileIdentity(path=image.path, device=file.key[0], inode=file.key[1])
    if image.file is not None and image.file.inode != found.inode:
        notes.append(f"the memory image {image.path} is another file than was saved: a copy")
    return image.model_copy(update={"file": found})
