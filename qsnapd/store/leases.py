"""Who uses a snapshot's files now: VMs that were started from it, for as long as they run.

    STATE_DIR/VM/.leases.json    beside the snapshots, which never change

A lease is true only while its process lives, so none has to be given back after a crash. And
whoever maps a memory image is found without any record.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from qsnapd.errors import ManifestInvalid, StoreError, WrongState
from qsnapd.image.files import replace_file
from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName

LEASES_NAME = ".leases.json"
_START_TIME_FIELD = 22
"""Of /proc/PID/stat, counted from 1 as proc(5) does."""

_log = logging.getLogger(__name__)


class Lease(Frozen):
    """A VM that runs on files of a snapshot."""

    snapshot: SnapshotName
    holder: VmName
    pid: PositiveInt
    start_time_ticks: NonNegativeInt
    """Since the host booted; with the pid, this is one process and no later one."""
    mapped: bool
    """Its RAM is a mapping of the memory image; else only its disks lie over the frozen ones."""

    @property
    def is_true(self) -> bool:
        """Whether the process lives."""
        return _began(self.pid) == self.start_time_ticks


_LEASES = TypeAdapter(tuple[Lease, ...])


class Leases:
    """The leases of one VM's snapshots; from `VmStore.leases`. Synchronous.

    May be used from several threads at once: clones of one snapshot start together.
    """

    def __init__(self, vm: str, directory: Path) -> None:
        self._vm = vm
        self._path = directory / LEASES_NAME
        self._changing = Lock()
        self._readers: list[tuple[str, str]] = []
        self._changed: dict[str, str] = {}

    @contextmanager
    def reading(self, snapshot: str, what: str) -> Iterator[None]:
        """Keep the files of *snapshot* for the block, in which this daemon reads them.

        *what* is it that does so, e.g. "an export".
        Raises: WrongState: they are being changed.
        """
        if (changer := self._changed.get(snapshot)) is not None:
            raise WrongState(
                f"snapshot {snapshot} of VM {self._vm} cannot be read right now: {changer}"
            )
        reader = (snapshot, what)
        self._readers.append(reader)
        try:
            yield
        finally:
            self._readers.remove(reader)

    @contextmanager
    def changing(self, snapshots: Iterable[str], what: str) -> Iterator[None]:
        """Keep readers from the files of *snapshots* for the block, in which they change.

        *what* is a clause that says why, e.g. "s is being deleted".
        Raises: WrongState: this daemon reads them.
        """
        names = set(snapshots)
        for name in sorted(names):
            self.require_unread(name)
        self._changed |= dict.fromkeys(names, what)
        try:
            yield
        finally:
            for name in names:
                self._changed.pop(name, None)

    def require_unread(self, snapshot: str) -> None:
        """Raise WrongState if this daemon is within a block of `reading` for *snapshot*."""
        readers = [what for name, what in self._readers if name == snapshot]
        if readers:
            raise WrongState(
                f"snapshot {snapshot} of VM {self._vm} is in use: {', '.join(readers)} reads its "
                "files"
            )

    def hold(
        self, snapshot: str, holder: str, pid: int, start_time_ticks: int, *, mapped: bool
    ) -> None:
        """Record that VM *holder* runs as this process from *snapshot*; durable on return.

        Raises: StoreError.
        """
        lease = Lease(
            snapshot=snapshot,
            holder=holder,
            pid=pid,
            start_time_ticks=start_time_ticks,
            mapped=mapped,
        )
        with self._changing:
            self._write((*(known for known in self._true() if known != lease), lease))

    def release(self, holder: str, pid: int) -> None:
        """Forget what the process held; no harm if it held nothing. Raises: StoreError."""
        with self._changing:
            known = self._true()
            kept = tuple(lease for lease in known if (lease.holder, lease.pid) != (holder, pid))
            if kept != known:
                self._write(kept)

    def rename(self, snapshot: str, new_name: str) -> None:
        """Whoever runs on *snapshot* runs on what is called so now. Raises: StoreError."""
        with self._changing:
            known = self._true()
            if any(lease.snapshot == snapshot for lease in known):
                update = {"snapshot": new_name}
                self._write(
                    tuple(
                        lease.model_copy(update=update) if lease.snapshot == snapshot else lease
                        for lease in known
                    )
                )

    def forget(self, snapshot: str) -> None:
        """Forget all leases of a snapshot that is gone. Raises: StoreError."""
        with self._changing:
            known = self._read()
            if any(lease.snapshot == snapshot for lease in known):
                self._write(tuple(lease for lease in known if lease.snapshot != snapshot))

    def prune(self) -> None:
        """Forget what ended processes held; what is not understood, too. Raises: StoreError."""
        with self._changing:
            self._write(self._true())

    def recorded(self) -> tuple[Lease, ...]:
        """All leases that are written down, true or not.

        Raises: ManifestInvalid: they are not understood. StoreError.
        """
        try:
            return self._load()
        except ValidationError as exc:
            words = f"{self._path} is not understood: {exc.errors()[0]['msg']}"
            raise ManifestInvalid(words) from exc

    def all(self) -> tuple[Lease, ...]:
        """The leases whose processes live, oldest first. Raises: StoreError."""
        return self._true()

    def holders(self, snapshot: str) -> tuple[Lease, ...]:
        """The leases of *snapshot* whose processes live, oldest first. Raises: StoreError."""
        return tuple(lease for lease in self._true() if lease.snapshot == snapshot)

    def require_unused(
        self, snapshot: str, image: Path | None, *, may_use_disks: str | None = None
    ) -> None:
        """Return if nothing that runs needs the files of *snapshot*.

        But the disks of the VM *may_use_disks* may lie over its own.
        *image*: its memory image, if it has one; whoever maps it counts, leased or not.
        Preconditions: no job that could start a VM from it is under way. Blocks: looks at
        every process of the host that may be looked at.
        Raises: WrongState: somebody does, and who. StoreError.
        """
        users = {
            lease.pid: f"VM {lease.holder} (pid {lease.pid}) runs on "
            + ("its memory image and its disks" if lease.mapped else "its disks")
            for lease in self.holders(snapshot)
            if lease.mapped or lease.holder != may_use_disks
        }
        for pid in mapped_by(image) if image is not None else ():
            users.setdefault(pid, f"process {pid} ({_program(pid)}) maps its memory image")
        readers = [f"{what} reads its files" for name, what in self._readers if name == snapshot]
        if users or readers:
            raise WrongState(
                f"snapshot {snapshot} of VM {self._vm} is in use: "
                f"{'; '.join([*users.values(), *readers])}"
            )

    def _true(self) -> tuple[Lease, ...]:
        return tuple(lease for lease in self._read() if lease.is_true)

    def _read(self) -> tuple[Lease, ...]:
        try:
            return self._load()
        except ValidationError as exc:
            # What is mapped is found without it; the next lease replaces it.
            _log.warning("%s is not understood and ignored: %s", self._path, exc.errors()[0]["msg"])
            return ()

    def _load(self) -> tuple[Lease, ...]:
        try:
            return _LEASES.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except OSError as exc:
            raise StoreError(f"cannot read {self._path}: {exc.strerror}") from exc

    def _write(self, leases: tuple[Lease, ...]) -> None:
        records: list[Any] = _LEASES.dump_python(leases, mode="json")
        try:
            replace_file(self._path, json.dumps(records, indent=1) + "\n")
        except OSError as exc:
            raise StoreError(f"cannot write {self._path}: {exc.strerror}") from exc


def mapped_by(file: Path) -> tuple[int, ...]:
    """The processes that map *file* into their memory, of those that may be looked at."""
    try:
        status = os.stat(file)
    except OSError:
        return ()
    key = (status.st_dev, status.st_ino)
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    return tuple(pid for pid in pids if any(key == mapped for mapped in _mapped(pid, key[1])))


def _mapped(pid: int, inode: int) -> Iterator[tuple[int, int]]:
    """Device and inode of the files with this *inode* number that a process maps."""
    try:
        text = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:  # it has ended, or is not ours to look into
        return
    for line in text.splitlines():
        # address perms offset dev inode path
        fields = line.split(maxsplit=5)
        if len(fields) < 5 or int(fields[4]) != inode:
            continue
        major, _, minor = fields[3].partition(b":")
        yield os.makedev(int(major, 16), int(minor, 16)), inode
        # Some file systems (btrfs) show another device number here than stat does.
        if len(fields) == 6:
            try:
                status = os.stat(fields[5])
            except (OSError, ValueError):
                continue
            yield status.st_dev, status.st_ino


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the host booted; None if there is none."""
    try:
        # Field 2, the name, is in parentheses and may hold anything, ")" included.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    state, start_time = fields[0], fields[_START_TIME_FIELD - 3]
    return None if state in (b"Z", b"X") else int(start_time)


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "which has ended meanwhile"
