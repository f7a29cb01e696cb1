"""What a revert will do, and every reason not to: found before the running VM is touched."""

import os
import secrets
import socket
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import trio

from qsnapd.errors import ImageInvalid, WrongState
from qsnapd.model.plan import OverlayPlan, RevertPlan
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest, MemoryImage
from qsnapd.snapshot.finish import verify_image
from qsnapd.snapshot.plan import AFTER, image_stem
from qsnapd.vm.identity import key_of
from qsnapd.vm.launch import MovedDisk, plan_launch


def plan_revert(manifest: Manifest, memory: MemoryImage, *, to_running: bool) -> RevertPlan:
    """Name the new overlays and compute the command line; reads file identities only.

    Raises: Blocked, WrongState: the recorded command line cannot be used again, and why.
    """
    token = secrets.token_hex(4)
    overlays = tuple(_overlay(disk, manifest.name, token) for disk in manifest.disks)
    launch = plan_launch(
        manifest.machine.process,
        manifest.machine,
        [
            MovedDisk(target=disk.target, chain=disk.chain, overlay=overlay.path)
            for disk, overlay in zip(manifest.disks, overlays, strict=True)
        ],
        identify=key_of,
    )
    return RevertPlan(
        token=token,
        vm=manifest.vm,
        name=manifest.name,
        requested_at=datetime.now(UTC),
        to_running=to_running,
        executable=launch.executable,
        argv=launch.argv,
        cwd=launch.cwd,
        memory_file=memory.path,
        image_format=manifest.image_format,
        overlays=overlays,
    )


def _overlay(disk: DiskLayer, snapshot: str, token: str) -> OverlayPlan:
    frozen = Path(disk.frozen)
    path = frozen.with_name(
        f"{image_stem(frozen)}{AFTER}{snapshot}.{disk.target}-{token}.qcow2"
    )
    return OverlayPlan(
        target=disk.target,
        path=str(path),
        partial=str(path.with_name(f"{path.name}.partial")),
        backing=disk.frozen,
        backing_format=disk.frozen_format,
        virtual_size_bytes=disk.virtual_size_bytes,
    )


def check_snapshot(manifest: Manifest) -> None:
    """Refuse a snapshot that would not restore, before anything is touched.

    Runs in a thread of trio's, and stops when its caller is cancelled.

    Raises: WrongState: it holds no memory. ImageInvalid: a file is missing, was replaced or
      is damaged.
    """
    check_cancelled = trio.from_thread.check_cancelled
    if manifest.memory is None:
        raise WrongState(f"snapshot {manifest.name} holds no memory: it cannot be reverted to yet")
    for disk in manifest.disks:
        for file in disk.chain:
            if not _is_still(file):
                raise ImageInvalid(
                    f"disk {disk.target}: {file.path} is missing or is another file than when "
                    f"snapshot {manifest.name} was taken"
                )
    try:
        descriptor = os.open(manifest.memory.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageInvalid(
            f"the memory image {manifest.memory.path} cannot be opened: {exc.strerror}"
        ) from exc
    try:
        _check_image(descriptor, manifest, manifest.memory, check_cancelled)
    finally:
        os.close(descriptor)


def _is_still(file: FileIdentity) -> bool:
    """By inode alone: device numbers may change with a reboot, a device's inode too."""
    try:
        status = os.stat(file.path)
    except OSError:
        return False
    return stat.S_ISBLK(status.st_mode) or status.st_ino == file.inode


def _check_image(
    descriptor: int, manifest: Manifest, memory: MemoryImage, check_cancelled: Callable[[], object]
) -> None:
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes != memory.size_bytes:
        raise ImageInvalid(
            f"the memory image {memory.path} has {size_bytes} bytes, it was saved with "
            f"{memory.size_bytes}"
        )
    verify_image(
        descriptor,
        manifest.image_format,
        manifest.strategy,
        manifest.machine.ram_blocks,
        check_cancelled,
    )


def require_no_qemu(name: str, qmp: Path) -> None:
    """Refuse to start a second QEMU beside one that runs but is not attached.

    Raises: WrongState: somebody serves the monitor.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(qmp))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError:
            pass  # e.g. a full queue of clients: somebody does
    raise WrongState(
        f"VM {name}: a QEMU serves {qmp}, but qsnapd is not attached to it (another client may "
        "hold the monitor): it cannot be ended, and no second one is started beside it"
    )
