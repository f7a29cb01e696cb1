"""Names for a second VM's files, sockets and ports, beside those of the VM it is a copy of."""

import os.path
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import count

from qsnapd.errors import Blocked
from qsnapd.model.request import Identity

SOCKET_PATH_LIMIT_BYTES = 107
"""unix(7): `sun_path` has 108 bytes, the last of which is 0."""

_QUOTED = {"~": "~t", ".": "~d", "%": "~p"}
"""A dot would make names of different clones alike; "%" has a meaning for QEMU's `-D`."""


def beside(path: str, name: str, number: int = 1) -> str:
    """*path* with *name* before its suffix: "/run/web.sock" becomes "/run/web.NAME.sock".

    No two pairs of a path and a name give the same result. *number* is for when somebody
    has that already.
    """
    stem, suffix = os.path.splitext(path)
    quoted = "".join(_QUOTED.get(character, character) for character in name)
    return f"{stem}.{quoted}{f'~{number}' if number > 1 else ''}{suffix}"


class OwnNames:
    """Gives every name that two VMs must not share to one of them, and remembers it.

    A relative path stays relative. What `substitutes` names is taken from there: files,
    network interfaces and port numbers alike.
    """

    def __init__(
        self,
        name: str,
        *,
        cwd: str,
        substitutes: Mapping[str, str],
        avoid: Collection[str],
        is_taken: Callable[[str], bool],
        real: Callable[[str], str],
    ) -> None:
        self.files: dict[str, str] = {}
        """Absolute paths, old to new, of what QEMU makes when it starts or runs."""
        self.found: set[str] = set()
        """Those of the new ones that were made up here: they were free."""
        self.used: set[str] = set()
        """Which of the substitutes there was a use for."""
        self._name = name
        self._cwd = cwd
        self._substitutes = substitutes
        self._real = real
        self._avoid = avoid
        self._is_taken = is_taken

    def absolute(self, path: str) -> str:
        return os.path.normpath(os.path.join(self._cwd, path))

    def substitute(self, old: str) -> str | None:
        """What is to stand for *old*, if that was said."""
        for name, new in self._substitutes.items():
            # Two ways to one file: /var/run often is a link to /run.
            paths = "/" in old and "/" in name
            if name == old or (paths and self._real(self.absolute(old)) == self._real(name)):
                self.used.add(name)
                return new
        return None

    def file(self, path: str) -> str:
        """The other VM's name for a file that QEMU writes; device nodes stay."""
        old = self.absolute(path)
        if old.startswith("/dev/") and not old.startswith(("/dev/shm/", "/dev/hugepages/")):
            return path
        new = self.substitute(old)
        if new is not None:
            self.files[old] = self.absolute(new)
            return new
        own = self.files.get(old) or self._free(old)
        self.files[old] = own
        self.found.add(own)
        return own if os.path.isabs(path) else os.path.relpath(own, self._cwd)

    def socket(self, path: str, what: object) -> str:
        """The same for a unix socket. Raises: Blocked: the name would be too long for one."""
        return fitting(self.file(path), what)

    def _free(self, old: str) -> str:
        numbered = (beside(old, self._name, number) for number in count(1))
        taken = {*self._avoid, *self.files.values()}
        return next(new for new in numbered if new not in taken and not self._is_taken(new))


def fitting(path: str, what: object) -> str:
    """Return *path* if a unix socket can have it. Raises: Blocked."""
    too_long = len(os.fsencode(path)) - SOCKET_PATH_LIMIT_BYTES
    if too_long > 0:
        raise Blocked(
            f"{what}: the path of the clone's socket, {path}, is {too_long} bytes longer than "
            "Linux allows: give the clone a shorter name"
        )
    return path


@dataclass
class Wishes:
    """How two VMs are to differ, while the command line of one is made of the other's."""

    names: OwnNames
    clone: str
    seed: str
    """Random, and new for each clone: whatever must be unique comes from it.

    Not from the clone's name, because clones of one name on two hosts may share a network.
    """
    mac: Identity
    uuid: Identity
    is_folder: Callable[[str], bool]
    notes: list[str] = field(default_factory=list)
    pipes: list[str] = field(default_factory=list)
