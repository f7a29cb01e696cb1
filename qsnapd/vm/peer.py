"""Which process serves a QMP socket. Linux only."""

import os
import socket
import struct
from pathlib import Path

from qsnapd.errors import VmError
from qsnapd.vm.proc import open_sockets

_UCRED = struct.Struct("3i")
_CONNECTED = "03"
"""SS_CONNECTED (linux/net.h), as /proc/net/unix prints it."""


def pid_of_peer(sock: socket.socket) -> int:
    """The process at the other end of the connected unix socket *sock*.

    Preconditions: it has accepted the connection, e.g. QEMU's greeting has been read.

    The kernel names whoever began to listen. That is not QEMU where its parent did and
    passed the descriptor on, so the answer counts only if that process also holds an
    accepted connection; else the one process that does is taken.

    Raises: VmError: it cannot be seen, or not told from others.
    """
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid: int = _UCRED.unpack(credentials)[0]
    if pid == 0:
        raise VmError("QEMU runs in a PID namespace that cannot be seen from here")
    accepted = _accepted_at(str(sock.getpeername()))
    if not accepted:  # e.g. it lives in another network namespace
        return pid
    holders = [pid] if _holds(pid, accepted) else _holders(accepted)
    if len(holders) == 1:
        return holders[0]
    open_sockets(pid)  # if this is forbidden, that is all there is to say
    raise VmError(
        f"process {pid} opened the monitor's socket for another one, and {len(holders)} "
        "processes could be that: let QEMU open the socket itself"
    )


def _accepted_at(address: str) -> frozenset[int]:
    """Inodes of the server's ends of connections to the unix socket bound to *address*."""
    inodes = set()
    for line in Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]:
        # Num RefCount Protocol Flags Type St Inode Path
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[5] == _CONNECTED and fields[7] == address:
            inodes.add(int(fields[6]))
    return frozenset(inodes - {0})  # 0: not accepted yet


def _holders(inodes: frozenset[int]) -> list[int]:
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())
    return [pid for pid in pids if _holds(pid, inodes)]


def _holds(pid: int, inodes: frozenset[int]) -> bool:
    try:
        return not inodes.isdisjoint(open_sockets(pid))
    except VmError:
        return False  # ended meanwhile, or another user's
