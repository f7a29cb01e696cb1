"""SHA-256 of a memory image, as `sha256sum` prints it."""

import hashlib
import os
from collections.abc import Callable, Iterator

from qsnapd.errors import ImageInvalid
from qsnapd.image.files import data_extents
from qsnapd.image.savevm import never_cancelled, reading

_CHUNK_BYTES = 1 << 20  # long enough to work without the interpreter lock, short to cancel
_ZEROS = memoryview(bytes(_CHUNK_BYTES))


def sha256(fd: int, check_cancelled: Callable[[], object] = never_cancelled) -> str:
    """Return the digest of the whole file in hex; holes are hashed without being read.

    *check_cancelled* is called about every millisecond of work, and cancels by raising, as
    `trio.from_thread.check_cancelled` does. The interpreter lock is free meanwhile.
    Raises: StoreError: the disk failed.
    """
    digest = hashlib.sha256()
    with reading():
        for piece in _pieces(fd):
            check_cancelled()
            digest.update(piece)
    return digest.hexdigest()


def _pieces(fd: int) -> Iterator[memoryview]:
    """The content of the file in order; each piece is valid until the next is asked for."""
    size_bytes = os.fstat(fd).st_size
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    position = 0
    for start, end in (*data_extents(fd, 0, size_bytes), (size_bytes, size_bytes)):
        while position < start:
            count = min(_CHUNK_BYTES, start - position)
            yield _ZEROS[:count]
            position += count
        while position < end:
            count = os.preadv(fd, [buffer[: min(_CHUNK_BYTES, end - position)]], position)
            if count == 0:
                raise ImageInvalid(f"the memory image shrank to {position} bytes while it was read")
            yield buffer[:count]
            position += count
