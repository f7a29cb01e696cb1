"""The disks of a running VM, as QEMU's block graph tells them."""

import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from qsnapd.errors import CommandRefused
from qsnapd.model.base import Frozen
from qsnapd.model.snapshot import FileIdentity
from qsnapd.model.vm import DeviceKind, DiskInfo
from qsnapd.qmp.block import BitmapInfo, BlockInfo, NodeInfo, QueryBlock
from qsnapd.qmp.commands import FdsetInfo, QomGet, QueryFdsets
from qsnapd.qmp.session import QmpSession
from qsnapd.threads import in_thread
from qsnapd.vm.identity import plain_name, resolve_image_path
from qsnapd.vm.layer_names import read_layer_names
from qsnapd.vm.proc import FileKey, open_files

FDSET_PREFIX = "/dev/fdset/"

_TARGET_PREFIXES = (
    ("virtio-blk", "vd"),
    ("vhost-user-blk", "vd"),
    ("scsi-", "sd"),
    ("usb-", "sd"),
    ("ide-", "hd"),
    ("nvme", "nvme"),
    ("floppy", "fd"),
)
_LONGEST_NUMBER = 20
_TARGET = re.compile(r"[^/\x00]{1,128}")
_PASSED_THROUGH = ("scsi-block", "scsi-generic")


class Disk(Frozen):
    """One device with a medium, or with a slot for one."""

    target: str
    """libvirt's kind of name: "vda" for the first virtio disk, "hda", "sda" ..."""
    device: str
    qdev: str | None
    node: str
    """The node the device uses: the active layer."""
    format: str
    filename: str
    """As QEMU names it; empty if there is no medium."""
    chain: tuple[FileIdentity, ...]
    """The images seen from here, active layer first; shorter than `depth` if one is not found."""
    depth: int
    virtual_size_bytes: int
    cluster_size_bytes: int | None
    extended_l2: bool
    cache_direct: bool
    cache_no_flush: bool
    detect_zeroes: str
    bitmaps: tuple[BitmapInfo, ...]
    left_out: str | None
    """Why snapshots leave it out, if they do."""
    refusal: str | None = None
    """Why no overlay may be put over it, though it is writable."""
    kind: DeviceKind = "disk"
    active: bool = True
    """False: QEMU has let go of it after a migration, and cannot write to it."""

    @property
    def path(self) -> str | None:
        """The active layer's file, if it could be found from here."""
        return self.chain[0].path if self.chain else None

    def answers_to(self, word: str) -> bool:
        """Whether *word* names this disk: target, device, node or a path."""
        return word in {self.target, self.device, self.qdev, self.node, self.path} - {"", None} or (
            self.qdev is not None and word in self.qdev.split("/")
        )

    def info(self) -> DiskInfo:
        """What clients see. Blocks: looks at the file."""
        status = None
        if self.path is not None:
            with suppress(OSError):  # gone meanwhile, like the disk perhaps
                status = os.stat(self.path)
        is_file = status is not None and stat.S_ISREG(status.st_mode)
        return DiskInfo(
            type="block" if status is not None and not is_file else "file",
            device=self.kind,
            size_bytes=status.st_size if status and is_file else None,
            allocated_bytes=status.st_blocks * 512 if status and is_file else None,
            target=self.target,
            node=self.node,
            format=self.format,
            path=self.path,
            virtual_size_bytes=self.virtual_size_bytes,
            chain_depth=self.depth,
            left_out=self.left_out,
        )


async def read_disks(session: QmpSession, pid: int) -> tuple[Disk, ...]:
    """Ask QEMU for its disks, with the files behind them as process *pid* sees them."""
    devices = await session.execute(QueryBlock())
    fdsets = await session.execute(QueryFdsets())
    types = [await _type(session, device) for device in devices]
    shared = [await _property(session, device, "share-rw") is True for device in devices]
    names = await read_layer_names(session, devices)
    files = await in_thread(open_files, pid)
    named = {fdset.fdset_id: path for fdset in fdsets if (path := _handed_path(fdset))}
    return tuple(
        _disk(
            *(device, target, device_type, its_names, partial(_find, pid, files, named)),
            is_shared=is_shared,
        )
        for device, device_type, is_shared, its_names, target in zip(
            devices, types, shared, names, assign_targets(devices, types), strict=True
        )
    )


async def _property(session: QmpSession, device: BlockInfo, name: str) -> object:
    """A property of the device; None if it has none of that name."""
    if not device.qdev:
        return None
    path = device.qdev if device.qdev.startswith("/") else f"/machine/peripheral/{device.qdev}"
    try:
        return await session.execute(QomGet(path=path, property=name))
    except CommandRefused:
        return None  # also if it was unplugged meanwhile, or is no QOM object


async def _type(session: QmpSession, device: BlockInfo) -> str:
    found = await _property(session, device, "type")
    return found if isinstance(found, str) else ""


def assign_targets(devices: Iterable[BlockInfo], types: Iterable[str]) -> list[str]:
    """Name the disks as libvirt would, in QEMU's order within each kind of bus."""
    counts: dict[str, int] = {}
    targets: list[str] = []
    for device, device_type in zip(devices, types, strict=True):
        prefix = next((p for start, p in _TARGET_PREFIXES if device_type.startswith(start)), None)
        if prefix is None:
            fallback = device.device or (device.qdev or "").rsplit("/", 1)[-1]
            named = _TARGET.fullmatch(fallback) and fallback.isprintable()
            targets.append(fallback if named else f"disk{len(targets)}")
            continue
        number = counts.get(prefix, 0)
        counts[prefix] = number + 1
        targets.append(prefix + (f"{number}n1" if prefix == "nvme" else _letters(number)))
    return targets


def _letters(number: int) -> str:
    """0 is "a", 25 "z", 26 "aa"."""
    letters = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters


def _handed_path(fdset: FdsetInfo) -> str | None:
    """The path that qsnapd noted beside the descriptors when it handed them over."""
    return next((fd.opaque for fd in fdset.fds if fd.opaque and fd.opaque.startswith("/")), None)


def _find(
    pid: int, files: Mapping[FileKey, str], handed: Mapping[int, str], filename: str
) -> FileIdentity | None:
    return resolve_image_path(pid, _seen_name(filename, handed), files)


def _kind(device_type: str) -> DeviceKind:
    if device_type.startswith("floppy"):
        return "floppy"
    return "cdrom" if device_type.endswith("-cd") else "disk"


def _disk(
    device: BlockInfo,
    target: str,
    device_type: str,
    names: Sequence[str],
    find: Callable[[str], FileIdentity | None],
    *,
    is_shared: bool,
) -> Disk:
    node = device.inserted
    chain = []
    for name in names:
        identity = find(name)
        if identity is None:
            break
        chain.append(identity)
    specific = node.image.format_specific if node else None
    return Disk(
        target=target,
        device=device.device,
        qdev=device.qdev,
        node=node.node_name if node else "",
        format=node.driver if node else "",
        filename=node.image.filename if node else "",
        chain=tuple(chain),
        depth=len(names),
        virtual_size_bytes=node.image.virtual_size_bytes if node else 0,
        cluster_size_bytes=node.image.cluster_size_bytes if node else None,
        extended_l2=specific is not None and specific.data.get("extended-l2") is True,
        cache_direct=node.cache.direct if node else False,
        cache_no_flush=node.cache.no_flush if node else False,
        detect_zeroes=node.detect_zeroes if node else "off",
        bitmaps=node.dirty_bitmaps if node else (),
        left_out=_reason_to_leave_out(device, node),
        refusal=_refusal(device_type, is_shared=is_shared),
        kind=_kind(device_type),
        active=node is None or node.active,
    )


def _seen_name(filename: str, handed: Mapping[int, str]) -> str:
    filename = plain_name(filename)
    number = filename.removeprefix(FDSET_PREFIX)
    if number != filename and number.isdecimal() and len(number) < _LONGEST_NUMBER:
        return handed.get(int(number), filename)
    return filename


def _refusal(device_type: str, *, is_shared: bool) -> str | None:
    if device_type in _PASSED_THROUGH:
        return f"is passed through to the guest ({device_type}), which talks to the device itself"
    if is_shared:
        return "is shared (share-rw=on): others may write to its image, which nobody may then"
    return None


def _reason_to_leave_out(device: BlockInfo, node: NodeInfo | None) -> str | None:
    if node is None:
        return "empty"
    if device.removable:
        return "removable"
    if node.read_only:
        return "read-only"
    return None
