"""All that this process does to files below some folders, in its order.

What others write (QEMU, qemu-img) is seen as well, a step later, but counts as being on disk
only once we have synced it, or a test says that QEMU has (`Recorder.qemu_synced`).
"""

import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.crashes.content import Content
from tests.crashes.vault import Inode, Name, Vault

Real = Callable[..., Any]
"""A function of `os`, past the recorder."""
Entry = tuple[Inode, str, Inode | None]
"""A folder, a name in it, and what the name leads to from now on; None: to nothing."""


@dataclass(frozen=True)
class Step:
    """Something that has happened, in words for people."""

    words: str


@dataclass(frozen=True)
class Named(Step):
    """Names have changed, all of these at once or none."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Written(Step):
    """A file holds something else."""

    file: Inode
    content: Content


@dataclass(frozen=True)
class Synced(Step):
    """What a file held is on disk."""

    file: Inode
    content: Content


@dataclass(frozen=True)
class FolderSynced(Step):
    """The names in a folder are on disk."""

    folder: Inode


@dataclass(frozen=True)
class Said(Step):
    """From now on something else may be relied on."""

    promise: object


class Recorder:
    """Records while `recording` holds it."""

    def __init__(self, vault: Vault, roots: Collection[Path], but: Collection[Path] = ()) -> None:
        """Take what is below *roots*, but for some files, to be on disk."""
        self.vault = vault
        self.roots = tuple(roots)
        self.but = frozenset(but)
        self.steps: list[Step] = []
        self.folders: set[Inode] = set()
        self.files: dict[Inode, tuple[int, int]] = {}
        self.at_first: dict[Inode, dict[str, Inode]] = {}
        self.lock = threading.RLock()
        """Who holds it sees nothing change, but for what others write."""
        for root in roots:
            self._add_folder(root)

    def _add_folder(self, folder: Path) -> Inode:
        inode = folder.stat().st_ino
        self.folders.add(inode)
        found = self.at_first[inode] = {}
        for path in sorted(folder.iterdir()):
            if path in self.but:
                continue
            if path.is_dir():
                found[path.name] = self._add_folder(path)
            else:
                found[path.name] = kept = self.vault.keep(str(path))
                self._synced(kept, f"{path.name} was there")
        return inode

    # --- what tests say ------------------------------------------------------------------

    def say(self, promise: object, words: str) -> None:
        """Note what may be relied on from now on."""
        with self.lock:
            self._look()
            self.steps.append(Said(words, promise))

    def qemu_synced(self, *images: Path | str) -> None:
        """Note that QEMU has just written these to stable storage."""
        with self.lock:
            self._look()
            for image in images:
                inode = os.stat(image).st_ino
                if inode in self.files:
                    self._synced(inode, f"QEMU has synced {os.path.basename(image)}")

    # --- what the process does -----------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Listen to the functions of `os` for the block."""
        wrappers: dict[str, Callable[..., Any]] = {
            "open": self._open,
            "fsync": self._fsync,
            "fdatasync": self._fsync,
            "rename": self._rename,
            "replace": self._rename,
            "link": self._link,
            "unlink": self._unlink,
            "remove": self._unlink,
            "mkdir": self._mkdir,
            "rmdir": self._rmdir,
            "symlink": self._refuse,
        }
        wrappers |= dict.fromkeys(("write", "pwrite", "ftruncate", "sendfile"), self._write)
        with ExitStack() as patches:
            for name, wrapper in wrappers.items():
                listener = partial(wrapper, getattr(os, name))
                patches.enter_context(mock.patch.object(os, name, listener))
            yield
        with self.lock:
            self._look()

    def _look(self) -> None:
        """Note which files hold something else by now, whoever wrote to them."""
        for inode, known in self.files.items():
            if self.vault.signature(inode) != known:
                content = self.vault.read(inode)
                self.files[inode] = (content.size_bytes, content.mtime_ns)
                self.steps.append(Written(f"something is written to {inode}", inode, content))

    def _synced(self, inode: Inode, words: str) -> None:
        content = self.vault.read(inode)
        self.vault.signature(inode)
        self.files[inode] = (content.size_bytes, content.mtime_ns)
        self.steps.append(Synced(words, inode, content))

    def _folder(self, path: Name, dir_fd: int | None) -> tuple[Inode | None, str]:
        """Where a name is: None, if that is nowhere of interest."""
        above, name = os.path.split(os.fsdecode(path))
        try:
            inode = os.stat(above or ".", dir_fd=dir_fd).st_ino
        except OSError:
            return None, name
        return (inode if inode in self.folders else None), name

    def _open(
        self, real: Real, path: Name, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int:
        if not flags & (os.O_CREAT | os.O_TRUNC):
            return int(real(path, flags, mode, dir_fd=dir_fd))
        with self.lock:
            self._look()
            folder, name = self._folder(path, dir_fd)
            was_there = folder is None or _inode(path, dir_fd) is not None
            fd = int(real(path, flags, mode, dir_fd=dir_fd))
            if folder is not None and not was_there:
                inode = self.vault.keep(path, dir_fd=dir_fd)
                content = self.vault.read(inode)
                self.files[inode] = (content.size_bytes, content.mtime_ns)
                self.vault.signature(inode)
                self.steps.append(Written(f"{name} is new", inode, content))
                self.steps.append(Named(f"{name} is created", ((folder, name, inode),)))
            self._look()
            return fd

    def _write(self, real: Real, target: int, *arguments: object) -> object:
        done = real(target, *arguments)
        if os.fstat(target).st_ino in self.files:
            with self.lock:
                self._look()
        return done

    def _fsync(self, real: Real, fd: int) -> None:
        status = os.fstat(fd)
        with self.lock:
            self._look()
            real(fd)
            name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
            if stat.S_ISDIR(status.st_mode) and status.st_ino in self.folders:
                self.steps.append(FolderSynced(f"the folder {name} is synced", status.st_ino))
            elif status.st_ino in self.files:
                self._synced(status.st_ino, f"{name} is synced")

    def _rename(
        self,
        real: Real,
        old: Name,
        new: Name,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None:
        with self.lock:
            self._look()
            moved = _inode(old, src_dir_fd)
            source, was = self._folder(old, src_dir_fd)
            target, name = self._folder(new, dst_dir_fd)
            real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            changes = ((source, was, None), (target, name, moved))
            entries = tuple((f, n, i) for f, n, i in changes if f is not None)
            if entries:
                self.steps.append(Named(f"{was} becomes {name}", entries))

    def _link(
        self,
        real: Real,
        old: Name,
        new: Name,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        with self.lock:
            self._look()
            folder, name = self._folder(new, dst_dir_fd)
            more = {"src_dir_fd": src_dir_fd, "dst_dir_fd": dst_dir_fd}
            real(old, new, follow_symlinks=follow_symlinks, **more)
            if folder is not None:
                inode = _inode(new, dst_dir_fd)
                assert inode in self.files, f"{name} is a link to what was not recorded"
                self.steps.append(Named(f"{name} is linked", ((folder, name, inode),)))

    def _unlink(self, real: Real, path: Name, *, dir_fd: int | None = None) -> None:
        with self.lock:
            self._look()
            folder, name = self._folder(path, dir_fd)
            real(path, dir_fd=dir_fd)
            if folder is not None:
                self.steps.append(Named(f"{name} is removed", ((folder, name, None),)))

    def _mkdir(
        self, real: Real, path: Name, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> None:
        with self.lock:
            self._look()
            folder, name = self._folder(path, dir_fd)
            real(path, mode, dir_fd=dir_fd)
            if folder is not None:
                inode = _inode(path, dir_fd)
                assert inode is not None
                self.folders.add(inode)
                self.steps.append(Named(f"the folder {name} is made", ((folder, name, inode),)))

    def _rmdir(self, real: Real, path: Name, *, dir_fd: int | None = None) -> None:
        with self.lock:
            self._look()
            folder, name = self._folder(path, dir_fd)
            if folder is None:
                real(path, dir_fd=dir_fd)
                return
            put_away(self.vault, real, path, dir_fd=dir_fd)
            self.steps.append(Named(f"the folder {name} is removed", ((folder, name, None),)))

    def _refuse(
        self,
        real: Real,
        source: Name,
        path: Name,
        target_is_directory: bool = False,
        *,
        dir_fd: int | None = None,
    ) -> None:
        folder, name = self._folder(path, dir_fd)
        assert folder is None, f"{name}: symbolic links are not recorded"
        real(source, path, target_is_directory, dir_fd=dir_fd)


def put_away(vault: Vault, real: Real, path: Name, *, dir_fd: int | None = None) -> None:
    """Remove an empty folder, so far as anybody can see."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
    try:
        is_empty = not os.listdir(fd)
    finally:
        os.close(fd)
    if is_empty:
        vault.take_folder(path, dir_fd=dir_fd)
    else:
        real(path, dir_fd=dir_fd)  # says in its own words that it is not


def _inode(path: Name, dir_fd: int | None) -> Inode | None:
    try:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
    except OSError:
        return None
