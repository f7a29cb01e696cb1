"""File systems of our own, which fill up, break or stall when they are told to. They need root."""

import fcntl
import os
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from pathlib import Path

import trio

UNMOUNT_LIMIT_S = 30.0
MIB = 1 << 20

_SHUTDOWN = 0x8004_587D
"""FS_IOC_SHUTDOWN, linux/fs.h."""
_WITHOUT_FLUSH = struct.pack("=I", 2)


class Kind(StrEnum):
    TMPFS = "tmpfs"
    EXT4 = "ext4"
    XFS = "xfs"
    BTRFS = "btrfs"


_MAKE = {
    Kind.EXT4: ("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    Kind.XFS: ("mkfs.xfs", "-q"),
    Kind.BTRFS: ("mkfs.btrfs", "-q"),
}


class Medium:
    """A mounted file system; see `open_medium`."""

    def __init__(self, kind: Kind, path: Path, image: Path, size_bytes: int) -> None:
        self.kind = kind
        self.path = path
        self._image = image
        self._size_bytes = size_bytes
        self._filler = path / "filler"

    async def mount(self) -> None:
        if self.kind is Kind.TMPFS:
            await run("mount", "-t", "tmpfs", "-o", f"size={self._size_bytes}", "tmpfs", self.path)
        else:
            # A device of its own: `mount -o loop` takes the one that a QEMU may still hold.
            device = (await run("losetup", "--find", "--show", self._image)).strip()
            options = ("-o", "errors=remount-ro") if self.kind is Kind.EXT4 else ()
            await run("mount", *options, device, self.path)
            await run("losetup", "--detach", device)  # as soon as nobody uses it

    async def unmount(self) -> None:
        """Also if somebody has a file of it open: a QEMU may."""
        await run("umount", "--lazy", self.path)

    @property
    def free_bytes(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def fill(self, *, leaving_bytes: int) -> None:
        """Let somebody else occupy all but *leaving_bytes*, or hardly less than that."""
        with self._filler.open("ab") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            while (more_bytes := self.free_bytes - leaving_bytes) > 0:
                with suppress(OSError):  # what it needs to note that itself it cannot give
                    os.posix_fallocate(file.fileno(), size_bytes, more_bytes)
                    size_bytes += more_bytes
                    continue
                if not more_bytes // 2:
                    return
                leaving_bytes += more_bytes // 2

    def clear(self) -> None:
        """Take away what `fill` has put there."""
        self._filler.unlink(missing_ok=True)

    async def limit(self, size_bytes: int) -> None:
        """Give it a quota; btrfs only."""
        await run("btrfs", "quota", "enable", self.path)
        await run("btrfs", "qgroup", "limit", str(size_bytes), self.path)

    async def lift(self) -> None:
        """Take the quota away: all of it, for a limit that is used up cannot be raised."""
        await run("btrfs", "quota", "disable", self.path)

    async def stall(self) -> None:
        """Let every writer wait."""
        await run("fsfreeze", "--freeze", self.path)

    async def go_on(self) -> None:
        await run("fsfreeze", "--unfreeze", self.path)

    def shut_down(self) -> None:
        """Let all of it fail, as when its hardware does (EIO), until it is mounted again."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, _WITHOUT_FLUSH)
        finally:
            os.close(fd)

    def become_read_only(self) -> None:
        """As ext4 does by itself when it finds itself damaged (EROFS); until mounted again."""
        number = os.stat(self.path).st_dev
        device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
        (Path("/sys/fs/ext4") / device.name / "trigger_fs_error").write_text("planted")


@asynccontextmanager
async def open_medium(kind: Kind, folder: Path, size_bytes: int) -> AsyncIterator[Medium]:
    """Have a new file system, mounted in *folder*, for the block."""
    path, image = folder / str(kind), folder / f"{kind}.image"
    path.mkdir(parents=True)
    if kind is not Kind.TMPFS:
        with image.open("xb") as file:
            file.truncate(size_bytes)
        await run(*_MAKE[kind], image)
    medium = Medium(kind, path, image, size_bytes)
    await medium.mount()
    try:
        yield medium
    finally:
        with trio.fail_after(UNMOUNT_LIMIT_S, shield=True):
            await succeeds("fsfreeze", "--unfreeze", path)
            await succeeds("umount", "--lazy", path)


async def run(*command: object) -> str:
    """Returns what it printed. Raises: AssertionError: it failed."""
    done = await trio.run_process(
        [str(word) for word in command], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
    return bytes(done.stdout).decode()


async def succeeds(*command: object) -> bool:
    done = await trio.run_process(
        [str(word) for word in command],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return done.returncode == 0
