"""Files made once: never over another one, known by inode, durable before anybody relies on them.

Everything here blocks and belongs in a worker thread. A file of somebody else is neither
truncated, replaced nor removed.
"""

import ctypes
import errno
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from qsnapd.errors import Effect, StoreError, StoreFull, TargetRefused
from qsnapd.model.snapshot import FileIdentity

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's own block size
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
_PART_BYTES = 64 << 20
_WRITE_AND_WAIT = 0b111
"""All modes of sync_file_range(2): wait for what is being written, write the rest, wait for it."""
_NO_PARTS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)

_log = logging.getLogger(__name__)

_CAUSES = {
    errno.EEXIST: "it exists already, and an existing file is never overwritten",
    errno.ENOENT: "there is no such file or directory",
    errno.ENOTDIR: "a part of its path is not a directory",
    errno.EACCES: "qsnapd lacks the permission",
    errno.EPERM: "the file system does not allow it",
    errno.EROFS: "the file system is read-only",
    errno.ELOOP: "its path leads through too many symbolic links",
    errno.ENAMETOOLONG: "its name is too long",
    errno.ENOSPC: "the file system is full",
    errno.EDQUOT: "the disk quota is used up",
}


def _refused(path: Path, exc: OSError, verb: str = "create") -> TargetRefused:
    cause = _CAUSES.get(exc.errno or 0) or exc.strerror or "the system gave no reason"
    return TargetRefused(f"cannot {verb} {path}: {cause}")


def create_exclusive(path: Path, *, dir_fd: int | None = None) -> int:
    """Create *path*, empty and for its owner alone (0600); return a descriptor to read and write.

    With *dir_fd*, a relative path begins in that directory, whatever its name is by now.
    On failure: as if never called; what lay at *path*, a dangling link too, is untouched.
    Raises: TargetRefused: with the reason in words.
    """
    try:
        return open_new(path, dir_fd=dir_fd)
    except OSError as exc:
        raise _refused(path, exc) from exc


def open_new(path: Path, *, dir_fd: int | None = None) -> int:
    """The same, for what is not named by a request. Raises: OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600, dir_fd=dir_fd)
    allow_owner(fd)
    return fd


def allow_owner(fd: int, mode: int = 0o600) -> None:
    """Give a new file what an umask has taken from its mode. Raises: OSError."""
    now = stat.S_IMODE(os.fstat(fd).st_mode)
    if now & mode != mode:
        os.chmod(f"/proc/self/fd/{fd}", now | mode)  # fchmod refuses O_PATH


def write_new(path: Path, text: str) -> None:
    """Create the file *path* (0600) with *text* in it, which is synced. Raises: OSError."""
    with open(open_new(path), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def create_directory(path: Path | str, *, mode: int = 0o700, dir_fd: int | None = None) -> None:
    """Make the directory *path*, with this mode whatever the umask is. Raises: OSError."""
    os.mkdir(path, mode, dir_fd=dir_fd)
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        allow_owner(fd, mode)
    finally:
        os.close(fd)


def create_lasting_directory(path: Path, *, mode: int = 0o700) -> None:
    """The same, durable on return. On failure: as if never called. Raises: OSError."""
    create_directory(path, mode=mode)
    try:
        sync_directory(path.parent)
    except OSError:
        path.rmdir()
        raise


def make_directory(path: Path, *, mode: int = 0o700) -> None:
    """Have the directory *path*, and its name on disk; one that exists stays as it is.

    What is missing above it is made likewise. Raises: OSError.
    """
    if not path.parent.exists():
        make_directory(path.parent, mode=mode)
    with suppress(FileExistsError):
        create_lasting_directory(path, mode=mode)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def reopen(fd: int, flags: int) -> int:
    """Open the file behind *fd* once more, whatever its name is by now, with *flags* of its own.

    QEMU wants a migration target that is O_WRONLY, and the new descriptor has a position
    of its own. Raises: StoreError.
    """
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    except OSError as exc:
        raise StoreError(f"cannot reopen a file of ours: {exc.strerror}") from exc


def publish(partial: Path, final: Path) -> None:
    """Rename *partial* to *final* in the same file system, durably, never replacing a file.

    On success: only *final* exists, and survives a power failure. The content is the
    caller's to sync first.
    On failure: *partial* stands; whoever owned *final* keeps it.
    Raises: TargetRefused.
    """
    try:
        try:
            os.link(partial, final, follow_symlinks=False)
            partial.unlink()
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
            # rename() alone would replace a file: take the name first, then replace our own
            os.close(create_exclusive(final))
            partial.rename(final)
        sync_directory(final.parent)
    except OSError as exc:
        raise _refused(final, exc) from exc


def sync_file(fd: int) -> None:
    """Return once content and size of the file are on stable storage. Raises: StoreError."""
    try:
        os.fsync(fd)
    except OSError as exc:
        raise StoreError(f"cannot write a file to stable storage: {exc.strerror}") from exc


def sync_in_parts(fd: int, check: Callable[[], object]) -> None:
    """The same for a large file, *check* being called for every part of it. Raises: StoreError."""
    try:
        _sync_in_parts(fd, check)
    except OSError as exc:
        raise StoreError(f"cannot write a file to stable storage: {exc.strerror}") from exc


def _sync_in_parts(fd: int, check: Callable[[], object]) -> None:
    for start in range(0, os.fstat(fd).st_size, _PART_BYTES):
        check()
        if _libc.sync_file_range(fd, start, _PART_BYTES, _WRITE_AND_WAIT) != 0:
            number = ctypes.get_errno()
            if number in _NO_PARTS:
                break
            # The kernel tells of it once: the fsync to come would know of nothing.
            raise OSError(number, os.strerror(number))
    check()
    os.fsync(fd)


_failed = set[FileIdentity]()
"""Images that could not be synced once."""


def sync_image(fd: int, check: Callable[[], object] = lambda: None) -> None:
    """The same for a disk image, which is there before the job and after it.

    A kernel tells once that it could not write something, and takes it for written then. So
    an image that has failed is not believed again while this process lives; QEMU does the same.
    Raises: StoreError.
    """
    image = identity(fd)
    if image in _failed:
        raise StoreError(
            f"{image.path} could not be written to stable storage before, so that the next power "
            "failure may take away what it holds: look at the kernel's log and at its disk, then "
            "start qsnapd again"
        )
    try:
        _sync_in_parts(fd, check)
    except OSError as exc:
        _failed.add(image)
        raise StoreError(f"cannot write {image.path} to stable storage: {exc.strerror}") from exc


def sync_directory(directory: Path) -> None:
    """Return once the names in *directory* are on stable storage. Raises: OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_removals(directories: Iterable[Path]) -> None:
    """Return once nothing that was removed from *directories* can come back; missing ones are fine.

    A failure is logged: the job that made what may come back is over all the same.
    """
    for directory in sorted(set(directories)):
        try:
            sync_directory(directory)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as exc:
            _log.warning(
                "what was removed from %s may be there again after a power failure: %s",
                directory, exc.strerror,
            )  # fmt: skip


def free_bytes(where: Path | int) -> int:
    """How much an unprivileged writer can still put into the file system of *where*.

    *where*: a directory, or a descriptor. Raises: TargetRefused: there is no such directory.
    """
    try:
        status = os.statvfs(where)
    except OSError as exc:
        raise _refused(Path(str(where)), exc, "use") from exc
    return status.f_bavail * status.f_frsize


def require_space(directory: Path, needed_bytes: int) -> None:
    """Return if *directory* has room for *needed_bytes*. Raises: StoreFull; TargetRefused."""
    if (free := free_bytes(directory)) < needed_bytes:
        raise StoreFull(str(directory), needed_bytes=needed_bytes, free_bytes=free)


def identity(file: Path | int) -> FileIdentity:
    """Which file *file*, a path or a descriptor, is; symbolic links are followed.

    Raises: TargetRefused: it is not there.
    """
    path = Path(os.readlink(f"/proc/self/fd/{file}")) if isinstance(file, int) else file.absolute()
    try:
        status = os.stat(file)
    except OSError as exc:
        raise _refused(path, exc, "use") from exc
    return FileIdentity(path=str(path), device=status.st_dev, inode=status.st_ino)


def allocated_bytes(fd: int) -> int:
    """What the file occupies on disk; holes do not count, delayed allocations may not yet."""
    return os.fstat(fd).st_blocks * _BLOCK_BYTES


def write_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    """Write all of *data* there, however often it takes. Raises: OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


class NotLasting(OSError):
    """It is done, and the next power failure may take it back."""


def replace_file(path: Path, text: str) -> None:
    """Put *text* in place of a file of our own (0600): all or nothing, durable on return.

    Raises: NotLasting: the new one stands. OSError: what stood there stands, or nothing.
    """
    draft = path.with_suffix(".new")
    is_new = not path.exists()
    draft.unlink(missing_ok=True)  # never used again: what failed to be synced may seem to be
    write_new(draft, text)
    draft.rename(path)
    try:
        sync_directory(path.parent)
    except OSError as exc:
        if is_new:
            path.unlink(missing_ok=True)
            raise
        raise NotLasting(exc.errno, exc.strerror, str(path)) from exc


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts (from, to) of [*start*, *end*) that hold data; what lies between reads as zeros.

    In bytes, ascending, apart from each other. A file system that knows no holes reports
    everything as data. Moves the descriptor's position.
    """
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            raise
        if data >= end:
            return
        position = os.lseek(fd, data, os.SEEK_HOLE)
        yield data, min(position, end)


def remove_if_ours(path: Path, inode: int) -> bool:
    """Remove *path* if it still is the file with this *inode*.

    By inode alone: device numbers may change when the host is started anew.
    Returns whether it was removed; False if it is missing or another file.
    Raises: StoreError: it is ours and cannot be removed.
    """
    try:
        # The folder is opened once: by a link in its place it would lead elsewhere then.
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if status.st_ino != inode:
                return False
            os.unlink(path.name, dir_fd=folder)
            return True
        finally:
            os.close(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as exc:
        raise StoreError(f"cannot remove {path}: {exc.strerror}", effect=Effect.PARTIAL) from exc
