"""Where things lie, and who may touch them: one daemon per store.

    STATE_DIR/.lock            held while a daemon runs; says its pid
    STATE_DIR/VM/              all of one VM; see `store.snapshots`

Names of VMs and snapshots do not begin with a dot, so qsnapd's own files do.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from qsnapd.errors import StoreError
from qsnapd.image.files import allow_owner, make_directory, sync_removals
from qsnapd.model.names import check_name, is_name
from qsnapd.store.own_files import is_draft, is_of_a_vm
from qsnapd.store.snapshots import VmStore

_TELLING = (".restoring.json", ".vm.json")


class Store:
    """Everything under one state directory. Owned by the daemon, for as long as it runs.

    Synchronous; `VmStore` says what may be used from several threads.
    """

    def __init__(self, state_dir: Path) -> None:
        """Open the store and lock it, creating *state_dir* (0700) if it is missing.

        Raises: StoreError: another daemon uses it; or it cannot be created or locked.
        """
        self.state_dir = state_dir.absolute()
        self._vms = dict[str, VmStore]()
        with _naming(f"cannot use the state directory {self.state_dir}"):
            make_directory(self.state_dir)
            self._lock_fd = _lock(self.state_dir / ".lock")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another daemon have the store. May be called again."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def vm(self, name: str) -> VmStore:
        """The part of the VM *name*, the same object every time; created if it is missing.

        Raises: StoreError.
        """
        if name not in self._vms:
            directory = self.state_dir / check_name(name)
            with _naming(f"cannot keep snapshots in {directory}"):
                make_directory(directory)
            self._vms[name] = VmStore(name, directory)
        return self._vms[name]

    def names(self) -> tuple[str, ...]:
        """All VMs of which there is a part, also those that no daemon looks after any more.

        Raises: StoreError.
        """
        with _naming(f"cannot read the state directory {self.state_dir}"):
            found = [path.name for path in self.state_dir.iterdir() if path.is_dir()]
        return tuple(sorted(filter(is_name, found)))

    def is_used(self, name: str) -> bool:
        """Whether anything is kept of a VM *name*. Raises: StoreError."""
        directory = self.state_dir / check_name(name)
        with _naming(f"cannot read {directory}"):
            try:
                return not all(map(is_draft, os.listdir(directory)))
            except FileNotFoundError:
                return False

    def require_no_snapshots(self, name: str) -> None:
        """Raise StoreError if there are files of snapshots of a VM, also of unfinished ones."""
        directory = self.state_dir / check_name(name)
        with _naming(f"cannot read {directory}"):
            if any(path.is_file() for path in directory.glob("*/**/*")):
                raise StoreError(f"{directory} holds files of snapshots: it is not removed")

    def forget(self, name: str) -> None:
        """Remove the part of a VM without snapshots; may be called again after a crash.

        Preconditions: nobody uses the `VmStore` any more.
        On success: no trace of it is left. What tells what the rest is for goes last.
        Raises: StoreError: there are snapshots, or what qsnapd has not put there; or it cannot be
          removed.
        """
        directory = self.state_dir / check_name(name)
        with _naming(f"cannot remove {directory}"):
            if not directory.exists():
                return
            self.require_no_snapshots(name)
            _require_no_strangers(directory)
            entries = list(directory.iterdir())
            folders = [entry for entry in entries if entry.is_dir()]
            for folder in folders:
                shutil.rmtree(folder)
            for entry in entries:
                if entry not in folders and entry.name not in _TELLING:
                    entry.unlink()
            sync_removals([directory])
            for telling in _TELLING:
                (directory / telling).unlink(missing_ok=True)
            directory.rmdir()
            sync_removals([self.state_dir])
        self._vms.pop(name, None)


def _require_no_strangers(directory: Path) -> None:
    files = [path.name for path in directory.iterdir() if not path.is_dir()]
    if strangers := sorted(name for name in files if not is_of_a_vm(name)):
        raise StoreError(
            f"{directory} holds what qsnapd has not put there ({', '.join(strangers)}): move that "
            "away first"
        )


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        allow_owner(fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        owner = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StoreError(
            f"the state directory {path.parent} is in use by another qsnapd (pid {owner})"
        ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def _naming(failure: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StoreError(f"{failure}: {exc.strerror}") from exc
