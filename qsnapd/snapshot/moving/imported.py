"""Making an exported snapshot one of a VM's own.

It is staged like a checkpoint and committed by the same rename. The images of its disks lie in
a folder of their own, so that overlays over them never get into a snapshot's folder.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import (
    Effect,
    ImageInvalid,
    ManifestInvalid,
    QsnapError,
    StoreError,
    TargetRefused,
)
from qsnapd.image.files import (
    allocated_bytes,
    create_directory,
    create_exclusive,
    identity,
    make_directory,
    require_space,
    sync_file,
)
from qsnapd.image.qcow2 import read_header
from qsnapd.model.base import Frozen
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest, MemoryImage
from qsnapd.model.transfer import MEMORY_NAME, Export, ExportedDisk, ImportRequest
from qsnapd.snapshot.moving.meter import Meter, Tell
from qsnapd.snapshot.moving.sources import Folder, Source, Stream, require_readable
from qsnapd.snapshot.taking.finish import verify_image
from qsnapd.store.made import by_path
from qsnapd.store.record import Record
from qsnapd.store.snapshots import VmStore

RECORD_NAME = ".import.json"
"""In the snapshot's folder: where the images of its disks are."""
DISKS_NAME = ".disks"
"""In a VM's part of the store: the images of imported disks, unless they were put elsewhere."""
_SECTOR_BYTES = 512
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class _Made(Frozen):
    disks: FileIdentity
    """The folder for the disks; its inode is 0 until it is surely there."""


@dataclass(frozen=True)
class _Place:
    """Where the files go that are being imported."""

    staging: Path
    disks: Path
    disks_fd: int
    """The folder itself: it may lie where the VM's user can put another under its name."""

    def create(self, name: str) -> int:
        if name == MEMORY_NAME:
            return create_exclusive(self.staging / name)
        return create_exclusive(Path(name), dir_fd=self.disks_fd)


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
        await trio.to_thread.run_sync(_note_made, export, store, files)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(store.commit, name, manifest)
    except BaseException:
        if name not in store.snapshots():
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_unstage, store, name)
        raise
    finally:
        os.close(place.disks_fd)
    return manifest


def _note_made(export: Export, store: VmStore, files: "dict[str, _Received]") -> None:
    for image in (image for disk in export.disks for image in disk.images):
        store.made.add([files[image.name].file], image_format=image.format)


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

    All that was begun and that no journal tells of is one's, of a whole snapshot or of a record.
    Preconditions: what a renaming has left is finished.

    Raises: StoreError.
    """
    entry = store.journal.read()
    for name in store.partials():
        if entry is not None and entry.plan.name == name:
            continue
        staging = store.partial_path(name)
        with _failing(f"look into {staging}"):
            is_old = staging.stat().st_ctime < before_s
        if is_old:
            _unstage(store, name)


def _stage(store: VmStore, name: str, disk_directory: str | None) -> _Place:
    """Make the folders, and write down that they are an import's."""
    staging = store.stage(name)
    above = Path(disk_directory) if disk_directory else store.directory / DISKS_NAME
    try:
        if disk_directory is None:
            make_directory(above)
        disks = above / f"{name}-{secrets.token_hex(4)}"
        with ExitStack() as closing:
            above_fd = os.open(above, _FOLDER)
            closing.callback(os.close, above_fd)
            _write_record(staging, by_path(str(disks)))
            with ExitStack() as made:
                disks_fd = _make_folder(disks.name, above_fd, made)
                _write_record(staging, identity(disks_fd))
                if disk_directory is not None and os.geteuid() == 0:
                    _give_like(above_fd, disks_fd)
                os.fsync(above_fd)
                made.pop_all()
    except OSError as exc:
        _unstage(store, name)
        raise TargetRefused(f"cannot make a folder in {above}: {exc.strerror}") from exc
    except QsnapError:
        _unstage(store, name)
        raise
    return _Place(staging, disks, disks_fd)


def _make_folder(name: str, above_fd: int, made: ExitStack) -> int:
    """Make a folder (0700) and open it; *made* takes that back."""
    create_directory(name, dir_fd=above_fd)
    made.callback(_remove_empty, name, above_fd)
    disks_fd = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above_fd)
    made.callback(os.close, disks_fd)
    return disks_fd


def _remove_empty(name: str, above_fd: int) -> None:
    with suppress(OSError):
        os.rmdir(name, dir_fd=above_fd)


def _give_like(above_fd: int, fd: int) -> None:
    """Make the folder just made belong to whom the one above it does.

    Raises: TargetRefused: it is not the one that was made. OSError.
    """
    owner, status = os.fstat(above_fd), os.fstat(fd)
    if (status.st_uid, status.st_gid) == (owner.st_uid, owner.st_gid):
        return
    if status.st_uid != 0 or status.st_dev != owner.st_dev or os.listdir(fd):
        raise TargetRefused("somebody has put another folder in the place of the one just made")
    os.fchown(fd, owner.st_uid, owner.st_gid)


def _record(staging: Path) -> Record[_Made]:
    return Record(staging / RECORD_NAME, _Made)


def _write_record(staging: Path, disks: FileIdentity) -> None:
    _record(staging).write(_Made(disks=disks))


def _unstage(store: VmStore, name: str) -> None:
    """Remove all that an import has made; durable on return. Raises: StoreError."""
    try:
        made = _record(store.partial_path(name)).read()
    except ManifestInvalid:
        made = None  # it was not written to its end: nothing was made yet
    if made is not None:
        try:
            _remove_disks(made.disks)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as exc:
            raise StoreError(
                f"cannot remove {exc.filename}: {exc.strerror}", effect=Effect.PARTIAL
            ) from exc
    store.unstage(name)


def _remove_disks(made: FileIdentity) -> None:
    above, folder = os.path.split(made.path)
    above_fd = os.open(above, _FOLDER)
    try:
        with suppress(FileNotFoundError):
            if os.stat(folder, dir_fd=above_fd, follow_symlinks=False).st_ino == made.inode:
                shutil.rmtree(folder, dir_fd=above_fd)
            elif made.inode == 0:  # nothing was put there yet
                os.rmdir(folder, dir_fd=above_fd)
        os.fsync(above_fd)
    finally:
        os.close(above_fd)


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
            descriptors[name] = place.create(name)
            closing.callback(os.close, descriptors[name])
            return descriptors[name]

        meter.begin("copying", export.data_bytes)
        source.copy(export.files(), create, meter.tick)
        for disk in export.disks:
            _check_disk(disk, export.snapshot, descriptors)
        if export.memory is not None:
            meter.begin("checking the memory image", 0)
            _check_memory(export.snapshot, descriptors[MEMORY_NAME])
        with _failing(f"finish the files in {place.disks}"):
            owner = os.fstat(place.disks_fd)
            for name, fd in descriptors.items():
                if name != MEMORY_NAME and os.geteuid() == 0:
                    os.fchown(fd, owner.st_uid, owner.st_gid)
                sync_file(fd)
            os.fsync(place.disks_fd)
        return {n: _Received(identity(fd), allocated_bytes(fd)) for n, fd in descriptors.items()}


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(f"cannot {what}: {exc.strerror}") from exc


def _require_room(export: Export, place: _Place) -> None:
    memory_bytes = export.memory.data_bytes if export.memory else 0
    disk_bytes = export.data_bytes - memory_bytes
    with _failing(f"look at {place.staging}"):
        is_one_system = place.staging.stat().st_dev == os.fstat(place.disks_fd).st_dev
    if is_one_system:
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
                with _failing(f"read {image.name}"):
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
