"""A QEMU that is started to be asked something, never runs a guest, and is gone afterwards.

It never outlives us: it is killed at the end of the block, and by the kernel should this
process be killed within it.
"""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from qsnapd.errors import MonitorBusy, SessionLost, VmError
from qsnapd.model.snapshot import Process
from qsnapd.qmp.bridge import open_bridge
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.argv import Option, words_of
from qsnapd.vm.identity import wait_exit

START_LIMIT_S = 30.0
KILL_LIMIT_S = 10.0
LAST_WORDS_LIMIT_S = 1.0
"""Between the end of the monitor and that of the process."""
WORDS_BYTES = 2000
_MONITOR = "qsnapd-monitor"

# Popen cannot ask for PR_SET_PDEATHSIG, and changing the user would take it back: so this
# little program does both, and then becomes QEMU. What QEMU's user had in the environment,
# LD_PRELOAD for one, must not have a say before: it comes on stdin.
_BECOME_QEMU = r"""
import ctypes, os, sys
parent, uid, gid, groups, own_network, cwd, executable, *argv = sys.argv[1:]
environment = dict(entry.split("=", 1) for entry in sys.stdin.read().split("\0") if entry)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
libc = ctypes.CDLL(None)
try:
    if os.geteuid() == 0:
        os.setgroups([int(group) for group in groups.split(",") if group])
        os.setgid(int(gid))
        os.setuid(int(uid))
    if own_network:
        uid, gid = os.geteuid(), os.getegid()
        libc.prctl(4, 1)
        if libc.unshare(0x50000000 if uid else 0x40000000) != 0:
            sys.exit("it cannot have a network of its own on this host")
        if uid:
            open("/proc/self/setgroups", "w").write("deny")
            open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
            open("/proc/self/gid_map", "w").write(f"0 {gid} 1")
    libc.prctl(1, 9)
    if os.getppid() != int(parent):
        sys.exit("whoever wanted it is gone")
    os.chdir(cwd)
    os.execve(executable, argv, environment)
except OSError as exc:
    sys.exit(f"cannot start {executable}: {exc.strerror}")
"""


@dataclass(frozen=True)
class Throwaway:
    """One while `open_throwaway` holds it."""

    session: QmpSession
    pid: int


@asynccontextmanager
async def open_throwaway(
    process: Process,
    executable: str,
    options: Sequence[Option],
    *,
    cwd: str = "/",
    pass_fds: Sequence[int] = (),
    own_network: bool = False,
) -> AsyncIterator[Throwaway]:
    """Start *executable* with *options*, as who *process* ran as, and hold it for the block.

    Its monitor is added here; *options* has to keep it from running and name none of its own.
    *own_network*: in a network namespace of its own, where it may make interfaces.
    On exit, whatever happens: it is gone. What the block raises comes out bare.
    Raises: VmError: it does not start, or it ended within the block, with QEMU's own words.
    """
    words = os.memfd_create("qemu's words", os.MFD_CLOEXEC)
    try:
        how = ("own" if own_network else "", cwd, executable)
        child, monitor = _start(process, how, options, pass_fds, words)
        try:
            lost: VmError | None = None
            try:
                async with open_bridge(
                    monitor, name="throwaway", greeting_limit_s=START_LIMIT_S
                ) as (bridge, _):
                    yield Throwaway(QmpSession(bridge), child.pid)
            except (SessionLost, MonitorBusy) as exc:
                lost = exc
            if lost is not None:
                if said := await _last_words(child, words):
                    raise VmError(f"QEMU says: {said}") from lost
                raise lost
        finally:
            child.kill()
            with trio.move_on_after(KILL_LIMIT_S, shield=True):
                await trio.to_thread.run_sync(child.wait)
    finally:
        os.close(words)


def _start(
    process: Process,
    how: Sequence[str],
    options: Sequence[Option],
    pass_fds: Sequence[int],
    words: int,
) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """Start it, and return it with our end of its monitor.

    Not in a thread: the end of the thread that started it would be its own end.
    """
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with its:
        descriptor = its.fileno()
        argv = (
            process.argv[0],
            *words_of(options),
            *("-chardev", f"socket,id={_MONITOR},fd={descriptor}"),
            *("-mon", f"chardev={_MONITOR},mode=control"),
        )
        ids = (process.uid, process.gid, ",".join(map(str, process.groups)))
        environment = os.memfd_create("environment", os.MFD_CLOEXEC)
        try:
            os.write(environment, "\0".join(map("=".join, process.environment)).encode())
            os.lseek(environment, 0, os.SEEK_SET)
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BECOME_QEMU]
                + [str(word) for word in (os.getpid(), *ids, *how, *argv)],
                env={},
                stdin=environment,
                stdout=subprocess.DEVNULL,
                stderr=words,
                pass_fds=(descriptor, *pass_fds),
                start_new_session=True,
            )
        except OSError as exc:
            ours.close()
            raise VmError(f"cannot start {sys.executable}: {exc}") from exc
        finally:
            os.close(environment)
    ours.setblocking(False)
    return child, ours


async def _last_words(child: "subprocess.Popen[bytes]", words: int) -> str | None:
    """What a QEMU that is ending said; None if it does not end."""
    ended = os.pidfd_open(child.pid)
    try:
        with trio.move_on_after(LAST_WORDS_LIMIT_S, shield=True):
            await wait_exit(ended)
    finally:
        os.close(ended)
    if child.poll() is None:
        return None
    said = os.pread(words, WORDS_BYTES, max(0, os.fstat(words).st_size - WORDS_BYTES))
    return said.decode(errors="replace").strip() or f"nothing, exit status {child.returncode}"
