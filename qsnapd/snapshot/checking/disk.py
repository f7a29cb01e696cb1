"""Files that snapshots consist of, and those that were to become some: read without any trust.

Everything here blocks. Nothing is waited for, no link is followed.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qsnapd.errors import ImageInvalid, VmError
from qsnapd.image.qcow2 import MAGIC, Header, is_qcow2, read_header
from qsnapd.model.snapshot import FileIdentity, Manifest
from qsnapd.snapshot.taking.plan_disks import image_stem
from qsnapd.vm.identity import key_of, plain_name
from qsnapd.vm.proc import FileKey

FOLDER_LIMIT = 100_000
"""Entries of one folder that are looked through for leftovers."""
_LEFTOVER = re.compile(r"[.-](?P<token>[0-9a-f]{8})(\.qcow2)?\.partial$")
"""How the files end that a job makes before it gives them their names."""
_MEMORY_MAGIC = b"QEVM"


@dataclass(frozen=True)
class FileFact:
    """What lies at a path."""

    path: str
    missing: bool = False
    problem: str | None = None
    """Why it cannot be looked at, though it is there."""
    key: FileKey = (0, 0)
    size_bytes: int = 0
    is_device: bool = False
    is_qcow2: bool = False
    header: Header | None = None
    header_problem: str | None = None
    backing_key: FileKey | None = None
    """What the name in the header leads to."""


@dataclass(frozen=True)
class Leftover:
    """A file that a job had not given its name yet."""

    path: str
    token: str
    key: FileKey
    is_old: bool


def look_at(path: str) -> FileFact:
    """Look at one file; its header is read without trusting it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except (FileNotFoundError, NotADirectoryError):
        return FileFact(path, missing=True)
    except OSError as exc:
        return FileFact(path, problem=exc.strerror or "the system gave no reason")
    try:
        return _look(path, fd)
    except OSError as exc:
        return FileFact(path, problem=exc.strerror or "the system gave no reason")
    finally:
        os.close(fd)


def _look(path: str, fd: int) -> FileFact:
    status = os.fstat(fd)
    is_device = stat.S_ISBLK(status.st_mode)
    if not (is_device or stat.S_ISREG(status.st_mode)):
        return FileFact(path, problem="it is no file")
    header, complaint = None, None
    if qcow2 := is_qcow2(fd):
        try:
            header = read_header(fd)
        except ImageInvalid as exc:
            complaint = str(exc)
    return FileFact(
        path=path,
        key=(status.st_dev, status.st_ino),
        size_bytes=os.lseek(fd, 0, os.SEEK_END),
        is_device=is_device,
        is_qcow2=qcow2,
        header=header,
        header_problem=complaint,
        backing_key=_led_to(path, header),
    )


def _led_to(path: str, header: Header | None) -> FileKey | None:
    if header is None or header.backing is None:
        return None
    try:
        name = plain_name(header.backing)
    except VmError:  # it is no name of a file
        return None
    return key_of(os.path.join(os.path.dirname(path), name.removeprefix("file:")))


def find_leftovers(
    manifests: Iterable[Manifest],
    made: Sequence[FileIdentity],
    *,
    apart: Path,
    before_s: float,
) -> Iterator[Leftover]:
    """Unfinished files beside those that the snapshots name, which look like ours.

    *apart*: the VM's part of the store, where memory is not looked for. *before_s*: what
    is older counts as old.
    """
    stems: dict[str, set[str]] = {}
    memory_folders = set[str]()
    for manifest in manifests:
        for disk in manifest.disks:
            for file in disk.chain:
                folder, name = os.path.split(file.path)
                stems.setdefault(folder, set()).add(image_stem(Path(name)))
        if manifest.memory is not None:
            memory_folders.add(os.path.dirname(manifest.memory.path))
    for file in made:
        folder, name = os.path.split(file.path)
        stems.setdefault(folder, set()).add(image_stem(Path(name)))
    for folder in sorted({*stems, *memory_folders}):
        if Path(folder).is_relative_to(apart) and folder not in stems:
            continue  # what lies in the store is looked at by name
        for name, token in _unfinished(folder):
            is_disk = image_stem(Path(name)) in stems.get(folder, ())
            heads = (b"", MAGIC) if is_disk else (_MEMORY_MAGIC,)
            if found := _leftover(folder, name, token, before_s, heads):
                yield found


def _unfinished(folder: str) -> Iterator[tuple[str, str]]:
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(FOLDER_LIMIT), entries, strict=False):
                if found := _LEFTOVER.search(entry.name):
                    yield entry.name, found["token"]
    except OSError:
        return  # the files that should be there are missed by others


def _leftover(
    folder: str, name: str, token: str, before_s: float, heads: Sequence[bytes]
) -> Leftover | None:
    """The file, if it begins with one of *heads*."""
    path = os.path.join(folder, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return None
        head = os.pread(fd, 4, 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    if head not in heads:
        return None
    key = (status.st_dev, status.st_ino)
    return Leftover(path, token, key, is_old=status.st_ctime < before_s)
