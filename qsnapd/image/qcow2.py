"""The header of a qcow2 image, read without trusting it: what it says of other files.

A guest that took over its QEMU, or whoever sent the file, may have written it. QEMU's own tools
open what a header names; so it is looked at here first. After docs/interop/qcow2.txt.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from qsnapd.errors import ImageInvalid

MAGIC = b"QFI\xfb"
_HEAD = struct.Struct(">4sIQIIQI")
"""Magic, version, where the backing name is and its length, cluster bits, size, encryption."""
_FEATURES = struct.Struct(">Q")
_FEATURES_OFFSET_BYTES = 72
_L1 = struct.Struct(">IQ")
_L1_OFFSET_BYTES = 36
"""How many entries the table of tables has, and where it is."""
_LENGTH = struct.Struct(">I")
_LENGTH_OFFSET_BYTES = 100
_LONGEST_NAME_BYTES = 1023
_LIMIT_BYTES = 1 << 16
"""No header that QEMU writes is longer; the cluster it lies in may be."""
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_BACKING_FORMAT = 0xE2792ACA
_DATA_FILE_NAME = 0x44415441


@dataclass(frozen=True)
class Header:
    """What the header of an image says."""

    virtual_size_bytes: int
    backing: str | None
    """The name of the image below, as it is written there."""
    backing_format: str | None
    is_encrypted: bool
    is_corrupt: bool
    """QEMU found damage and marked it."""
    has_data_file: bool
    """The data is in another file, which the header names."""


def is_qcow2(fd: int) -> bool:
    """Whether the file begins as a qcow2 image does. Raises: OSError."""
    return os.pread(fd, len(MAGIC), 0) == MAGIC


def read_header(fd: int) -> Header:
    """Read what an image says of itself. Blocks.

    Raises: ImageInvalid: it is no qcow2 image, or its header is nonsense. OSError.
    """
    head = os.pread(fd, _LIMIT_BYTES, 0)
    if head[: len(MAGIC)] != MAGIC or len(head) < _LENGTH_OFFSET_BYTES + _LENGTH.size:
        raise ImageInvalid("it is no qcow2 image")
    _, version, name_offset, name_bytes, _, size_bytes, encryption = _HEAD.unpack_from(head)
    if version not in (2, 3):
        raise ImageInvalid(f"it is a qcow2 image of version {version}, known are 2 and 3")
    features = _FEATURES.unpack_from(head, _FEATURES_OFFSET_BYTES)[0] if version == 3 else 0
    length = _LENGTH.unpack_from(head, _LENGTH_OFFSET_BYTES)[0] if version == 3 else 72
    backing = _name(fd, name_offset, name_bytes) if name_offset else None
    # As far as QEMU looks, or the whole of what was read: then they must end within it.
    is_all = 0 < name_offset <= len(head)
    end = name_offset if is_all else len(head)
    extensions = dict(_extensions(head[:end], length, is_all=is_all))
    backing_format = extensions.get(_BACKING_FORMAT)
    return Header(
        virtual_size_bytes=size_bytes,
        backing=backing,
        backing_format=None if backing_format is None else _text(backing_format),
        is_encrypted=encryption != 0,
        is_corrupt=bool(features & _CORRUPT),
        has_data_file=bool(features & _DATA_FILE) or _DATA_FILE_NAME in extensions,
    )


def is_blank(fd: int) -> bool:
    """Whether an image holds nothing itself: all that a guest would read is in those below it.

    Blocks. Raises: ImageInvalid, OSError.
    """
    if read_header(fd).has_data_file:
        return False
    entries, offset = _L1.unpack(os.pread(fd, _L1.size, _L1_OFFSET_BYTES))
    if entries > _LIMIT_BYTES or offset >= 1 << 56:
        return False  # a disk of terabytes, or nonsense
    table = os.pread(fd, 8 * entries, offset)
    return len(table) == 8 * entries and not any(table)


def _name(fd: int, offset: int, length: int) -> str:
    if not 0 < length <= _LONGEST_NAME_BYTES:
        raise ImageInvalid(f"its header has a backing file name of {length} bytes")
    try:
        name = os.pread(fd, length, offset)
    except (OverflowError, OSError):  # EINVAL: it would end behind what a file can hold
        name = b""
    if len(name) < length:
        raise ImageInvalid("its header puts the backing file's name behind the end")
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _extensions(head: bytes, offset: int, *, is_all: bool) -> Iterator[tuple[int, bytes]]:
    while offset + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, offset)
        offset += 8
        if kind == 0:
            return
        if offset + length > len(head):
            raise ImageInvalid("its header is cut off")
        yield kind, head[offset : offset + length]
        offset += -(-length // 8) * 8
    if not is_all:
        raise ImageInvalid("its header has no end within what is read of it")
