"""A QEMU process beyond doubt: what it is, which images it means, when it ends. Linux only.

A process is its pid together with its start time: a pid alone may come to mean another.
"""

import json
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from qsnapd.errors import SessionLost, VmError
from qsnapd.model.snapshot import FileIdentity, Process
from qsnapd.vm.argv import Option, parse_options
from qsnapd.vm.peer import pid_of_peer
from qsnapd.vm.proc import (
    ARGV_VARIABLE,
    FileKey,
    open_files,
    proc_errors,
    start_time_ticks,
    status_of,
)

_ENVIRONMENT = (
    "DBUS_SESSION_BUS_ADDRESS",
    "DISPLAY",
    "GLIBC_TUNABLES",
    "HOME",
    "LANG",
    "LC_ALL",
    "PATH",
    "PULSE_SERVER",
    "PWD",
    "TMPDIR",
    "TZ",
    "WAYLAND_DISPLAY",
)
_ENVIRONMENT_PREFIXES = ("LD_", "MALLOC_", "QEMU_", "SDL_", "XDG_")
"""What QEMU and its libraries read. Never all of it: an environment holds secrets."""

_OF_ONE_START = frozenset({"object", "machine", "M", "incoming", "S"})
"""The options in which the words of a QEMU whose RAM maps an image differ from the plain ones."""

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: the ids of whoever called listen(2)."""
_EFFECTIVE = 1
"""Which of the ids in /proc/PID/status: real, effective, saved, filesystem."""


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, that no later one can be taken for."""

    pid: int
    start_time_ticks: int
    """Since the host booted (proc(5), starttime)."""
    uid: int
    """Effective."""


def peer_of(sock: socket.socket) -> ProcessIdentity:
    """The process that serves the connected unix socket *sock*.

    Preconditions: it has accepted the connection, e.g. QEMU's greeting has been read.
    Raises:
      SessionLost: the process has ended.
      VmError: it cannot be seen, or not told from others; or it is not who began to listen,
        nor root's choice: a user's process may have executed a setuid program since, and
        whatever is started again is started as whom it is now.
    """
    _, listener, group = _CREDENTIALS.unpack(
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    found = identify(pid_of_peer(sock))
    status = status_of(found.pid)
    uids, gids = (set(map(int, status[name].split())) for name in ("Uid", "Gid"))
    if listener != 0 and (uids, gids) != ({listener}, {group}):
        raise VmError(
            f"process {found.pid}, which serves the monitor, is not the user {listener} who began "
            "to listen there: it is not trusted to say how it was started"
        )
    return found


def identify(pid: int) -> ProcessIdentity:
    """The process that has *pid* now. Raises: SessionLost: none has."""
    began = start_time_ticks(pid)
    status = status_of(pid)
    if status["State"][0] in "ZX":  # ended; only its parent has not taken notice yet
        raise SessionLost(f"QEMU, process {pid}, has ended")
    return ProcessIdentity(
        pid=pid, start_time_ticks=began, uid=int(status["Uid"].split()[_EFFECTIVE])
    )


def ensure_same(identity: ProcessIdentity) -> None:
    """Raise SessionLost if the pid has come to mean another process, or none."""
    if identify(identity.pid).start_time_ticks != identity.start_time_ticks:
        raise SessionLost(f"QEMU, process {identity.pid}, has ended")


def read_process(identity: ProcessIdentity) -> Process:
    """All that it takes to start the process again.

    If its RAM maps a memory image, the words say instead how it would be without that: the
    image is no part of the VM, and may not outlive this process.

    Raises:
      SessionLost: it has ended.
      VmError: it is not ours to look into, or its words are not text.
    """
    place = Path(f"/proc/{identity.pid}")
    status = status_of(identity.pid)
    with proc_errors(identity.pid):
        environ = (place / "environ").read_bytes()
        argv = _plain_argv(_words((place / "cmdline").read_bytes()), environ)
        environment = dict(_worth_keeping(environ))
        daemonized = any(option.name == "daemonize" for option in parse_options(argv[1:]))
        process = Process(
            exe=str((place / "exe").readlink()),
            argv=argv,
            cwd=_started_in(str((place / "cwd").readlink()), environment, daemonized=daemonized),
            # As what it is now, even if it gave up root by -runas: its words are its own,
            # and nothing they say may make us start a program as anybody else.
            uid=int(status["Uid"].split()[_EFFECTIVE]),
            gid=int(status["Gid"].split()[_EFFECTIVE]),
            groups=tuple(map(int, status["Groups"].split())),
            environment=tuple(environment.items()),
        )
    ensure_same(identity)
    return process


def open_pidfd(identity: ProcessIdentity) -> int:
    """A descriptor that means this very process for ever; the caller closes it.

    Raises: SessionLost: it has ended.
    """
    with proc_errors(identity.pid):
        pidfd = os.pidfd_open(identity.pid)
    try:
        ensure_same(identity)  # the pid may have been given away before pidfd_open
    except BaseException:
        os.close(pidfd)
        raise
    return pidfd


async def wait_exit(pidfd: int) -> None:
    """Return once the process has ended, whoever its parent is."""
    await trio.lowlevel.wait_readable(pidfd)


def key_of(path: str) -> FileKey | None:
    """Device and inode of what *path* leads to; None if that is nothing."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # also a name that cannot be one
        return None
    return status.st_dev, status.st_ino


def is_still(file: FileIdentity) -> bool:
    """Whether the file's path still leads to it.

    By inode alone: device numbers may change with a reboot, a block device's inode too. A
    device counts only where devices are, so that no user's link makes one of a file.
    """
    try:
        status = os.stat(file.path)
    except (OSError, ValueError):
        return False
    if stat.S_ISBLK(status.st_mode):
        return file.path.startswith("/dev/")
    return status.st_ino == file.inode


def resolve_image_path(
    pid: int, name: str, files: Mapping[FileKey, str] | None = None
) -> FileIdentity | None:
    """The file that QEMU, process *pid*, means by *name*, if it can be reached from here.

    QEMU repeats names as they were given: relative to where it was started, or to a root
    it has since changed. A file counts only if the process has it open; so a file that was
    later put under the same name is never taken for it. *files* is what `open_files` says,
    for a caller with many names.

    Raises: SessionLost, VmError: the process is gone, or not ours to look into.
    """
    name = os.path.normpath(plain_name(name))
    files = open_files(pid) if files is None else files
    with proc_errors(pid):
        root, cwd = os.readlink(f"/proc/{pid}/root"), os.readlink(f"/proc/{pid}/cwd")
    for candidate in (os.path.join(cwd, name), os.path.normpath(f"{root}/{name}")):
        key = key_of(candidate)
        if key is not None and key in files:
            # The kernel's name has no symbolic link in it that could be turned elsewhere.
            return _reachable(files[key], key) or _reachable(candidate, key)
    # A relative name after -daemonize has changed to "/": only the end of the path is known.
    tail = f"/{name.lstrip('/')}"
    found = [_reachable(path, key) for key, path in files.items() if path.endswith(tail)]
    return found[0] if len(found) == 1 else None


def _reachable(path: str, key: FileKey) -> FileIdentity | None:
    if key_of(path) != key or not path.isprintable():  # no UTF-8: nobody could name it again
        return None
    return FileIdentity(path=path, device=key[0], inode=key[1])


def plain_name(name: str) -> str:
    """The file's name within the JSON that QEMU makes of a node no plain name describes."""
    if not name.startswith("json:"):
        return name
    try:
        node = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError) as exc:
        raise VmError(f"QEMU calls an image {name[:100]!r}, which is not JSON") from exc
    while isinstance(node, dict) and "filename" not in node:
        node = node.get("file")
    return str(node["filename"]) if isinstance(node, dict) else name


def _started_in(cwd: str, environment: Mapping[str, str], *, daemonized: bool) -> str:
    """Where relative names on the command line begin, as well as can be known."""
    if cwd == "/" and daemonized:
        # It has moved there itself. A shell, and qsnapd, leave in PWD where it was started.
        told = environment.get("PWD", "")
        return told if os.path.isabs(told) and os.path.isdir(told) else cwd
    return cwd


def _words(text: bytes) -> tuple[str, ...]:
    try:
        return tuple(text.decode().removesuffix("\0").split("\0"))
    except UnicodeDecodeError as exc:
        raise VmError(f"QEMU's command line is not UTF-8: {exc}") from None


def _plain_argv(argv: tuple[str, ...], environ: bytes) -> tuple[str, ...]:
    """*argv*, or what it would be if the process's RAM did not map a memory image."""
    told = dict(_variables(environ)).get(ARGV_VARIABLE, "[]")
    try:
        words: Any = json.loads(told)
    except (ValueError, RecursionError):
        return argv
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        return argv
    # A shell may have passed the variable on to a QEMU that it was not meant for.
    return tuple(words) if _lasting(words) == _lasting(argv) else argv


def _lasting(words: Sequence[str]) -> list[Option]:
    return [option for option in parse_options(words[1:]) if option.name not in _OF_ONE_START]


def _worth_keeping(environ: bytes) -> Iterator[tuple[str, str]]:
    for name, value in _variables(environ):
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES):
            yield name, value


def _variables(environ: bytes) -> Iterator[tuple[str, str]]:
    for entry in environ.decode(errors="replace").split("\0"):
        name, equals, value = entry.partition("=")
        if equals:
            yield name, value
