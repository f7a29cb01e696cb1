"""Who a client is, by the kernel's word, and what it may do."""

import grp
import os
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import trio

from qsnapd.errors import AccessDenied, ConfigError

_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERGROUPS = 59  # asm-generic/socket.h, Linux 4.13; not in Python's socket module
_GROUPS_BYTES = 1024  # the most that getsockopt() of Python can ask for


class Role(IntEnum):
    """What a client may do; each role includes those before it."""

    NONE = 0
    READER = 1
    """Look and listen."""
    OPERATOR = 2
    """Change VMs: suspend, resume, checkpoint, revert, abort."""
    ADMIN = 3
    """Also choose the files that are written."""


@dataclass(frozen=True)
class Peer:
    """The process at the other end, as it was when it connected."""

    pid: int
    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, connection: trio.socket.SocketType) -> Self:
        """Ask the kernel who connected. Raises: OSError."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        pid, uid, gid = _PEERCRED.unpack(credentials)
        try:
            packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
        except OSError:  # in more groups than fit: only the first one counts
            packed = b""
        groups = memoryview(packed).cast("I")
        return cls(pid, uid, frozenset(groups) | {gid})


@dataclass(frozen=True)
class Access:
    """Who gets which role."""

    operator_gid: int | None = None
    reader_gid: int | None = None

    @classmethod
    def of_groups(cls, *, operator: str | None, reader: str | None) -> Self:
        """Look the configured groups up. Raises: ConfigError: there is no such group."""
        return cls(_gid("operator_group", operator), _gid("reader_group", reader))

    def role(self, peer: Peer) -> Role:
        """Return the highest role that *peer* has."""
        if peer.uid in (0, os.geteuid()):
            return Role.ADMIN
        if self.operator_gid in peer.groups:
            return Role.OPERATOR
        if self.reader_gid in peer.groups:
            return Role.READER
        return Role.NONE


def require(role: Role, needed: Role, what: str) -> None:
    """Raise AccessDenied, saying who may do *what*, unless *role* reaches *needed*."""
    if role < needed:
        who = {
            Role.READER: "members of the reader or operator group, and root",
            Role.OPERATOR: "members of the operator group, and root",
            Role.ADMIN: "root and the daemon's own user",
        }[needed]
        raise AccessDenied(f"{what} is for {who}")


def _gid(key: str, group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as exc:
        raise ConfigError(f"daemon.{key}: there is no group {group!r}") from exc
