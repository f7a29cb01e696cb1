"""Which disk images of a VM qsnapd has made: those alone may it ever remove.

    STATE_DIR/VM/.made.json

It also knows the names of images whose content has moved into another one: QEMU's command
line goes on naming what it was started on.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Literal

from qsnapd.model.base import Frozen
from qsnapd.model.snapshot import AbsolutePath, FileIdentity
from qsnapd.store.record import Record

MADE_NAME = ".made.json"


class MadeFile(Frozen):
    """A disk image that qsnapd has made."""

    file: FileIdentity
    format: Literal["qcow2", "raw"] = "qcow2"


class FormerName(Frozen):
    """The path of an image whose content is in another one now."""

    path: AbsolutePath
    now: FileIdentity


class MadeRecord(Frozen):
    """All of it, as stored."""

    format: Literal[1] = 1
    files: tuple[MadeFile, ...] = ()
    former: tuple[FormerName, ...] = ()
    seen: tuple[MadeFile, ...] = ()
    """What the VM's disks were on when it was last looked at, whoever made that."""


class Made:
    """Of one VM; from `VmStore.made`. Synchronous; may be used from several threads at once."""

    def __init__(self, directory: Path) -> None:
        self._record = Record(directory / MADE_NAME, MadeRecord)
        self._changing = Lock()

    def files(self) -> tuple[MadeFile, ...]:
        """Those that are still there: same path, same inode. Raises: StoreError."""
        return tuple(made for made in self._read().files if _stands(made.file))

    def add(
        self, files: Iterable[FileIdentity], *, image_format: Literal["qcow2", "raw"] = "qcow2"
    ) -> None:
        """Note *files*, which the caller has just made; durable on return. Raises: StoreError."""
        new = [MadeFile(file=file, format=image_format) for file in files]
        with self._changing:
            record = self._read()
            paths = {made.file.path for made in new}
            kept = [m for m in record.files if m.file.path not in paths and _stands(m.file)]
            self._write(record, files=(*kept, *new))

    def seen(self) -> tuple[MadeFile, ...]:
        """What the VM's disks were on when `saw` was last told, as far as it is there."""
        return tuple(seen for seen in self._read().seen if _stands(seen.file))

    def saw(self, files: Iterable[MadeFile]) -> None:
        """Note what a running VM's disks are on; durable on return. Raises: StoreError."""
        with self._changing:
            record = self._read()
            if record.seen != (seen := tuple(files)):
                self._write(record, seen=seen)

    def forget_gone(self) -> None:
        """Drop what is not there any more. Raises: StoreError."""
        with self._changing:
            record = self._read()
            kept = tuple(made for made in record.files if _stands(made.file))
            if kept != record.files:
                self._write(record, files=kept)

    def former(self, chain: Sequence[FileIdentity]) -> tuple[FileIdentity, ...]:
        """What command lines may still call images of *chain*, as identities by path alone.

        Raises: StoreError.
        """
        keys = {(file.path, file.inode) for file in chain}
        return tuple(
            by_path(former.path)
            for former in self._read().former
            if (former.now.path, former.now.inode) in keys
        )

    def moved(self, gone: FileIdentity, now: FileIdentity) -> None:
        """Note that the content of *gone* is in *now*; durable on return, idempotent.

        Raises: StoreError.
        """
        with self._changing:
            record = self._read()
            known = {(former.path, former.now.path): former for former in record.former}
            for former in record.former:
                if (former.now.path, former.now.inode) == (gone.path, gone.inode):
                    known[former.path, now.path] = FormerName(path=former.path, now=now)
            known.pop((gone.path, now.path), None)  # it is the last one
            known[gone.path, now.path] = FormerName(path=gone.path, now=now)
            self._write(record, former=tuple(f for f in known.values() if _stands(f.now)))

    def keep_former(self, is_named: Callable[[str], bool]) -> None:
        """Drop the former names that are not *is_named* by anybody; durable on return.

        But the last one of each image stays: it tells what is older than what the image holds.
        Raises: StoreError.
        """
        with self._changing:
            record = self._read()
            last = {(former.now.path, former.now.inode): former for former in record.former}
            kept = tuple(f for f in record.former if f in last.values() or is_named(f.path))
            if kept != record.former:
                self._write(record, former=kept)

    def _read(self) -> MadeRecord:
        return self._record.read() or MadeRecord()

    def _write(self, record: MadeRecord, **changed: object) -> None:
        self._record.write(record.model_copy(update=changed))


def by_path(path: str) -> FileIdentity:
    """A file known by its name alone."""
    return FileIdentity(path=path, device=0, inode=0)


def _stands(file: FileIdentity) -> bool:
    with suppress(OSError):
        return Path(file.path).stat().st_ino == file.inode  # device numbers may change
    return False
