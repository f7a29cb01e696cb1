"""Room for a memory image, taken before it is written: nobody else fills the disk meanwhile.

The blocks are given to the file without being written. To whoever asks, they are a hole until
they are (ext4, xfs, btrfs and tmpfs were looked at): what sealing reads stays true.
"""

import ctypes
import errno
import os
from collections.abc import Callable

from qsnapd.errors import StoreError, StoreFull
from qsnapd.image.files import data_extents, free_bytes
from qsnapd.image.punch import punch_hole

_KEEP_SIZE = 0x01
"""Mode of fallocate(2)."""
_IMPOSSIBLE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def reserve(fd: int, size_bytes: int, where: str) -> bool:
    """Have room for the first *size_bytes* of a file, whose size stays as it is. Blocks.

    On failure: some of it may be reserved; it goes with the file.
    Returns whether the file system can. Raises: StoreFull; StoreError.
    """
    if _libc.fallocate(fd, _KEEP_SIZE, 0, size_bytes) == 0:
        return True
    number = ctypes.get_errno()
    if number in _IMPOSSIBLE:
        return False
    if number in _FULL:
        raise StoreFull(where, needed_bytes=size_bytes, free_bytes=free_bytes(fd))
    raise StoreError(f"cannot reserve room for {where}: {os.strerror(number)}")


def give_back(fd: int, check: Callable[[], object]) -> None:
    """Give back what was reserved and is not used. Blocks.

    Preconditions: the file is complete, and was synced.
    On success: it occupies what it holds.
    Raises: StoreError; what *check* raises, which is called for every part of it.
    """
    try:
        size_bytes = os.fstat(fd).st_size
        end = 0
        for start, stop in (*data_extents(fd, 0, size_bytes), (size_bytes, size_bytes)):
            check()
            if start > end and not punch_hole(fd, end, start - end):
                break
            end = stop
        os.ftruncate(fd, size_bytes)  # frees what lies behind the end
    except OSError as exc:
        raise StoreError(f"cannot give back what was reserved: {exc.strerror}") from exc
