"""Punching holes into the images of `precopy`, so that in them, too, a hole is a zero page.

There a page may have been written before it became zero: QEMU then clears its bit and leaves
what it had written, which nobody reads but a mapping.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator

from qsnapd.image.files import sync_file
from qsnapd.image.mapped_ram import Layout, MappedBlock, pages_left_over, read_layout
from qsnapd.image.savevm import never_cancelled, reading

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
"""Modes of fallocate(2)."""
_IMPOSSIBLE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, check_cancelled: Callable[[], object] = never_cancelled) -> bool:
    """Give back every page that the bitmaps leave out; durable on return.

    Preconditions: the image is complete, and was synced; *fd* may write to it.
    On success: every page whose bit is clear reads as zeros. False: this file system cannot
      make holes, nothing changed.
    On failure or cancellation: some are punched; the image loads as it did before.
    Raises: ImageInvalid; StoreError.
    """
    layout = read_layout(fd)
    with reading():
        for start, end in _left_over(fd, layout):
            check_cancelled()
            if not punch_hole(fd, start, end - start):
                return False
        sync_file(fd)
    return True


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Make a hole, of which the size of the file takes no notice.

    Returns whether the file system can. Raises: OSError.
    """
    if _libc.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in _IMPOSSIBLE:
        return False
    raise OSError(number, os.strerror(number))


def _left_over(fd: int, layout: Layout) -> Iterator[tuple[int, int]]:
    """Where pages are in the file, in bytes, that are not in the bitmaps."""
    for block in layout.blocks:
        for first, end in pages_left_over(fd, block):
            yield _offset(block, first), _offset(block, end)


def _offset(block: MappedBlock, page: int) -> int:
    return block.pages_offset_bytes + page * block.page_size_bytes
