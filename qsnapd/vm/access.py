"""What a process of another user may do with files, by the kernel's own judgement.

Nothing is computed from modes: a thread takes that user's place in the file system and asks,
so that groups, ACLs, read-only mounts and folders on the way all count.
"""

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from qsnapd.errors import VmError
from qsnapd.model.snapshot import Process

READ, WRITE, SEARCH = os.R_OK, os.W_OK, os.X_OK
_SETGROUPS = 116
"""The system call on x86-64: glibc's function would change all threads."""


@dataclass(frozen=True)
class Want:
    """One thing to be allowed."""

    path: str
    mode: int
    """READ, WRITE and SEARCH (or execute), or-ed; without SEARCH it must not be a folder."""


def refusals(process: Process, wants: Sequence[Want]) -> list[str | None]:
    """Why a process with *process*'s ids would not get each of *wants*; None: it would.

    Without root's rights this process can start QEMU only as itself, and asks as itself.
    Says nothing about AppArmor, SELinux and mount namespaces. Blocks.
    Raises: VmError: this process cannot take another user's place.
    """
    found: list[str | None] = []
    failed: list[OSError] = []

    def ask() -> None:
        found.extend(_refusal(want) for want in wants)

    if os.geteuid() != 0 or process.uid == 0:
        ask()
        return found

    def ask_as_that_user() -> None:
        # Only this thread changes, and it ends here. The user comes last: with it go the rights.
        libc = ctypes.CDLL(None, use_errno=True)
        groups = (ctypes.c_uint32 * len(process.groups))(*process.groups)
        if libc.syscall(ctypes.c_long(_SETGROUPS), ctypes.c_long(len(groups)), groups) != 0:
            failed.append(OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())))
            return
        libc.setfsgid(process.gid)
        libc.setfsuid(process.uid)
        ask()

    thread = threading.Thread(target=ask_as_that_user, name="asks as another user")
    thread.start()
    thread.join()
    if failed:
        raise VmError(f"cannot ask what user {process.uid} may do: {failed[0]}") from failed[0]
    return found


def _refusal(want: Want) -> str | None:
    try:
        status = os.stat(want.path)
    except OSError as exc:
        return exc.strerror
    if stat.S_ISDIR(status.st_mode) and not want.mode & SEARCH:
        return os.strerror(errno.EISDIR)
    if not os.access(want.path, want.mode, effective_ids=True):
        return "Permission denied"
    return None
