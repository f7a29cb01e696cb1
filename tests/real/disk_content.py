"""What a disk holds, read from its files by a few lines of our own: no QEMU, no qsnapd.

After docs/interop/qcow2.txt. Only what these tests' images have: no compression, no snapshots
inside, no extended L2.
"""

import os
import struct
from pathlib import Path

_HEAD = struct.Struct(">4sIQIIQIIQ")
_OFFSET = 0x00FF_FFFF_FFFF_FE00
_COMPRESSED, _ZERO = 1 << 62, 1


def chain_of(image: Path) -> list[Path]:
    """The image and all below it, by the headers, newest first."""
    chain = [image]
    while (below := _backing(chain[-1])) is not None:
        chain.append(below)
        assert len(chain) < 1000, f"the chain of {image} goes in a circle"
    return chain


def read_disk(image: Path) -> bytes:
    """All that a guest would read."""
    return _read(image, _size_bytes(image))


def _read(image: Path, size_bytes: int) -> bytes:
    with image.open("rb") as file:
        head = file.read(_HEAD.size)
        if head[:4] != b"QFI\xfb":
            file.seek(0)
            return file.read(size_bytes).ljust(size_bytes, b"\0")
        _, _, _, _, bits, virtual_bytes, _, l1_entries, l1_offset = _HEAD.unpack(head)
        below = _backing(image)
        content = bytearray(_read(below, size_bytes) if below else bytes(size_bytes))
        cluster_bytes = 1 << bits
        per_table = cluster_bytes // 8
        l1 = _table(file.fileno(), l1_offset, l1_entries)
        for number in range(-(-virtual_bytes // cluster_bytes)):
            table = l1[number // per_table] & _OFFSET
            if not table:
                continue
            [entry] = _table(file.fileno(), table + 8 * (number % per_table), 1)
            at = number * cluster_bytes
            end = min(at + cluster_bytes, size_bytes)
            assert not entry & _COMPRESSED, f"{image} has compressed clusters"
            if entry & _ZERO:
                content[at:end] = bytes(end - at)
            elif entry & _OFFSET:
                data = os.pread(file.fileno(), end - at, entry & _OFFSET)
                content[at:end] = data.ljust(end - at, b"\0")  # a file may end in a cluster
        return bytes(content)


def _table(fd: int, offset: int, entries: int) -> tuple[int, ...]:
    return struct.unpack(f">{entries}Q", os.pread(fd, 8 * entries, offset))


def _size_bytes(image: Path) -> int:
    with image.open("rb") as file:
        head = file.read(_HEAD.size)
    return _HEAD.unpack(head)[5] if head[:4] == b"QFI\xfb" else image.stat().st_size


def _backing(image: Path) -> Path | None:
    with image.open("rb") as file:
        head = file.read(_HEAD.size)
        if head[:4] != b"QFI\xfb":
            return None
        _, _, offset, length, *_ = _HEAD.unpack(head)
        name = os.pread(file.fileno(), length, offset).decode() if offset else ""
    return image.parent / name if name else None
