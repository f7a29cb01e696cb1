"""Getting the files of an export together: the memory image, and the disks' images.

What can be taken as it is, is; a tar stream then reads the store's own file through a link.
"""

import os
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio
from pydantic import ValidationError

from qsnapd.errors import ImageInvalid, StoreError, WrongState
from qsnapd.image.files import allocated_bytes, create_exclusive, require_space, sync_file
from qsnapd.image.sparse import Content, copy_sparse
from qsnapd.model.snapshot import DiskLayer, Manifest, MemoryImage
from qsnapd.model.transfer import (
    FILE_LIMIT_BYTES,
    MEMORY_NAME,
    Export,
    ExportedDisk,
    ExportedFile,
    ExportedImage,
)
from qsnapd.snapshot.moving.beside import with_watcher
from qsnapd.snapshot.moving.disk_images import Layer, copy_raw, flatten, open_chain, set_backing
from qsnapd.snapshot.moving.meter import Meter
from qsnapd.snapshot.taking.finish import verify_image

_HEADER_BYTES = 1 << 20
"""Room for what qemu-img writes beside the data of a disk."""
_LOOK_EVERY_S = 0.25
_TARGET = re.compile(r"[a-z][a-z0-9-]{0,60}")
"""What a file can be named after; all other disks are counted."""


class Gathering:
    """Gathers the files of one export; used once."""

    def __init__(
        self, manifest: Manifest, folder: Path, meter: Meter, descriptors: ExitStack, qemu_img: str
    ) -> None:
        self._manifest = manifest
        self._folder = folder
        self._meter = meter
        self._descriptors = descriptors
        self._qemu_img = qemu_img
        self._streamed = False
        self.linked: list[int] = []
        """Descriptors that symbolic links in the folder lead to: what needs no copy for tar."""

    async def gather(self, *, chained: bool, streamed: bool) -> Export:
        """Put all files into the folder, or links to them if a tar stream is made of it.

        Every file is hashed. On failure or cancellation: the folder holds some of it.
        Raises: ImageInvalid, WrongState, StoreFull, StoreError.
        """
        self._streamed = streamed
        manifest = self._manifest
        open_all = partial(_open_all, manifest, self._descriptors)
        memory, chains = await trio.to_thread.run_sync(open_all)
        room = partial(self._require_room, memory, chains, chained=chained)
        await trio.to_thread.run_sync(room)
        exported_memory = None
        if memory is not None:
            exported_memory = await self._memory(*memory)
        disks = []
        copy = self._chain if chained else self._flat
        try:
            for stem, disk, layers in zip(_stems(manifest), manifest.disks, chains, strict=True):
                images = await copy(stem, disk, layers)
                disks.append(ExportedDisk(target=disk.target, images=images))
            return Export(
                exported_at=datetime.now(UTC),
                snapshot=manifest,
                memory=exported_memory,
                disks=tuple(disks),
            )
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]["msg"]
            raise WrongState(f"snapshot {manifest.name} cannot be exported: {first}") from exc

    def _require_room(
        self,
        memory: tuple[MemoryImage, int] | None,
        chains: list[tuple[Layer, ...]],
        *,
        chained: bool,
    ) -> None:
        needed_bytes = 0
        if memory is not None and not self._streamed:
            needed_bytes += min(memory[0].allocated_bytes, memory[0].size_bytes)
        for disk, layers in zip(self._manifest.disks, chains, strict=True):
            _require_fitting(disk, layers)
            data = [layer.data_bytes for layer in layers if not chained or self._is_copied(layer)]
            most = sum(data) if chained else min(sum(data), disk.virtual_size_bytes)
            needed_bytes += most + len(data) * _HEADER_BYTES
        require_space(self._folder, needed_bytes)

    def _is_copied(self, layer: Layer) -> bool:
        """Whether a tar stream cannot take the file itself."""
        rewritten = layer.header is not None and layer.header.backing is not None
        return not self._streamed or layer.is_device or rewritten

    async def _memory(self, memory: MemoryImage, fd: int) -> ExportedFile:
        self._meter.begin("memory", memory.allocated_bytes)
        if memory.sha256 is None:
            await trio.to_thread.run_sync(_verify, self._manifest, fd)
        content = await self._take(fd, memory.size_bytes, MEMORY_NAME)
        if memory.sha256 not in (None, content.sha256):
            raise ImageInvalid(
                f"the memory image {memory.path} is not what it was when the snapshot was taken: "
                "its SHA-256 differs"
            )
        return ExportedFile(**vars(content))

    async def _flat(
        self, stem: str, disk: DiskLayer, layers: tuple[Layer, ...]
    ) -> tuple[ExportedImage, ...]:
        name = f"{stem}.qcow2"
        target = await self._create(name)
        convert = partial(flatten, layers, target, qemu_img=self._qemu_img)
        await self._watching(f"disk {disk.target}", layers, target, convert)
        content = await self._seal(target)
        return (ExportedImage(name=name, format="qcow2", **vars(content)),)

    async def _chain(
        self, stem: str, disk: DiskLayer, layers: tuple[Layer, ...]
    ) -> tuple[ExportedImage, ...]:
        names = [_name(stem, depth, layer) for depth, layer in enumerate(layers)]
        images = []
        for depth, (name, layer) in enumerate(zip(names, layers, strict=True)):
            below = (names[depth + 1], layers[depth + 1]) if depth + 1 < len(layers) else None
            content = await self._layer(disk, layer, name, below)
            images.append(ExportedImage(name=name, format=layer.format, **vars(content)))
        return tuple(images)

    async def _layer(
        self, disk: DiskLayer, layer: Layer, name: str, below: tuple[str, Layer] | None
    ) -> Content:
        step = f"disk {disk.target}"
        if layer.is_device:
            target = await self._create(name)
            convert = partial(copy_raw, layer, target, qemu_img=self._qemu_img)
            await self._watching(step, [layer], target, convert)
            return await self._seal(target)
        size_bytes = os.fstat(layer.fd).st_size
        self._meter.begin(step, layer.data_bytes)
        if below is None:
            return await self._take(layer.fd, size_bytes, name)
        target = await self._create(name)
        copy = partial(copy_sparse, layer.fd, target, size_bytes, self._meter.tick)
        await trio.to_thread.run_sync(_failing_at, layer.path, copy)
        await set_backing(layer, target, below[0], below[1].format, qemu_img=self._qemu_img)
        return await self._seal(target)

    async def _take(self, fd: int, size_bytes: int, name: str) -> Content:
        """Have the file as it is: copied, or linked to and only looked at."""
        target = None
        if self._streamed:
            try:
                (self._folder / name).symlink_to(f"/proc/self/fd/{fd}")
            except OSError as exc:
                raise StoreError(f"cannot make {self._folder / name}: {exc.strerror}") from exc
            self.linked.append(fd)
        else:
            target = await self._create(name)
        copy = partial(copy_sparse, fd, target, size_bytes, self._meter.tick)
        content = await trio.to_thread.run_sync(_failing_at, name, copy)
        if target is not None:
            await trio.to_thread.run_sync(sync_file, target)
        return content

    async def _seal(self, target: int) -> Content:
        """Sync and hash a file that is complete."""
        await trio.to_thread.run_sync(sync_file, target)
        size_bytes = os.fstat(target).st_size
        self._meter.begin("checksum", size_bytes)
        look = partial(copy_sparse, target, None, size_bytes, self._meter.tick)
        return await trio.to_thread.run_sync(_failing_at, "a copied disk", look)

    async def _create(self, name: str) -> int:
        descriptor = await trio.to_thread.run_sync(create_exclusive, self._folder / name)
        self._descriptors.callback(os.close, descriptor)
        return descriptor

    async def _watching(
        self,
        step: str,
        layers: Sequence[Layer],
        target: int,
        work: Callable[[], Awaitable[None]],
    ) -> None:
        """Tell meanwhile how large the file has become that *work* lets a program write."""
        self._meter.begin(step, sum(layer.data_bytes for layer in layers))

        async def look() -> None:
            while True:
                await trio.sleep(_LOOK_EVERY_S)
                self._meter.reached(allocated_bytes(target))

        await with_watcher(look, work)


def _open_all(
    manifest: Manifest, descriptors: ExitStack
) -> tuple[tuple[MemoryImage, int] | None, list[tuple[Layer, ...]]]:
    memory = None
    if manifest.memory is not None:
        memory = manifest.memory, _open_memory(manifest.memory)
        descriptors.callback(os.close, memory[1])
    return memory, [open_chain(disk, descriptors) for disk in manifest.disks]


def _open_memory(memory: MemoryImage) -> int:
    try:
        fd = os.open(memory.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageInvalid(
            f"the memory image {memory.path} cannot be opened: {exc.strerror}"
        ) from exc
    if (size_bytes := os.fstat(fd).st_size) != memory.size_bytes:
        os.close(fd)
        raise ImageInvalid(
            f"the memory image {memory.path} has {size_bytes} bytes, it was saved with "
            f"{memory.size_bytes}"
        )
    return fd


def _verify(manifest: Manifest, fd: int) -> None:
    assert manifest.image_format is not None, "a snapshot with memory says how it was saved"
    assert manifest.strategy is not None, "a snapshot with memory says how it was saved"
    check = trio.from_thread.check_cancelled
    blocks = manifest.machine.ram_blocks
    verify_image(fd, manifest.image_format, manifest.strategy, blocks, check)


def _stems(manifest: Manifest) -> list[str]:
    """How the files of each disk begin."""
    return [
        f"disk-{disk.target if _TARGET.fullmatch(disk.target) else index}"
        for index, disk in enumerate(manifest.disks)
    ]


def _name(stem: str, depth: int, layer: Layer) -> str:
    below = f".base{depth}" if depth else ""
    return f"{stem}{below}.{layer.format}"


def _require_fitting(disk: DiskLayer, layers: tuple[Layer, ...]) -> None:
    """Refuse what an export cannot describe, before anything is copied. Blocks."""
    try:
        largest_bytes = max(os.lseek(layer.fd, 0, os.SEEK_END) for layer in layers)
    except OSError as exc:
        raise StoreError(f"disk {disk.target}: its images cannot be read: {exc.strerror}") from exc
    if max(largest_bytes, disk.virtual_size_bytes) > FILE_LIMIT_BYTES:
        raise WrongState(
            f"disk {disk.target} is larger than {FILE_LIMIT_BYTES >> 40} TiB: it cannot be exported"
        )


def _failing_at(what: str, work: "partial[Content]") -> Content:
    try:
        return work()
    except OSError as exc:
        raise StoreError(f"cannot copy {what}: {exc.strerror}") from exc
