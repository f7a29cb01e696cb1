"""Writing a snapshot to where another host can get it: a folder, or a tar stream.

Only frozen images are read, so nobody notices: not the VM, which may run on overlays over
them, and no other job.
"""

import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from qsnapd.errors import Effect, StoreError, TargetRefused
from qsnapd.image.files import (
    create_directory,
    create_exclusive,
    sync_directory,
    sync_file,
)
from qsnapd.model.transfer import EXPORT_NAME, Export, ExportRequest
from qsnapd.snapshot.intact import require_usable
from qsnapd.snapshot.moving.gathering import Gathering
from qsnapd.snapshot.moving.meter import Meter, Tell
from qsnapd.snapshot.moving.tar_writer import require_writable, write_tar
from qsnapd.store.own_files import is_staged_export
from qsnapd.store.snapshots import VmStore


async def export_snapshot(
    store: VmStore,
    request: ExportRequest,
    *,
    qemu_img: str,
    descriptor: int | None,
    tell: Tell,
) -> Export:
    """Write the snapshot, complete in itself; returns what its `export.json` says.

    Every file is hashed, and the memory image held against the hash that was recorded.
    On failure or cancellation: there is no such folder; a stream ends in the middle.
    Raises: UnknownSnapshot, TargetRefused, StoreFull, WrongState, ImageInvalid, StoreError.
    """
    with store.leases.reading(request.name, "an export"):
        return await _export(store, request, qemu_img, descriptor, Meter(tell))


async def _export(
    store: VmStore, request: ExportRequest, qemu_img: str, descriptor: int | None, meter: Meter
) -> Export:
    manifest = await trio.to_thread.run_sync(store.manifest, request.name)
    require_usable(manifest)
    if request.directory is not None:
        async with _new_folder(Path(request.directory)) as folder:
            with ExitStack() as descriptors:
                work = Gathering(manifest, folder, meter, descriptors, qemu_img)
                export = await work.gather(chained=request.chained, streamed=False)
            await trio.to_thread.run_sync(_write_export, folder, export)
        return export
    if descriptor is None:
        raise TargetRefused("name a directory, or send a descriptor to write the tar stream to")
    require_writable(descriptor)
    staging = store.directory / f".export-{secrets.token_hex(4)}"
    async with _new_folder(staging, temporary=True) as folder:
        with ExitStack() as descriptors:
            work = Gathering(manifest, folder, meter, descriptors, qemu_img)
            export = await work.gather(chained=request.chained, streamed=True)
            await trio.to_thread.run_sync(_write_export, folder, export)
            meter.begin("writing the stream", export.data_bytes)
            names = [EXPORT_NAME, *export.files()]
            await write_tar(folder, names, descriptor, work.linked, meter)
    return export


def remove_leftovers(store: VmStore, before_s: float) -> None:
    """Remove what exports begun before that time have left in the store. Blocks.

    Those of a daemon that was killed: they have left nothing anywhere else that is theirs
    alone to remove. Raises: StoreError.
    """
    try:
        for path in store.directory.iterdir():
            if is_staged_export(path.name) and path.stat().st_ctime < before_s:
                shutil.rmtree(path)
    except OSError as exc:
        raise StoreError(f"cannot remove {exc.filename}: {exc.strerror}") from exc


@asynccontextmanager
async def _new_folder(path: Path, *, temporary: bool = False) -> AsyncIterator[Path]:
    """A folder (0700) that is there after the block if that went well and it is to stay."""
    await trio.to_thread.run_sync(_make_folder, path)
    try:
        yield path
    except BaseException:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove_folder, path)
        raise
    if temporary:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove_folder, path)


def _make_folder(path: Path) -> None:
    try:
        create_directory(path)
    except FileExistsError:
        raise TargetRefused(f"{path} exists already: an export makes a folder of its own") from None
    except OSError as exc:
        raise TargetRefused(f"cannot create the folder {path}: {exc.strerror}") from exc


def _remove_folder(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as exc:
        raise StoreError(
            f"the unfinished export {path} cannot be removed: {exc.strerror}",
            effect=Effect.PARTIAL,
        ) from exc


def _write_export(folder: Path, export: Export) -> None:
    """The last file, which makes the folder an export; all of it is durable on return."""
    descriptor = create_exclusive(folder / EXPORT_NAME)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(export.model_dump_json(indent=1) + "\n")
            file.flush()
            sync_file(descriptor)
        sync_directory(folder)
        sync_directory(folder.parent)
    except OSError as exc:
        raise StoreError(f"cannot write {folder / EXPORT_NAME}: {exc.strerror}") from exc
