"""Which disks a snapshot moves, to overlays where and of what kind; pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsnapd.errors import BadRequest, Blocked
from qsnapd.model.plan import BitmapPlan, OverlayPlan, PivotPlan, Place
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import DiskLayer
from qsnapd.vm.disks import Disk

CHAIN_LIMIT = 200
"""Layers of backing images; libvirt's limit, and QEMU slows down long before."""
FILE_NAME_LIMIT_BYTES = 255
AFTER = ".after-"
"""Between a disk's name and that of the snapshot which an overlay comes after."""
DEVICES = Path("/dev")

_BASE_FORMATS = {"qcow2": "qcow2", "raw": "raw", "file": "raw", "host_device": "raw"}


@dataclass(frozen=True)
class DisksPlan:
    """What happens to each writable disk."""

    pivots: tuple[PivotPlan, ...]
    left_out: tuple[DiskLayer, ...]
    """Those that stay where they are."""
    manual: tuple[str, ...]
    """Targets of those among them that the storage takes a snapshot of."""


def plan_disks(
    request: CreateRequest,
    disks: Sequence[Disk],
    snapshot: str,
    token: str,
    fdset_ids: Sequence[int],
) -> DisksPlan:
    """Decide for each disk.

    Every writable disk moves unless the request says "no" or "manual"; read-only and
    removable media never do. *fdset_ids*: one for each disk.
    Raises: BadRequest, Blocked.
    """
    asked = _match(request.disks, disks)
    pivots: list[PivotPlan] = []
    left_out: list[DiskLayer] = []
    manual: list[str] = []
    for index, disk in enumerate(disks):
        wanted = asked.get(disk.target)
        if disk.left_out is not None:
            if wanted is not None and wanted.snapshot != "no":
                raise BadRequest(f"disk {disk.target} is {disk.left_out}: it needs no snapshot")
        elif wanted is not None and wanted.snapshot != "external":
            left_out.append(_stays(disk))
            if wanted.snapshot == "manual":
                manual.append(disk.target)
        else:
            path = _overlay_path(disk, wanted, snapshot, pivots)
            overlay = _plan_overlay(disk, wanted, path, token, reuse=request.reuse_overlays)
            name = f"qsnapd-{token}-{index}"
            pivots.append(_plan_pivot(disk, overlay, name, fdset_ids[index]))
    return DisksPlan(tuple(pivots), tuple(left_out), tuple(manual))


def _match(requests: Sequence[DiskRequest], disks: Sequence[Disk]) -> dict[str, DiskRequest]:
    asked: dict[str, DiskRequest] = {}
    for request in requests:
        found = [disk for disk in disks if disk.answers_to(request.target)]
        if not found:
            known = ", ".join(disk.target for disk in disks) or "none"
            raise BadRequest(f"no disk named {request.target!r}; this VM has: {known}")
        if len(found) > 1:
            raise BadRequest(
                f"{request.target!r} means several disks: "
                + ", ".join(disk.target for disk in found)
            )
        target = found[0].target
        if target in asked:
            raise BadRequest(f"disk {target} specified twice")
        _refuse_file(request, target)
        asked[target] = request
    return asked


def _refuse_file(request: DiskRequest, target: str) -> None:
    if request.snapshot != "external" and request.file is not None:
        raise BadRequest(
            f"file {request.file!r} for disk {target} requires use of external snapshot mode"
        )
    if request.target_type == "block" and request.file is None:
        raise BadRequest(f"disk {target}: say which block device its overlay goes on")


def _stays(disk: Disk) -> DiskLayer:
    """A disk that is not part of the snapshot, and the image it is on."""
    if disk.path is None:
        raise Blocked(
            f"disk {disk.target}: its image {disk.filename!r} is no file that can be found from "
            "here, so it could not be told from others when the VM is put back"
        )
    return DiskLayer(
        target=disk.target,
        node=disk.node,
        qdev=disk.qdev,
        frozen=disk.path,
        frozen_format=_BASE_FORMATS.get(disk.format, disk.format),
        overlay=None,
        virtual_size_bytes=disk.virtual_size_bytes,
        chain=disk.chain,
    )


def _overlay_path(
    disk: Disk, request: DiskRequest | None, snapshot: str, earlier: Sequence[PivotPlan]
) -> Path:
    if disk.refusal is not None:
        raise Blocked(
            f"disk {disk.target} {disk.refusal}: leave it out (--diskspec "
            f"{disk.target},snapshot=no)"
        )
    if _BASE_FORMATS.get(disk.format) is None:
        raise Blocked(
            f"disk {disk.target}: its top node is of type {disk.format!r}; qsnapd makes overlays "
            "over qcow2 and raw images only"
        )
    if disk.path is None:
        raise Blocked(
            f"disk {disk.target}: its image {disk.filename!r} is no file that can be found from "
            "here"
        )
    if disk.depth >= CHAIN_LIMIT:
        raise Blocked(
            f"disk {disk.target} already has {disk.depth} layers, and backing chains more than "
            f"{CHAIN_LIMIT} layers deep are not supported: delete a snapshot "
            "(qsnapctl snapshot-delete) for each one to be taken, which merges two layers into one"
        )
    taken = {pivot.overlay.path for pivot in earlier}
    if request is not None and request.file:
        path = Path(request.file)
        if str(path) in taken:
            raise BadRequest(f"disk {disk.target}: another disk's overlay has the same file {path}")
    elif Path(disk.path).is_relative_to(DEVICES):
        raise BadRequest(
            f"source for disk {disk.target!r} is not a regular file; refusing to generate external "
            f"snapshot name: say where its overlay goes (--diskspec {disk.target},file=PATH)"
        )
    else:
        path = default_overlay_path(disk, snapshot)
        if str(path) in taken:
            path = path.with_name(f"{disk.target}-{path.name}")
    if len(path.name.encode()) + len(".12345678.partial") > FILE_NAME_LIMIT_BYTES:
        raise BadRequest(f"disk {disk.target}: the overlay's name {path.name!r} is too long")
    return path


def _plan_overlay(
    disk: Disk, request: DiskRequest | None, path: Path, token: str, *, reuse: bool
) -> OverlayPlan:
    on_device = request is not None and request.target_type == "block"
    backing_format = _BASE_FORMATS[disk.format]
    return OverlayPlan(
        target=disk.target,
        path=str(path),
        partial=str(path.with_name(f"{path.name}.{token}.partial")),
        backing=disk.chain[0].path,
        backing_format=backing_format,
        virtual_size_bytes=disk.virtual_size_bytes,
        cluster_size_bytes=disk.cluster_size_bytes if backing_format == "qcow2" else None,
        extended_l2=disk.extended_l2,
        place=Place.READY if reuse else Place.DEVICE if on_device else Place.NEW,
        on_device=on_device,
    )


def _plan_pivot(disk: Disk, overlay: OverlayPlan, overlay_node: str, fdset_id: int) -> PivotPlan:
    return PivotPlan(
        overlay=overlay,
        node=disk.node,
        overlay_node=overlay_node,
        fdset_id=fdset_id,
        qdev=disk.qdev,
        chain=disk.chain,
        cache_direct=disk.cache_direct,
        cache_no_flush=disk.cache_no_flush,
        detect_zeroes=disk.detect_zeroes,
        bitmaps=tuple(
            BitmapPlan(name=bitmap.name, granularity_bytes=bitmap.granularity_bytes)
            for bitmap in disk.bitmaps
            if bitmap.carried_over
        ),
    )


def default_overlay_path(disk: Disk, snapshot: str) -> Path:
    """Beside the image it covers, named for the disk and for the snapshot it comes after."""
    covered = Path(disk.chain[0].path)
    return covered.with_name(f"{image_stem(covered)}{AFTER}{snapshot}.qcow2")


def image_stem(image: Path) -> str:
    """What a disk is called: its image's name without suffixes, ours among them.

    So that names do not grow with the chain.
    """
    return image.stem.split(AFTER)[0] or image.stem


def folder_for_overlays(disk: DiskLayer) -> Path:
    """Where a restored disk's overlay goes: beside its frozen image, if that is a file.

    Raises: Blocked: all its images are block devices.
    """
    for path in (disk.frozen, disk.overlay, *(file.path for file in disk.chain)):
        if path is not None and not Path(path).is_relative_to(DEVICES):
            return Path(path).parent
    raise Blocked(
        f"disk {disk.target}: all its images are block devices, and there is no folder among them "
        "for a new overlay"
    )
