"""Whether another user's process may read a file, by the kernel's rules: mode, groups, ACL."""

import os
import stat
import struct
from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path

from qsnapd.vm.ram_options import CannotMap

_READ, _SEARCH = 4, 1
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_ENTRY = struct.Struct("<HHI")
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
"""Tags of an ACL's entries (linux/posix_acl.h)."""


@dataclass(frozen=True)
class User:
    """Whom a process acts as."""

    uid: int
    gid: int
    groups: Collection[int] = ()

    @property
    def all_groups(self) -> frozenset[int]:
        return frozenset((self.gid, *self.groups))


def require_readable(path: str, user: User) -> None:
    """Return if *user* may open *path* for reading: the file, and every folder on the way.

    Root always may. What lies beyond this (AppArmor, a unit's own view of the file system) is
    not known here: there QEMU says so when it starts.
    Raises: CannotMap: no, and which file or folder is why.
    """
    if user.uid == 0:
        return
    real = Path(os.path.realpath(path))
    for place in (*reversed(real.parents), real):
        wanted = _READ if place == real else _SEARCH
        try:
            allowed = _allowed(place, user)
        except OSError as exc:
            raise CannotMap(f"{place} cannot be looked at: {exc.strerror}") from exc
        if not allowed & wanted:
            doing = "read" if place == real else "search"
            raise CannotMap(f"QEMU runs as user {user.uid}, who may not {doing} {place}")


def _allowed(place: Path, user: User) -> int:
    """The rwx bits that *user* has there."""
    status = os.stat(place)
    try:
        entries = _entries(os.getxattr(place, _ACL))
    except OSError:  # none, or a file system without
        mode = stat.S_IMODE(status.st_mode)
        entries = [(_OWNER, mode >> 6, 0), (_OWNING_GROUP, mode >> 3, 0), (_OTHER, mode, 0)]
    mask = next((bits for tag, bits, _ in entries if tag == _MASK), 7)
    if user.uid == status.st_uid:
        return next(bits for tag, bits, _ in entries if tag == _OWNER) & 7
    for tag, bits, id_ in entries:
        if tag == _USER and id_ == user.uid:
            return bits & mask & 7
    in_groups = [
        bits & mask & 7
        for tag, bits, id_ in entries
        if (tag == _OWNING_GROUP and status.st_gid in user.all_groups)
        or (tag == _GROUP and id_ in user.all_groups)
    ]
    if in_groups:  # any group that allows is enough; others no longer count
        return reduce(or_, in_groups)
    return next(bits for tag, bits, _ in entries if tag == _OTHER) & 7


def _entries(acl: bytes) -> list[tuple[int, int, int]]:
    """Tag, bits and id of each entry."""
    if int.from_bytes(acl[:4], "little") != _ACL_VERSION:
        raise OSError("an ACL of an unknown version")
    return list(_ENTRY.iter_unpack(acl[4:]))
