"""Every file and folder that ever was, under a second name: so inode numbers stay what they are.

qsnapd knows files by their inodes. A state after a power failure therefore has to consist of
the very inodes of the recording, and no number may be given away a second time.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tests.crashes.content import Content, read_content

Inode = int
Name = str | bytes | os.PathLike[str]

_link, _rename = os.link, os.rename
"""Not what a recorder has put in their place."""


@dataclass(frozen=True)
class Owner:
    """Of a file, and who may do what with it."""

    mode: int
    uid: int
    gid: int


class Vault:
    """A folder in the same file system as all that is kept in it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self.owners: dict[Inode, Owner] = {}
        """As each file was found last."""
        self._holds: dict[Inode, tuple[bytes, int, int]] = {}
        """What was put into a file, and its size and time of change then."""

    def name(self, inode: Inode) -> Path:
        """Return where the file or folder is kept."""
        return self._folder / str(inode)

    def keep(self, path: Name, *, dir_fd: int | None = None) -> Inode:
        """Give the file at *path* its second name."""
        inode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
        _link(path, self.name(inode), src_dir_fd=dir_fd, follow_symlinks=False)
        return inode

    def take_folder(self, path: Name, *, dir_fd: int | None = None) -> Inode:
        """Move the empty folder at *path* here, as if it had been removed.

        Raises: OSError: it is none, or is not empty.
        """
        inode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
        _rename(path, self.name(inode), src_dir_fd=dir_fd)
        return inode

    def signature(self, inode: Inode) -> tuple[int, int]:
        """Return what changes when the file does; note whose it is."""
        status = os.lstat(self.name(inode))
        self.owners[inode] = Owner(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        return status.st_size, status.st_mtime_ns

    def read(self, inode: Inode) -> Content:
        """Take what the file holds now."""
        fd = os.open(self.name(inode), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return read_content(fd)
        finally:
            os.close(fd)

    def fill(self, inode: Inode, content: Content) -> None:
        """Make the file hold *content*, and belong to whom it belonged."""
        path, owner = self.name(inode), self.owners[inode]
        status = os.lstat(path)
        if self._holds.get(inode) != (content.key, status.st_size, status.st_mtime_ns):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                content.write_to(fd)
            finally:
                os.close(fd)
            self._holds[inode] = (content.key, content.size_bytes, content.mtime_ns)
        if (status.st_uid, status.st_gid) != (owner.uid, owner.gid):
            os.chown(path, owner.uid, owner.gid)
        if stat.S_IMODE(status.st_mode) != owner.mode:
            os.chmod(path, owner.mode)
