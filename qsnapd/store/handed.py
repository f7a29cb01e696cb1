"""A folder in which the daemon leaves files for another user's program, without a lock.

It belongs to that user, who can take files away but is not believed to have put any there:
only what root or the reader's own user alone may write is read. So somebody who breaks out
of a QEMU gains nothing in its folder that he does not have.

Everything here blocks.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from qsnapd.errors import StoreError
from qsnapd.image.files import make_directory
from qsnapd.model.base import Frozen

T = TypeVar("T", bound=Frozen)

_LIMIT_BYTES = 1 << 20
_HINTS = {
    errno.EACCES: ": it must be open to the user that QEMU runs as, whom qsnapd gives it to",
    errno.EPERM: ": only root can give it to the user that QEMU runs as",
    errno.EROFS: ": a service with ProtectSystem= needs it in its ReadWritePaths=",
}


@dataclass(frozen=True)
class HandedFolder:
    """The folder at `path`, which need not exist; its parent may hold several."""

    path: Path

    def write(self, name: str, content: Frozen, *, uid: int, gid: int) -> None:
        """Put a file there for user *uid*, in place of one of that name; durable on return.

        On failure: the old one stands.
        Raises: StoreError.
        """
        draft = f"{name}.new"
        with self._naming("write"):
            self._make(uid, gid)
            with self._opened() as folder:
                _remove(folder, draft)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                descriptor = os.open(draft, flags, 0o600, dir_fd=folder)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    os.fchmod(descriptor, 0o644)  # the folder lets nobody else in
                    file.write(content.model_dump_json(indent=1))
                    file.flush()
                    os.fsync(descriptor)
                os.rename(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)

    def read(self, name: str, kind: type[T]) -> tuple[T, int] | None:
        """The file's content and inode; None if there is none.

        Raises: StoreError: it cannot be read, understood or believed.
        """
        with self._naming("read"):
            try:
                with self._opened() as folder:
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    descriptor = os.open(name, flags, dir_fd=folder)
            except FileNotFoundError:
                return None
            with os.fdopen(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                self._require_trust(name, status)
                text = file.read(_LIMIT_BYTES)
        try:
            return kind.model_validate_json(text), status.st_ino
        except ValidationError as exc:
            raise StoreError(
                f"{self.path / name} is not understood ({exc.errors()[0]['msg']}): it was "
                "written by another version of qsnapd. If nothing else helps, remove it"
            ) from exc

    def rename(self, old: str, new: str) -> bool:
        """Rename a file, durably; False if somebody else was faster. Raises: StoreError."""
        with self._naming("rename a file"), self._opened() as folder:
            try:
                os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)
            except FileNotFoundError:
                return False
            os.fsync(folder)
            return True

    def rename_back(self, old: str, new: str) -> None:
        """Undo `rename`, unless another file has the name by now. Raises: StoreError."""
        with self._naming("rename a file"), self._opened() as folder:
            try:
                os.stat(new, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)

    def remove(self, name: str) -> None:
        """Have no such file; durable on return. Raises: StoreError."""
        with self._naming("remove a file"):
            try:
                with self._opened() as folder:
                    _remove(folder, name)
                    os.fsync(folder)
            except FileNotFoundError:
                pass

    def _require_trust(self, name: str, status: os.stat_result) -> None:
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{self.path / name} is no file of qsnapd's: remove it")
        if status.st_uid not in (0, os.geteuid()) or mode & 0o022:
            raise StoreError(
                f"{self.path / name} belongs to user {status.st_uid}, mode {mode:o}: only what "
                f"root or user {os.geteuid()} alone may write is believed. Run qsnapd as root or "
                "as the VM's own user, or remove the file"
            )

    def _make(self, uid: int, gid: int) -> None:
        make_directory(self.path.parent, mode=0o711)  # the way to its folders
        make_directory(self.path)
        status = os.stat(self.path, follow_symlinks=False)
        if (status.st_uid, status.st_gid) != (uid, gid) and stat.S_ISDIR(status.st_mode):
            os.chown(self.path, uid, gid, follow_symlinks=False)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(self.path, flags)
        try:
            yield folder
        finally:
            os.close(folder)

    @contextmanager
    def _naming(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            hint = _HINTS.get(exc.errno or 0, "")
            raise StoreError(f"cannot {verb} in {self.path}: {exc.strerror}{hint}") from exc


def _remove(folder: int, name: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)
