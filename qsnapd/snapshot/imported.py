"""Making an exported snapshot one of a VM's own.

It is staged like a checkpoint and committed by the same rename. The images of its disks lie in
a folder of their own, so that overlays over them never get into a snapshot's folder.
"""

import os
import secrets
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from pydantic import ValidationError

from qsnapd.errors import Effect, ImageInvalid, StoreError, TargetRefused
from qsnapd.image.files import (
    allocated_bytes,
    create_exclusive,
    identity,
    require_space,
    sync_directory,
    sync_file,
)
from qsnapd.image.qcow2 import read_header
from qsnapd.model.base import Frozen
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest, MemoryImage
from qsnapd.model.transfer import MEMORY_NAME, Export, ExportedDisk, ImportRequest
from qsnapd.snapshot.finish import verify_image
from qsnapd.snapshot.meter import Meter, Tell
from qsnapd.snapshot.sources import Folder, Source, Stream, require_readable
from qsnapd.store.layout import make_directory
from qsnapd.store.snapshots import VmStore

RECORD_NAME = ".import.json"
"""In the snapshot's folder: where the images of its disks are."""
DISKS_NAME = ".disks"
"""In a VM's part of the store: the images of imported disks, unless they were put elsewhere."""
_SECTOR_BYTES = 512


class _Record(Frozen):
    disks: FileIdentity


@dataclass(frozen=True)
class _Place:
    """Where the files go that are being imported."""

    staging: Path
    disks: Path

    def of(self, name: str) -> Path:
        return (self.staging if name == MEMORY_NAME else self.disks) / name


async def import_snapshot(
    store: VmStore, request: ImportRequest, *, descriptor: int | None, tell: Tell
) -> Manifest:
    """Copy the export into the store, prove it, and commit it.

    On failure or cancellation before the commit: nothing is there that was not before.
    Raises: SnapshotExists, TargetRefused, StoreFull, ManifestInvalid, ManifestTooNew,
      ImageInvalid, StoreError.
    """
    meter = Meter(tell)
    if request.directory is not None:
        source: Source = Folder(Path(request.directory))
    elif descriptor is not None:
        require_readable(descriptor)
        source = Stream(descriptor)
    else:
        raise TargetRefused("name a directory, or send a descriptor to read the tar stream from")
    export = await trio.to_thread.run_sync(source.read_export)
    name = request.name or export.snapshot.name
    place = await trio.to_thread.run_sync(_stage, store, name, request.disk_directory)
    try:
        receive = partial(_receive, export, source, place, meter)
        files = await trio.to_thread.run_sync(receive)
        manifest = _rewritten(export, store, name, files)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(store.commit, name, manifest)
    except BaseException:
        if name not in store.snapshots():
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_unstage, store, name)
        raise
    return manifest


def notes(manifest: Manifest, qmp: Path) -> tuple[str, ...]:
    """What the person should know before restoring an imported snapshot on this host. Blocks."""
    process = manifest.machine.process
    words = [f"a restore starts {process.exe} as user {process.uid}, as it was on the other host"]
    if not os.path.exists(process.exe):
        words.append(f"{process.exe} is not there: install that QEMU")
    if not any(str(qmp) in word for word in process.argv):
        words.append(
            f"its command line names no monitor at {qmp}, where this VM's is looked for: the "
            "configuration has to name the one it opens"
        )
    return tuple(words)


def remove_leftovers(store: VmStore, before_s: float) -> None:
    """Remove what imports begun before that time have left, by a daemon that was killed. Blocks.

    Raises: StoreError.
    """
    entry = store.journal.read()
    for name in store.partials():
        staging = store.partial_path(name)
        is_import = (staging / RECORD_NAME).exists() or (
            not any(staging.iterdir()) and (entry is None or entry.plan.name != name)
        )
        if is_import and staging.stat().st_ctime < before_s:
            _unstage(store, name)


def _stage(store: VmStore, name: str, disk_directory: str | None) -> _Place:
    """Make the folders, and write down that they are an import's."""
    staging = store.stage(name)
    try:
        above = Path(disk_directory) if disk_directory else store.directory / DISKS_NAME
        if disk_directory is None:
            make_directory(above)
        disks = above / f"{name}-{secrets.token_hex(4)}"
        disks.mkdir(mode=0o700)
        _write_record(staging, disks)
        if disk_directory is not None and os.geteuid() == 0:
            owner = above.stat()
            os.chown(disks, owner.st_uid, owner.st_gid)
        sync_directory(above)
    except OSError as exc:
        _unstage(store, name)
        raise TargetRefused(f"cannot make a folder in {above}: {exc.strerror}") from exc
    return _Place(staging, disks)


def _write_record(staging: Path, disks: Path) -> None:
    fd = create_exclusive(staging / RECORD_NAME)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(_Record(disks=identity(disks)).model_dump_json())
        file.flush()
        sync_file(fd)
    sync_directory(staging)


def _unstage(store: VmStore, name: str) -> None:
    """Remove all that an import has made. Raises: StoreError."""
    try:
        record = _Record.model_validate_json(
            (store.partial_path(name) / RECORD_NAME).read_bytes()
        ).disks
        status = os.stat(record.path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == (record.device, record.inode):
            shutil.rmtree(record.path)
    except (FileNotFoundError, ValidationError):  # gone, or not yet written down
        pass
    except OSError as exc:
        raise StoreError(
            f"cannot remove {exc.filename}: {exc.strerror}", effect=Effect.PARTIAL
        ) from exc
    store.unstage(name)


@dataclass(frozen=True)
class _Received:
    """A file that has arrived, and that it holds what was announced is proven."""

    file: FileIdentity
    allocated_bytes: int


def _receive(
    export: Export, source: Source, place: _Place, meter: Meter
) -> dict[str, _Received]:
    """Copy all files and prove them; durable on return. In a thread of trio's."""
    _require_room(export, place)
    with ExitStack() as closing:
        descriptors: dict[str, int] = {}

        def create(name: str) -> int:
            descriptors[name] = create_exclusive(place.of(name))
            closing.callback(os.close, descriptors[name])
            return descriptors[name]

        meter.begin("copying", export.data_bytes)
        source.copy(export.files(), create, meter.tick)
        for disk in export.disks:
            _check_disk(disk, export.snapshot, descriptors)
        if export.memory is not None:
            meter.begin("checking the memory image", 0)
            _check_memory(export.snapshot, descriptors[MEMORY_NAME])
        owner = place.disks.stat()
        for name, fd in descriptors.items():
            if name != MEMORY_NAME and os.geteuid() == 0:
                os.fchown(fd, owner.st_uid, owner.st_gid)
            sync_file(fd)
        sync_directory(place.disks)
        return {n: _Received(identity(fd), allocated_bytes(fd)) for n, fd in descriptors.items()}


def _require_room(export: Export, place: _Place) -> None:
    memory_bytes = export.memory.data_bytes if export.memory else 0
    disk_bytes = export.data_bytes - memory_bytes
    if place.staging.stat().st_dev == place.disks.stat().st_dev:
        require_space(place.staging, memory_bytes + disk_bytes)
    else:
        require_space(place.staging, memory_bytes)
        require_space(place.disks, disk_bytes)


def _check_disk(disk: ExportedDisk, manifest: Manifest, descriptors: dict[str, int]) -> None:
    """Refuse images that name any file but the next of their own, and of another size."""
    [layer] = [layer for layer in manifest.disks if layer.target == disk.target]
    belows = (*((image.name, image.format) for image in disk.images[1:]), (None, None))
    sizes = []
    for image, below in zip(disk.images, belows, strict=True):
        fd = descriptors[image.name]
        if image.format == "raw":
            named: tuple[str | None, str | None] = (None, None)
            sizes.append(-(-image.size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES)
        else:
            try:
                header = read_header(fd)
            except ImageInvalid as exc:
                raise ImageInvalid(f"{image.name}: {exc}") from exc
            named = header.backing, header.backing_format
            sizes.append(header.virtual_size_bytes)
            if header.has_data_file or header.is_encrypted or header.is_corrupt:
                raise ImageInvalid(
                    f"{image.name} is encrypted, damaged or keeps its data in another file: no "
                    "export holds such an image"
                )
        if named != below:
            raise ImageInvalid(
                f"{image.name} names {named[0]!r} ({named[1]}) as the image below it, it should "
                f"be {below[0]!r} ({below[1]})"
            )
    if sizes[0] != layer.virtual_size_bytes:
        raise ImageInvalid(
            f"{disk.images[0].name} holds a disk of {sizes[0]} bytes, the snapshot has one of "
            f"{layer.virtual_size_bytes}"
        )


def _check_memory(manifest: Manifest, fd: int) -> None:
    if manifest.image_format is None or manifest.strategy is None:
        raise ImageInvalid("the snapshot does not say how its memory image was saved")
    blocks, check = manifest.machine.ram_blocks, trio.from_thread.check_cancelled
    verify_image(fd, manifest.image_format, manifest.strategy, blocks, check)


def _rewritten(
    export: Export, store: VmStore, name: str, files: dict[str, _Received]
) -> Manifest:
    """The manifest as it is true here; pure but for a look at the other snapshots."""
    origin = export.snapshot
    memory = None
    if origin.memory is not None and export.memory is not None:
        memory = MemoryImage(
            path=str(store.path(name) / MEMORY_NAME),
            size_bytes=export.memory.size_bytes,
            allocated_bytes=files[MEMORY_NAME].allocated_bytes,
            sha256=export.memory.sha256,
            holes_are_zero=origin.memory.holes_are_zero,
        )
    disks = zip(origin.disks, export.disks, strict=True)
    return origin.model_copy(
        update={
            "format": 2,
            "name": name,
            "vm": store.vm,
            "parent": origin.parent if origin.parent in store.snapshots() else None,
            "memory": memory,
            "disks": tuple(_layer(disk, exported, files) for disk, exported in disks),
        }
    )


def _layer(disk: DiskLayer, exported: ExportedDisk, files: dict[str, _Received]) -> DiskLayer:
    chain = tuple(files[image.name].file for image in exported.images)
    # Only by their paths: the numbers of another host's files may be those of a file here.
    elsewhere = (*disk.chain, *disk.known_as)
    return disk.model_copy(
        update={
            "frozen": chain[0].path,
            "frozen_format": exported.images[0].format,
            "overlay": None,
            "chain": chain,
            "known_as": tuple(FileIdentity(path=f.path, device=0, inode=0) for f in elsewhere),
        }
    )
