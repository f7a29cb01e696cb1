"""Copying files with their holes, hashed on the way."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from qsnapd.errors import ImageInvalid
from qsnapd.image.files import data_extents

CHUNK_BYTES = 1 << 20
_ZEROS = memoryview(bytes(CHUNK_BYTES))

Tick = Callable[[int], object]
"""Called about every millisecond of work with the bytes that were done; cancels by raising."""


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    size_bytes: int
    data_bytes: int
    """Without its holes."""
    sha256: str


class SparseWriter:
    """Fills a new file from its beginning to its end; what is left out is a hole.

    Blocks. The interpreter lock is free while it hashes. Raises: OSError.
    """

    def __init__(self, fd: int | None, tick: Tick) -> None:
        """None: only hash."""
        self._fd = fd
        self._tick = tick
        self._digest = hashlib.sha256()
        self._position = 0
        self._data_bytes = 0

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put *data* at *offset*, which is not before the end of what was written last."""
        self._skip_to(offset)
        self._tick(len(data))
        self._digest.update(data)
        self._position += len(data)
        self._data_bytes += len(data)
        view = memoryview(data)
        while self._fd is not None and view:
            done = os.pwrite(self._fd, view, offset)
            offset, view = offset + done, view[done:]

    def finish(self, size_bytes: int) -> Content:
        """Give the file its size, and tell what it holds."""
        self._skip_to(size_bytes)
        if self._fd is not None:
            os.ftruncate(self._fd, size_bytes)
        return Content(size_bytes, self._data_bytes, self._digest.hexdigest())

    def _skip_to(self, offset: int) -> None:
        if offset < self._position:
            raise ValueError(f"{offset} lies before {self._position}")
        while self._position < offset:
            count = min(CHUNK_BYTES, offset - self._position)
            self._tick(0)
            self._digest.update(_ZEROS[:count])
            self._position += count


def copy_sparse(source_fd: int, target_fd: int | None, size_bytes: int, tick: Tick) -> Content:
    """Copy the first *size_bytes* of a file into an empty one; its holes stay holes.

    None as target: only look. Blocks.
    Raises: ImageInvalid: the source ends before that. OSError.
    """
    writer = SparseWriter(target_fd, tick)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for start, end in data_extents(source_fd, 0, size_bytes):
        position = start
        while position < end:
            count = os.preadv(source_fd, [buffer[: min(CHUNK_BYTES, end - position)]], position)
            if count == 0:
                break
            writer.write(position, buffer[:count])
            position += count
    if os.fstat(source_fd).st_size < size_bytes:
        raise ImageInvalid("a file became shorter while it was copied")
    return writer.finish(size_bytes)


def data_bytes(fd: int) -> int:
    """How much of a file is no hole. Blocks. Raises: OSError."""
    return sum(end - start for start, end in data_extents(fd, 0, os.fstat(fd).st_size))
