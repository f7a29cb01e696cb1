"""The files that a snapshot is to be put into, looked at before anything is touched. Blocks.

A file of somebody else is used only where the request says so, or where it is empty.
"""

import errno
import logging
import os
import shutil
import stat
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from qsnapd.errors import ImageInvalid, StoreError, TargetRefused
from qsnapd.image.files import sync_image
from qsnapd.image.qcow2 import Header, read_header
from qsnapd.model.plan import CheckpointPlan, OverlayPlan, Place
from qsnapd.snapshot.taking.room import Room
from qsnapd.threads import Check
from qsnapd.vm.identity import key_of

_log = logging.getLogger(__name__)


def check_targets(
    plan: CheckpointPlan, room: Room, staging: Path, named: Container[str | None] = ()
) -> CheckpointPlan:
    """Refuse what could only fail later: files in the way, no room for the image. Blocks.

    *named*: the overlays' files that the request names; of others the name is ours to choose.
    Returns the plan, knowing now which overlays go into empty files that exist, and with other
    names for those whose own is taken.
    Raises: StoreFull, QuotaUsedUp, TargetRefused.
    """
    if plan.keeps_metadata and os.path.lexists(staging):
        raise TargetRefused(
            f"{staging} is there: a snapshot {plan.name} is being imported, or was begun and never "
            "ended"
        )
    if plan.hook and shutil.which(plan.hook[0]) is None:
        raise TargetRefused(f"the hook of VM {plan.vm}, {plan.hook[0]}, is no program to be run")
    pivots = tuple(
        pivot.model_copy(
            update={
                "overlay": _look_at(pivot.overlay)
                if pivot.overlay.path in named
                else _free(pivot.overlay, plan.token)
            }
        )
        for pivot in plan.pivots
    )
    if plan.memory_file is not None:
        _require_free(Path(plan.memory_file))
    plan = plan.model_copy(update={"pivots": pivots})
    room.require(plan)
    return plan


def _require_free(path: Path) -> None:
    if os.path.lexists(path):
        raise TargetRefused(f"{path} exists already, and an existing file is never overwritten")


def _free(overlay: OverlayPlan, token: str) -> OverlayPlan:
    """The overlay under a name that nobody has: what has its own may be needed yet.

    As when a snapshot of the same name was renamed, or forgotten with its files left there.
    """
    path = Path(overlay.path)
    if overlay.place is not Place.NEW or not os.path.lexists(path):
        return _look_at(overlay)
    free = path.with_name(f"{path.stem}-{token}{path.suffix}")
    partial = free.with_name(f"{free.name}.{token}.partial")
    return _look_at(overlay.model_copy(update={"path": str(free), "partial": str(partial)}))


def _look_at(overlay: OverlayPlan) -> OverlayPlan:
    """What lies where the overlay goes fits the plan, or is an empty file."""
    if overlay.place is not Place.NEW:
        os.close(open_given(overlay))
        return overlay
    try:
        status = os.lstat(overlay.path)
    except OSError:  # free; or nothing can be made there, which making it will say
        return overlay
    if stat.S_ISBLK(status.st_mode):
        raise _mismatch(overlay)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        return overlay.model_copy(update={"place": Place.EMPTY})
    raise TargetRefused(
        f"external snapshot file for disk {overlay.target} already exists and is not a block "
        f"device: {overlay.path}; an existing file is never overwritten: say where else it goes "
        f"(--diskspec {overlay.target},file=PATH), or name the snapshot otherwise"
    )


def open_given(overlay: OverlayPlan) -> int:
    """Open what somebody else has made for the overlay, and see that it is what it should be.

    Returns a descriptor to read and write, for the caller to close.
    Raises: TargetRefused: it is missing, or is not, and why.
    """
    # A device is commonly named by a symbolic link (LVM); a file is what it is.
    # O_EXCL: the kernel refuses a device that is mounted, or part of a volume.
    more = os.O_EXCL if overlay.on_device else os.O_NOFOLLOW
    try:
        fd = os.open(overlay.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | more)
    except FileNotFoundError:
        raise TargetRefused(_missing(overlay)) from None
    except OSError as exc:
        why = exc.strerror
        if overlay.on_device and exc.errno == errno.EBUSY:
            why = "it is in use on this host, mounted or part of a volume"
        raise TargetRefused(
            f"disk {overlay.target}: {overlay.path} cannot be opened: {why}"
        ) from exc
    try:
        _require_fitting(overlay, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _missing(overlay: OverlayPlan) -> str:
    if overlay.place is Place.READY:
        return f"missing existing file for disk {overlay.target}: {overlay.path}"
    return f"block device snapshot target {overlay.path!r} doesn't exist (disk {overlay.target})"


def _mismatch(overlay: OverlayPlan) -> TargetRefused:
    wanted = "a block device" if overlay.on_device else "a file"
    return TargetRefused(
        f"mismatch between configured type for snapshot disk {overlay.target} and what is there: "
        f"{overlay.path} is not {wanted}"
    )


def _require_fitting(overlay: OverlayPlan, fd: int) -> None:
    status = os.fstat(fd)
    is_kind = stat.S_ISBLK if overlay.on_device else stat.S_ISREG
    if not is_kind(status.st_mode):
        raise _mismatch(overlay)
    if overlay.place is Place.EMPTY and status.st_size:
        raise TargetRefused(f"disk {overlay.target}: {overlay.path} is not empty any more")
    with suppress(OSError):
        if os.path.samestat(status, os.stat(overlay.backing)):
            raise TargetRefused(
                f"disk {overlay.target}: {overlay.path} is the very image that the disk is on"
            )
    if overlay.place is Place.READY:
        try:
            header = read_header(fd)
        except (ImageInvalid, OSError) as exc:
            raise TargetRefused(f"disk {overlay.target}: {overlay.path}: {exc}") from exc
        _require_ready(overlay, header)


def _require_ready(overlay: OverlayPlan, header: Header) -> None:
    """An overlay that the caller made is one over this disk, and nothing else."""
    wrong = None
    if header.virtual_size_bytes != overlay.virtual_size_bytes:
        wrong = f"is one of {header.virtual_size_bytes} bytes, the disk has "
        wrong += f"{overlay.virtual_size_bytes}"
    elif header.is_encrypted or header.has_data_file or header.is_corrupt:
        wrong = "is encrypted, keeps its data in another file or is damaged"
    elif header.backing is None:
        wrong = f"is an overlay over nothing, it must be one over {overlay.backing}"
    else:
        below = os.path.join(os.path.dirname(overlay.path), header.backing.removeprefix("file:"))
        key = key_of(os.path.normpath(below))
        if key is None or key != key_of(overlay.backing):
            wrong = f"is an overlay over {header.backing}, it must be one over {overlay.backing}"
    if wrong is None and header.backing_format not in (None, overlay.backing_format):
        wrong = f"says that {overlay.backing} is {header.backing_format}, it is "
        wrong += f"{overlay.backing_format}"
    if wrong is not None:
        raise TargetRefused(f"disk {overlay.target}: {overlay.path} {wrong}")


def flush_disks(plan: CheckpointPlan, check: Check) -> None:
    """Sync the disks' files: before the pause, so that `stop` finds little to flush; and after it.

    QEMU flushes them when they are frozen, but not those that it was told to never flush.
    Blocks. Raises: StoreError; what *check* raises.
    """
    images = {pivot.target: pivot.overlay.backing for pivot in plan.pivots}
    images |= {disk.target: disk.frozen for disk in plan.left_out if disk.target in plan.manual}
    for target, image in images.items():
        try:
            descriptor = os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            _log.debug("cannot pre-flush %s: %s", image, exc)
            continue
        try:
            sync_image(descriptor, check)
        except StoreError as exc:
            raise StoreError(f"disk {target}: {exc}") from exc
        finally:
            os.close(descriptor)
