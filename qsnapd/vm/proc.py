"""What /proc tells about one process. Linux only.

Reading it never waits, so these functions are plain ones.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qsnapd.errors import SessionLost, VmError

_START_TIME_FIELD = 22
"""Of /proc/PID/stat, counted from 1 as proc(5) does."""

FileKey = tuple[int, int]
"""Device and inode."""

TOKEN_VARIABLE = "QSNAPD_TOKEN"
"""In the environment of a QEMU that qsnapd has started: which plan it was started by."""
ARGV_VARIABLE = "QSNAPD_ARGV"
"""The same: the words (JSON) it would have been started with, had its RAM not been mapped."""


@contextmanager
def proc_errors(pid: int) -> Iterator[None]:
    """Turn what reading /proc/PID can raise into SessionLost and VmError."""
    try:
        yield
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise SessionLost(f"QEMU, process {pid}, has ended") from exc
    except PermissionError as exc:
        raise VmError(
            f"qsnapd may not look into QEMU's process {pid}: let it run as root, or as the "
            "user that QEMU runs as"
        ) from exc
    except (OSError, ValueError) as exc:  # e.g. a path that is too long, or not UTF-8
        raise VmError(f"QEMU, process {pid}, cannot be looked into: {exc}") from exc


def start_time_ticks(pid: int) -> int:
    """When the process began, since the host booted. Raises: SessionLost: there is none."""
    with proc_errors(pid):
        # Field 2, the name, is in parentheses and may hold anything, ")" included.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[_START_TIME_FIELD - 3])


def status_of(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status by their names. Raises: SessionLost: it is gone."""
    with proc_errors(pid):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def resident_bytes(pid: int) -> int:
    """The memory that would be free without this process: what is its own, not its files'.

    Raises: SessionLost: there is none.
    """
    status = status_of(pid)
    # Neither is there while a process ends, when its memory is being freed.
    sizes = (status.get(name, "0 kB") for name in ("RssAnon", "RssShmem"))
    return sum(int(size.split()[0]) << 10 for size in sizes)


def open_files(pid: int) -> dict[FileKey, str]:
    """The regular files and block devices that a process has open, with their names.

    The names are the kernel's, of this moment: absolute, without symbolic links, and with
    " (deleted)" behind those that lead nowhere any more.

    Raises: SessionLost, VmError: the process is gone, or not ours to look into.
    """
    found = {}
    with proc_errors(pid):
        links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        try:
            status, name = os.stat(link), os.readlink(link)
        except OSError:
            continue  # closed meanwhile
        if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
            found[status.st_dev, status.st_ino] = name
    return found


def open_sockets(pid: int) -> frozenset[int]:
    """Inodes of the sockets that a process has open.

    Raises: SessionLost, VmError: the process is gone, or not ours to look into.
    """
    inodes = set()
    with proc_errors(pid):
        links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        try:
            kind, _, inode = os.readlink(link).partition(":")
        except OSError:
            continue  # closed meanwhile
        if kind == "socket":
            inodes.add(int(inode[1:-1]))
    return frozenset(inodes)


def launch_token(pid: int) -> str | None:
    """The token of the plan by which qsnapd has started this process, if it has.

    Raises: SessionLost, VmError: the process is gone, or not ours to look into.
    """
    with proc_errors(pid):
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    prefix = f"{TOKEN_VARIABLE}=".encode()
    found = (entry.removeprefix(prefix) for entry in entries if entry.startswith(prefix))
    token = next(found, None)
    return None if token is None else token.decode(errors="replace")


def find_launched(token: str) -> int | None:
    """The process that was started by the plan with this *token*, if one can be seen."""
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            if launch_token(pid) == token:
                return pid
        except VmError:
            continue
    return None
