"""The frozen images of a disk, opened once and read past a running QEMU.

They were in the hands of a QEMU. So qemu-img runs as their owner, and is told by descriptor
what lies over what: no header decides which file of this host gets into an export.
"""

import json
import os
import stat
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import trio

from qsnapd.errors import ImageInvalid, StoreError, WrongState
from qsnapd.image.qcow2 import Header, is_qcow2, read_header
from qsnapd.image.sparse import data_bytes
from qsnapd.model.snapshot import DiskLayer, FileIdentity

CONVERT_LIMIT_S = 24 * 3600.0


@dataclass(frozen=True)
class Layer:
    """One image of a chain, open for reading."""

    path: str
    fd: int
    format: Literal["qcow2", "raw"]
    header: Header | None
    """None: a raw image."""

    @property
    def is_device(self) -> bool:
        return stat.S_ISBLK(os.fstat(self.fd).st_mode)

    @property
    def data_bytes(self) -> int:
        """How much there is to read. Blocks."""
        return os.lseek(self.fd, 0, os.SEEK_END) if self.is_device else data_bytes(self.fd)


def open_chain(disk: DiskLayer, descriptors: ExitStack) -> tuple[Layer, ...]:
    """Open a disk's frozen image and all below it, newest first; *descriptors* closes them.

    Blocks.
    Raises: ImageInvalid: one is missing, another file than when the snapshot was taken, or
      names other files. WrongState: one is of a kind that is not exported.
    """
    layers: list[Layer] = []
    image_format: str | None = disk.frozen_format
    for left, file in zip(reversed(range(len(disk.chain))), disk.chain, strict=True):
        fd = _open(disk, file)
        descriptors.callback(os.close, fd)
        layer = _layer(disk, file, fd, image_format)
        names_another = layer.header is not None and layer.header.backing is not None
        if names_another != (left > 0):
            raise ImageInvalid(
                f"disk {disk.target}: {file.path} names other images below it than when the "
                "snapshot was taken"
            )
        image_format = layer.header.backing_format if layer.header else None
        layers.append(layer)
    if not layers:
        raise WrongState(f"disk {disk.target}: the snapshot does not say which images it has")
    return tuple(layers)


def _open(disk: DiskLayer, file: FileIdentity) -> int:
    # The names are the kernel's own: a link in the place of one was put there since.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(file.path, flags)
    except OSError as exc:
        raise ImageInvalid(
            f"disk {disk.target}: {file.path} cannot be opened: {exc.strerror}"
        ) from exc
    if not _is_the_one(fd, file):
        os.close(fd)
        raise ImageInvalid(
            f"disk {disk.target}: {file.path} is another file than when the snapshot was taken"
        )
    return fd


def _is_the_one(fd: int, file: FileIdentity) -> bool:
    """By inode alone: device numbers may change with a reboot, a device's inode too."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):  # no folder of a VM's user leads to one
        return file.path.startswith("/dev/") and os.readlink(f"/proc/self/fd/{fd}") == file.path
    return stat.S_ISREG(status.st_mode) and status.st_ino == file.inode


def _layer(disk: DiskLayer, file: FileIdentity, fd: int, image_format: str | None) -> Layer:
    try:
        image_format = image_format or ("qcow2" if is_qcow2(fd) else "raw")
        if image_format == "raw":
            return Layer(file.path, fd, "raw", None)
        if image_format != "qcow2":
            raise WrongState(
                f"disk {disk.target}: {file.path} has the format {image_format}: only qcow2 and "
                "raw images are exported"
            )
        header = read_header(fd)
    except ImageInvalid as exc:
        raise ImageInvalid(f"disk {disk.target}: {file.path}: {exc}") from exc
    except OSError as exc:
        raise StoreError(f"cannot read {file.path}: {exc.strerror}") from exc
    for refused, what in (
        (header.has_data_file, "keeps its data in another file"),
        (header.is_encrypted, "is encrypted"),
        (header.is_corrupt, "is marked as damaged"),
    ):
        if refused:
            raise WrongState(f"disk {disk.target}: {file.path} {what}: it cannot be exported")
    return Layer(file.path, fd, "qcow2", header)


async def flatten(layers: Sequence[Layer], target_fd: int, *, qemu_img: str) -> None:
    """Fill the empty file *target_fd* with a qcow2 image of what the guest saw in *layers*.

    Raises: WrongState: an image names another file meanwhile, or nobody may read them all.
      StoreError.
    """
    await _convert(_node(layers), layers, target_fd, "qcow2", qemu_img=qemu_img)
    for layer in layers:
        if layer.format == "qcow2":
            await trio.to_thread.run_sync(_require_own_data, layer.path, layer.fd)


async def copy_raw(layer: Layer, target_fd: int, *, qemu_img: str) -> None:
    """Fill the empty file *target_fd* with a raw image, zeros left out. Raises: StoreError."""
    await _convert(_node([layer]), [layer], target_fd, "raw", qemu_img=qemu_img)


async def set_backing(
    layer: Layer, target_fd: int, name: str, image_format: str, *, qemu_img: str
) -> None:
    """Make a copy of *layer* name *name* as the image below it.

    Raises: WrongState: it names another file since it was looked at. StoreError.
    """
    await trio.to_thread.run_sync(_require_own_data, layer.path, target_fd)
    words = ["rebase", "-q", "-u", "-f", "qcow2", "-F", image_format, "-b", name]
    await _run([qemu_img, *words, f"/proc/self/fd/{target_fd}"], [layer], target_fd)


def _require_own_data(path: str, fd: int) -> None:
    """Refuse an image that has come to keep its data elsewhere. Raises: WrongState, StoreError."""
    try:
        if not read_header(fd).has_data_file:
            return
    except OSError as exc:
        raise StoreError(f"cannot read {path}: {exc.strerror}") from exc
    raise WrongState(f"{path} keeps its data in another file by now: it cannot be exported")


async def _convert(
    node: dict[str, Any], layers: Sequence[Layer], target_fd: int, to: str, *, qemu_img: str
) -> None:
    source = "json:" + json.dumps({**node, "read-only": True, "force-share": True})
    command = [qemu_img, "convert", "-q", "-O", to, source, f"/proc/self/fd/{target_fd}"]
    await _run(command, layers, target_fd)


def _node(layers: Sequence[Layer]) -> dict[str, Any]:
    """The whole chain by descriptor; nothing is left for headers to say."""
    node: dict[str, Any] | None = None
    for layer in reversed(layers):
        above: dict[str, Any] = {
            "driver": layer.format,
            "file": {
                "driver": "host_device" if layer.is_device else "file",
                "filename": f"/proc/self/fd/{layer.fd}",
            },
        }
        if layer.format == "qcow2":
            above["backing"] = node
        node = above
    assert node is not None, "a chain has an image"
    return node


async def _run(command: list[str], layers: Sequence[Layer], target_fd: int) -> None:
    """Run qemu-img on *layers* and the file it writes, as the images' owner."""
    owner = _owner(layers)
    identity: dict[str, Any] = {}
    try:
        if owner is not None:
            os.fchown(target_fd, owner.st_uid, owner.st_gid)
            identity = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}
        with trio.fail_after(CONVERT_LIMIT_S):
            await trio.run_process(
                command,
                capture_stdout=True,
                capture_stderr=True,
                pass_fds=(*(layer.fd for layer in layers), target_fd),
                **identity,
            )
    except subprocess.CalledProcessError as exc:
        words = exc.stderr.decode(errors="replace").strip()
        raise StoreError(f"cannot copy {layers[0].path}: {words}") from exc
    except FileNotFoundError as exc:
        raise StoreError(
            f"cannot copy {layers[0].path}: {exc.filename} is missing (qemu-img comes with "
            "qemu-utils; the config may name another)"
        ) from exc
    except OSError as exc:
        raise StoreError(
            f"cannot run {command[0]} as the owner of {layers[0].path}: {exc.strerror}"
        ) from exc
    except trio.TooSlowError:
        raise StoreError(f"{command[0]} took longer than {CONVERT_LIMIT_S:g} s") from None
    finally:
        if identity:
            with suppress(OSError):
                os.fchown(target_fd, os.geteuid(), os.getegid())


def _owner(layers: Sequence[Layer]) -> os.stat_result | None:
    """As whom images are read that are not root's; None: as whoever this is.

    Raises: WrongState: only root may read all of them. Their owners can change headers at any
      time, and root would open whatever file they name.
    """
    if os.geteuid() != 0:
        return None
    owners = [(layer, os.fstat(layer.fd)) for layer in layers]
    others = [(layer, status) for layer, status in owners if status.st_uid != 0]
    for _, status in others:
        if _may_read_all(status, layers):
            return status
    for layer, status in others:
        if layer.format == "qcow2":
            raise WrongState(
                f"{layer.path} belongs to user {status.st_uid}, who may not read all images of "
                "the disk: let one user read them all, then export again"
            )
    return None


def _may_read_all(user: os.stat_result, layers: Sequence[Layer]) -> bool:
    statuses = [os.fstat(layer.fd) for layer in layers]
    return all(
        status.st_uid == user.st_uid
        or (status.st_gid == user.st_gid and status.st_mode & stat.S_IRGRP)
        or status.st_mode & stat.S_IROTH
        for status in statuses
    )
