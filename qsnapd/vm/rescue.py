"""Freeing a guest that QEMU has left write-protected. Linux only, from outside of QEMU.

QEMU before 9.0 protects the guest's memory for a background snapshot, and never takes that back
if the snapshot fails or is cancelled: whoever writes to the memory next sleeps for ever, a
virtual CPU, and if it holds QEMU's lock the monitor with it. The kernel lets one who may trace
the process have its userfaultfd, and take the protection back in its stead.

The memory is not changed by that, only the snapshot is lost whose protection it was: whoever
calls this has given it up before.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qsnapd.errors import NothingToRescue, RescueDenied, RescueFailed
from qsnapd.vm.identity import ProcessIdentity, ensure_same, open_pidfd
from qsnapd.vm.proc import proc_errors

# linux/userfaultfd.h; the same on all that Linux numbers its ioctls generically for, x86-64 among
# them: direction, size of the argument, 0xAA, number.
_UFFDIO_UNREGISTER = 0x8010_AA01
_UFFDIO_WAKE = 0x8010_AA02
_UFFDIO_WRITEPROTECT = 0xC018_AA06
_RANGE = struct.Struct("=QQ")
"""struct uffdio_range: start, length."""
_WRITEPROTECT = struct.Struct("=QQQ")
"""struct uffdio_writeprotect: a range, mode. Mode 0 takes the protection back, and wakes."""

_USERFAULTFD = "anon_inode:[userfaultfd]"
_PROTECTED = "uw"
_MISSING = frozenset({"um", "ui"})
"""Pages of such a mapping are still to come, as in a postcopy migration: they are not ours."""

_NOT_OF_THIS_ONE = (errno.EINVAL, errno.ENOENT)
"""The mapping is not registered with that userfaultfd, or with none any more."""
_TRIES = 1000
"""Each is put off while the process changes its mappings."""

_PIDFD_GETFD = ctypes.c_long(438)
"""The number of pidfd_getfd(2), which has no name in Python; the same everywhere but on alpha."""


@dataclass(frozen=True)
class MemoryRange:
    """A mapping of another process."""

    start: int
    length_bytes: int


def protected_memory(identity: ProcessIdentity) -> tuple[MemoryRange, ...]:
    """The memory of that very process whose writers have to wait for a userfaultfd's owner.

    Blocks: it takes as long as the kernel needs to look at all mappings.
    Raises: SessionLost: it has ended. VmError: it is not ours to look into.
    """
    with proc_errors(identity.pid), Path(f"/proc/{identity.pid}/smaps").open("rb") as lines:
        found = tuple(_protected(lines))
    ensure_same(identity)
    return found


def _protected(lines: Iterable[bytes]) -> Iterator[MemoryRange]:
    start = end = 0
    for line in lines:
        first, *rest = line.split()
        if not first.endswith(b":"):  # 7f0000000000-7f0008000000 rw-p 00000000 00:00 0
            start, end = (int(number, 16) for number in first.split(b"-"))
        elif first == b"VmFlags:":
            flags = {flag.decode() for flag in rest}
            if _PROTECTED in flags and not flags & _MISSING:
                yield MemoryRange(start, end - start)


def release_memory(identity: ProcessIdentity) -> tuple[MemoryRange, ...]:
    """Take the write protection of that process's memory back, and wake who waits for that.

    Blocks. Idempotent: cut off anywhere, the next call does the rest.
    Preconditions: the snapshot that the memory is protected for has been given up.
    On success: nothing of its memory is protected any more, and nobody sleeps for it; returns
      what was. QEMU keeps its userfaultfd open, which does no harm.
    On failure: some of it may be free; the guest's memory holds what it held.
    Raises:
      NothingToRescue: none of it is protected; nothing was touched.
      RescueDenied: we have no right to trace the process; nothing was touched.
      RescueFailed: the kernel does not let it be done.
      SessionLost: it has ended. VmError: it is not ours to look into.
    """
    with ExitStack() as opened:
        pidfd = open_pidfd(identity)
        opened.callback(os.close, pidfd)
        ranges = protected_memory(identity)
        if not ranges:
            raise NothingToRescue(
                f"nothing of the memory of QEMU, process {identity.pid}, is write-protected"
            )
        owners = []
        for number in _userfaultfds(identity):
            owners.append(_take(pidfd, number, identity))
            opened.callback(os.close, owners[-1])
        for memory in ranges:
            for owner in owners:
                _release(memory, owner, identity)
        if left := protected_memory(identity):
            raise RescueFailed(
                f"{len(left)} mappings of QEMU, process {identity.pid}, stay write-protected: "
                "whose userfaultfd that is cannot be told"
            )
    return ranges


def _userfaultfds(identity: ProcessIdentity) -> list[int]:
    """Numbers that its userfaultfds have in that process."""
    numbers = []
    with proc_errors(identity.pid):
        links = [f"/proc/{identity.pid}/fd/{fd}" for fd in os.listdir(f"/proc/{identity.pid}/fd")]
    for link in links:
        try:
            if os.readlink(link) == _USERFAULTFD:
                numbers.append(int(os.path.basename(link)))
        except FileNotFoundError:
            continue  # closed meanwhile
    ensure_same(identity)
    return numbers


def _take(pidfd: int, number: int, identity: ProcessIdentity) -> int:
    """Our own descriptor of what *number* is in that process."""
    libc = ctypes.CDLL(None, use_errno=True)
    taken: int = libc.syscall(_PIDFD_GETFD, ctypes.c_long(pidfd), ctypes.c_long(number), 0)
    if taken >= 0:
        return taken
    failure = ctypes.get_errno()
    if failure in (errno.EPERM, errno.EACCES):
        raise RescueDenied(
            f"qsnapd may not take QEMU's userfaultfd (process {identity.pid}): run it as root, "
            "with CAP_SYS_PTRACE"
        )
    raise RescueFailed(
        f"QEMU's userfaultfd (process {identity.pid}) cannot be had: {os.strerror(failure)}"
    )


def _release(memory: MemoryRange, owner: int, identity: ProcessIdentity) -> None:
    """Free one mapping, if it is *owner* that it is registered with."""
    whole = (memory.start, memory.length_bytes)
    if _tell(owner, _UFFDIO_WRITEPROTECT, _WRITEPROTECT.pack(*whole, 0), identity):
        _tell(owner, _UFFDIO_UNREGISTER, _RANGE.pack(*whole), identity)
        _tell(owner, _UFFDIO_WAKE, _RANGE.pack(*whole), identity)


def _tell(owner: int, request: int, argument: bytes, identity: ProcessIdentity) -> bool:
    """Do one ioctl; returns whether the mapping is one of that userfaultfd's."""
    for _ in range(_TRIES):
        try:
            fcntl.ioctl(owner, request, argument)
        except OSError as exc:
            if exc.errno == errno.EAGAIN:
                continue
            if exc.errno in _NOT_OF_THIS_ONE:
                return False
            raise RescueFailed(
                f"the memory of QEMU, process {identity.pid}, cannot be released: {exc.strerror}"
            ) from exc
        return True
    raise RescueFailed(
        f"the memory of QEMU, process {identity.pid}, cannot be released: it goes on changing "
        "its mappings"
    )
