"""Merging an overlay back when its QEMU is gone: offline, and trusting nobody's headers.

The overlay was in the hands of a QEMU and lies in its owner's folder. So qemu-img runs as
that owner, is told by descriptor what lies over what instead of reading it from the files,
and nothing is merged into an image that has been written to since.
"""

import json
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from qsnapd.errors import ImageInvalid, StoreError
from qsnapd.image.files import sync_image
from qsnapd.image.qcow2 import read_header
from qsnapd.model.plan import PivotPlan
from qsnapd.threads import SLOW

MERGE_LIMIT_S = 900.0
_HEADER_BYTES = 104
_FEATURES = slice(72, 80)
"""Of a qcow2 header, version 3: incompatible features, big-endian."""
_EXTERNAL_DATA_FILE = 1 << 2
_LOCKED = re.compile(r'Failed to get (shared )?"\w[\w ]*" lock')
_IN_USE = (
    "another process has one of the two open, as a QEMU that was started since, without what the "
    "overlay holds. Shut that down, and it is tried again"
)


async def holds_data(pivot: PivotPlan, inodes: frozenset[int], *, qemu_img: str) -> bool:
    """Whether there is anything in the overlay of *pivot*, and it is the job's.

    *inodes* are the files the job has made or was given; an overlay that is none of them, or
    is gone, is left alone; of one on a block device, whose name gets another inode with each
    start of the host, what it says it covers is looked at instead. qemu-img takes the overlay's
    lock: one that a QEMU has open is no leftover. The image below may be in use.

    Raises: StoreError: it cannot be looked at.
    """
    with _opened(pivot, inodes) as pair:
        if pair is None:
            return False
        mapping = json.loads(
            await _run([qemu_img, "map", "--output=json", _by_itself(pair[0])], *pair)
        )
        return any(extent["present"] for extent in mapping)


def require_unwritten(pivot: PivotPlan, inodes: frozenset[int]) -> None:
    """Refuse to merge into an image that has been written to since. Blocks.

    *inodes*: as above. Raises: StoreError.
    """
    with _opened(pivot, inodes) as pair:
        if pair is None or not _written_at(pair[1]) > _written_at(pair[0]) > 0:
            return
    raise StoreError(
        f"{pivot.overlay.backing} was written to after {pivot.overlay.path}: the VM has been "
        "started from it again, and merging would destroy what it wrote. The overlay holds what "
        "the guest wrote last before that: look at it, then remove it"
    )


async def merge_offline(pivot: PivotPlan, inodes: frozenset[int], *, qemu_img: str) -> None:
    """Write what the overlay of *pivot* holds into the image below it; durable on return.

    *inodes*: as above. On failure: nothing is lost; the overlay still holds it all, and doing it
    again is right.
    Raises: StoreError: it could not be merged.
    """
    with _opened(pivot, inodes) as pair:
        if pair is None:
            return
        source = _image_options(pivot, *pair)
        await _run([qemu_img, "commit", "-q", "-d", "--image-opts", source], *pair)
        await trio.to_thread.run_sync(sync_image, pair[1], limiter=SLOW)


def _written_at(fd: int) -> int:
    """In ns; 0: writing to a block device does not change the time of its name."""
    status = os.fstat(fd)
    return 0 if stat.S_ISBLK(status.st_mode) else status.st_mtime_ns


@contextmanager
def _opened(pivot: PivotPlan, inodes: frozenset[int]) -> Iterator[tuple[int, int] | None]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    follow = os.O_NOFOLLOW if pivot.overlay.on_device else 0  # a device may be named by a link
    try:
        overlay = os.open(pivot.overlay.path, flags & ~follow)
    except FileNotFoundError:
        yield None
        return
    except OSError as exc:
        raise StoreError(f"cannot open {pivot.overlay.path}: {exc.strerror}") from exc
    try:
        # By inode alone: device numbers may change with a reboot.
        status = os.fstat(overlay)
        if pivot.overlay.on_device:
            is_ours = stat.S_ISBLK(status.st_mode) and bool(inodes) and _covers(overlay, pivot)
        else:
            is_ours = status.st_ino in inodes
        if not is_ours:
            yield None
            return
        header = os.pread(overlay, _HEADER_BYTES, 0)
        if int.from_bytes(header[_FEATURES], "big") & _EXTERNAL_DATA_FILE:
            raise StoreError(f"{pivot.overlay.path} has been altered: it is not merged")
        try:
            base = os.open(pivot.overlay.backing, flags)
        except OSError as exc:
            raise StoreError(f"cannot open {pivot.overlay.backing}: {exc.strerror}") from exc
        try:
            yield overlay, base
        finally:
            os.close(base)
    finally:
        os.close(overlay)


def _covers(overlay: int, pivot: PivotPlan) -> bool:
    try:
        header = read_header(overlay)
    except (ImageInvalid, OSError):
        return False
    return (header.backing, header.virtual_size_bytes) == (
        pivot.overlay.backing,
        pivot.overlay.virtual_size_bytes,
    )


def _image_options(pivot: PivotPlan, overlay: int, base: int) -> str:
    options = {
        "driver": "qcow2",
        "file.driver": _driver(overlay),
        "file.filename": f"/proc/self/fd/{overlay}",
        "backing.driver": pivot.overlay.backing_format,
        "backing.file.driver": _driver(base),
        "backing.file.filename": f"/proc/self/fd/{base}",
    }
    return ",".join(f"{name}={value}" for name, value in options.items())


def _by_itself(overlay: int) -> str:
    """The overlay as if nothing were below it."""
    file = {"driver": _driver(overlay), "filename": f"/proc/self/fd/{overlay}"}
    return f"json:{json.dumps({'driver': 'qcow2', 'file': file, 'backing': None})}"


def _driver(fd: int) -> str:
    return "host_device" if stat.S_ISBLK(os.fstat(fd).st_mode) else "file"


async def _run(command: list[str], overlay: int, base: int) -> bytes:
    """Run qemu-img as the overlay's owner; returns what it printed."""
    owner = os.fstat(overlay)
    identity: dict[str, Any] = {}
    if os.geteuid() == 0 and owner.st_uid != 0:
        identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
    try:
        with trio.fail_after(MERGE_LIMIT_S):
            done = await trio.run_process(
                command,
                capture_stdout=True,
                capture_stderr=True,
                pass_fds=(overlay, base),
                **identity,
            )
    except subprocess.CalledProcessError as exc:
        complaint = exc.stderr.decode(errors="replace").strip()
        raise StoreError(_IN_USE if _LOCKED.search(complaint) else complaint) from exc
    except OSError as exc:
        raise StoreError(f"cannot run {command[0]}: {exc.strerror}") from exc
    except trio.TooSlowError:
        raise StoreError(f"{command[0]} took longer than {MERGE_LIMIT_S:g} s") from None
    return bytes(done.stdout)
