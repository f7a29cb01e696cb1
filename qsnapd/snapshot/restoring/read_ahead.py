"""Bringing a mapped memory image into the page cache while its guest already runs.

Nothing depends on it: a page that is not there yet is read when the guest touches it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import trio

from qsnapd.errors import StoreError
from qsnapd.image.files import data_extents

PIECE_BYTES = 8 << 20
LIMIT_BYTES_PER_S = 256 << 20
"""Leaves a disk time for what the guest asks for meanwhile."""


async def read_ahead(image: Path, *, limit_bytes_per_s: int = LIMIT_BYTES_PER_S) -> int:
    """Have the kernel read all that *image* holds, in the order of the file; holes cost nothing.

    Returns how many bytes that is; the last of them may still be on their way.
    Cancellation: stops at the next piece; what was read stays in the page cache.
    Raises: StoreError: the image cannot be read.
    """
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            extents = _pieces(data_extents(fd, 0, os.fstat(fd).st_size))
            asked_bytes = 0
            next_at_s = trio.current_time()
            while piece_bytes := await trio.to_thread.run_sync(_ask_for_one, fd, extents):
                asked_bytes += piece_bytes
                next_at_s += piece_bytes / limit_bytes_per_s
                await trio.sleep_until(next_at_s)
            return asked_bytes
        finally:
            os.close(fd)
    except OSError as exc:
        raise StoreError(f"cannot read {image} ahead: {exc.strerror}") from exc


def _ask_for_one(fd: int, pieces: Iterator[tuple[int, int]]) -> int:
    """Ask the kernel for about one piece; returns its size, 0 at the end. Blocks."""
    asked_bytes = 0
    while asked_bytes < PIECE_BYTES:  # there may be many small ones
        piece = next(pieces, None)
        if piece is None:
            break
        start, end = piece
        os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)
        asked_bytes += end - start
    return asked_bytes


def _pieces(extents: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in extents:
        for offset in range(start, end, PIECE_BYTES):
            yield offset, min(offset + PIECE_BYTES, end)
