"""Ways to spoil a snapshot, each for the length of a block: what is restored must notice."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from qsnapd.image.mapped_ram import read_layout
from qsnapd.model.snapshot import ImageFormat, Manifest

Spoilt = AbstractContextManager[None]
KIB = 1 << 10

# qcow2's header (docs/interop/qcow2.txt): where a field begins, and its bytes.
BACKING_OFFSET, BACKING_SIZE, VIRTUAL_SIZE, INCOMPATIBLE = (8, 8), (16, 4), (24, 8), (72, 8)
_CORRUPT = 2
_SPARE_BYTES = 32 * KIB
"""Within the first cluster of a qcow2 file, behind everything that is there."""


@contextmanager
def missing(path: Path) -> Iterator[None]:
    aside = path.rename(path.with_name(f"{path.name}.aside"))
    try:
        yield
    finally:
        aside.rename(path)


@contextmanager
def replaced(path: Path, by: Path | None = None) -> Iterator[None]:
    """Let another file be there: *by*, or a copy."""
    with missing(path):
        shutil.copyfile(by or path.with_name(f"{path.name}.aside"), path)
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def emptied_folder(path: Path) -> Iterator[None]:
    """Let a folder be there."""
    with missing(path):
        path.mkdir()
        try:
            yield
        finally:
            path.rmdir()


@contextmanager
def written(path: Path, *pieces: tuple[int, bytes]) -> Iterator[None]:
    """Let other bytes be at some places of the same file; a place below 0 is from its end."""
    size_bytes = path.stat().st_size
    fd = os.open(path, os.O_RDWR)
    before: list[tuple[int, bytes]] = []
    try:
        for place, data in pieces:
            offset = place if place >= 0 else size_bytes + place
            before.append((offset, os.pread(fd, len(data), offset)))
            os.pwrite(fd, data, offset)
        yield
    finally:
        for offset, data in reversed(before):
            os.pwrite(fd, data, offset)
        os.close(fd)


@contextmanager
def resized(path: Path, by_bytes: int) -> Iterator[None]:
    """Let the same file be shorter, or longer."""
    size_bytes = path.stat().st_size
    end = b""
    with path.open("rb+") as file:
        if by_bytes < 0:
            file.seek(by_bytes, os.SEEK_END)
            end = file.read()
        file.truncate(size_bytes + by_bytes)
    try:
        yield
    finally:
        with path.open("rb+") as file:
            file.truncate(size_bytes)
            if end:
                file.seek(by_bytes, os.SEEK_END)
                file.write(end)


@contextmanager
def mode(path: Path, bits: int) -> Iterator[None]:
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


@contextmanager
def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Let a manifest say something else."""
    text = path.read_text()
    tree = json.loads(text)
    change(tree)
    path.write_text(json.dumps(tree))
    try:
        yield
    finally:
        path.write_text(text)


def field(name: tuple[int, int], value: int) -> tuple[int, bytes]:
    """One field of a qcow2 header, to be `written`."""
    offset, size = name
    return offset, value.to_bytes(size, "big")


def marked_corrupt(path: Path) -> Spoilt:
    return written(path, field(INCOMPATIBLE, _CORRUPT))


def over(path: Path, backing: Path | None) -> Spoilt:
    """Let a qcow2 file be an overlay over another file, or over none."""
    if backing is None:
        return written(path, field(BACKING_OFFSET, 0), field(BACKING_SIZE, 0))
    name = os.fsencode(backing)
    place = (_SPARE_BYTES, name)
    return written(
        path, place, field(BACKING_OFFSET, _SPARE_BYTES), field(BACKING_SIZE, len(name))
    )


def spoilt_page(manifest: Manifest) -> Spoilt:
    """Spoil what the memory image says about one page: its bit, or its record."""
    assert manifest.memory is not None
    path = Path(manifest.memory.path)
    if manifest.image_format is ImageFormat.MAPPED_RAM:
        with path.open("rb") as file:
            [block] = [b for b in read_layout(file.fileno()).blocks if b.id == "pc.ram"]
            file.seek(block.bitmap_offset_bytes)
            bitmap = file.read(block.bitmap_size_bytes)
        empty = bitmap.index(0)
        return written(path, (block.bitmap_offset_bytes + empty, b"\xff"))
    start = path.read_bytes()[: 64 * KIB]
    record = start.index(b"\x06pc.ram", start.index(b"\x06pc.ram") + 1) - 8
    return written(path, (record, b"\xff" * 8))


def spoilt_block(manifest: Manifest, data: bytes) -> Spoilt:
    """Write over the name and the size of the first block in the table of RAM blocks."""
    assert manifest.memory is not None
    path = Path(manifest.memory.path)
    start = path.read_bytes()[: 64 * KIB]
    return written(path, (start.index(b"\x06pc.ram"), data))


def spoilt_device(manifest: Manifest) -> Spoilt:
    """Spoil the state of one device, where nobody but QEMU can tell."""
    assert manifest.memory is not None
    path = Path(manifest.memory.path)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        offset = file.seek(max(0, size_bytes - 1024 * KIB))
        end = file.read()
    # A section's name behind its length, an instance and a version: the latter becomes absurd.
    place = end.index(b"\x04\x00\x00\x00", end.index(b"mc146818rtc") - 6)
    name = end.index(b"mc146818rtc", place)
    return written(path, (offset + name + len(b"mc146818rtc") + 4, b"\x7f\xff\xff\xff"))
