"""From a request and a situation to a plan, or to a refusal; pure, nothing is touched."""

import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from qsnapd.errors import BadRequest, Blocked, SnapshotExists, WrongState
from qsnapd.model.names import check_name
from qsnapd.model.plan import BitmapPlan, CheckpointPlan, OverlayPlan, PivotPlan
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.state import State
from qsnapd.snapshot.saving_plan import plan_saving
from qsnapd.snapshot.situation import Situation
from qsnapd.vm.disks import Disk

CHAIN_LIMIT = 200
"""Layers of backing images; libvirt's limit, and QEMU slows down long before."""
FILE_NAME_LIMIT_BYTES = 255
AFTER = ".after-"
"""Between a disk's name and that of the snapshot which an overlay comes after."""
PRECOPY_LIMIT_RAMS = 2

_BASE_FORMATS = {"qcow2": "qcow2", "raw": "raw", "file": "raw", "host_device": "raw"}


def plan_checkpoint(
    request: CreateRequest, now: Situation, *, holds: bool = False
) -> CheckpointPlan:
    """Decide everything about the checkpoint that *request* asks for.

    *holds*: a guest that ran is not to run afterwards.
    Raises:
      SnapshotExists, WrongState, Blocked, CapabilityMissing, BadRequest: why it cannot be.
    """
    requested_at = datetime.now(UTC)
    name = request.name or check_name(requested_at.strftime("%Y%m%dT%H%M%S.%fZ"))
    if name in now.snapshots:
        raise SnapshotExists(
            f"VM {now.vm} already has a snapshot {name!r}: choose another name or delete that one"
        )
    _refuse_by_state(now)
    _refuse_blocked(now)
    saving = plan_saving(request, now)
    token = secrets.token_hex(4)
    _refuse_store_paths(request, now.directory.parent)
    memory_file = Path(request.memory_file or now.directory / name / "memory.img")
    partial = (
        memory_file.with_name(f"{memory_file.name}.{token}.partial")
        if request.memory_file
        else now.directory / f".{name}.partial" / "memory.img"
    )
    ids = _unused_ids(now.fdset_ids, 1 + len(now.disks))
    return CheckpointPlan(
        token=token,
        vm=now.vm,
        name=name,
        parent=now.current,
        description=request.description,
        labels=request.labels,
        requested_at=requested_at,
        strategy=saving.strategy,
        image_format=saving.image_format,
        was_running=now.running,
        holds=holds,
        reason=now.condition.name,
        capabilities=saving.capabilities,
        capabilities_before=saving.capabilities_before,
        parameters=saving.parameters,
        parameters_before=saving.parameters_before,
        memory_file=str(memory_file),
        memory_partial=str(partial),
        memory_fdset_id=ids[0] if saving.by_fdset else None,
        drained=saving.drained,
        cancellable=saving.cancellable,
        nodes_can_be_activated="blockdev-set-active" in now.commands,
        ram_bytes=now.ram_bytes,
        precopy_limit_s=request.precopy_limit_s,
        precopy_limit_bytes=request.precopy_limit_bytes or PRECOPY_LIMIT_RAMS * now.ram_bytes,
        on_limit=request.on_limit,
        hash_memory=request.hash_memory,
        pivots=plan_pivots(request.disks, now.disks, name, token, ids[1:]),
    )


def _refuse_store_paths(request: CreateRequest, store: Path) -> None:
    """Files that a request names lie anywhere but among qsnapd's own, and apart."""
    named = [path for path in (request.memory_file, *(d.file for d in request.disks)) if path]
    for path in named:
        if Path(os.path.normpath(path)).is_relative_to(store):
            raise BadRequest(f"{path} lies in {store}, which is qsnapd's own: name another place")
    if len({os.path.normpath(path) for path in named}) < len(named):
        raise BadRequest("the same file is named twice")


def _refuse_by_state(now: Situation) -> None:
    state = now.condition.state
    if now.status in ("inmigrate", "prelaunch"):
        raise WrongState(
            f"VM {now.vm} has not started yet (QEMU says {now.status!r}): start it first"
        )
    if now.status == "postmigrate":
        raise WrongState(
            f"VM {now.vm} stands still after an earlier save, and QEMU saves such a VM only "
            f"once: resume it first (qsnapctl resume {now.vm})"
        )
    if state not in (State.RUNNING, State.PAUSED) or now.status in (
        "shutdown",
        "guest-panicked",
        "internal-error",
        "suspended",
    ):
        raise WrongState(
            f"VM {now.vm} is {now.condition.text} (QEMU says {now.status!r}): only a running or "
            "paused VM can be checkpointed"
        )


def _refuse_blocked(now: Situation) -> None:
    if now.migration.active:
        raise Blocked(
            f"VM {now.vm}: another migration is under way (QEMU says {now.migration.status!r})"
        )
    if now.migration.blocked_reasons:
        raise Blocked(
            f"VM {now.vm} cannot be saved, QEMU says: " + "; ".join(now.migration.blocked_reasons)
        )
    if now.jobs:
        jobs = ", ".join(f"{job.id} ({job.type}, {job.status})" for job in now.jobs)
        raise Blocked(f"VM {now.vm}: block jobs are running: {jobs}. Wait for them or cancel them")


def plan_pivots(
    requests: Sequence[DiskRequest],
    disks: Sequence[Disk],
    snapshot: str,
    token: str,
    fdset_ids: Sequence[int],
) -> tuple[PivotPlan, ...]:
    """One pivot for each disk that takes part.

    Every writable disk takes part unless the request says "no"; read-only and removable
    media never do.
    """
    asked = _match(requests, disks)
    pivots: list[PivotPlan] = []
    for index, disk in enumerate(disks):
        request = asked.get(disk.target)
        if disk.left_out is not None:
            if request is not None and request.snapshot == "external":
                raise BadRequest(f"disk {disk.target} is {disk.left_out}: it needs no snapshot")
            continue
        if request is not None and request.snapshot == "no":
            continue
        pivots.append(
            _plan_pivot(disk, request, snapshot, token, index, fdset_ids[index], pivots)
        )
    return tuple(pivots)


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
        if request.snapshot == "no" and request.file is not None:
            raise BadRequest(
                f"file {request.file!r} for disk {target} requires use of external snapshot mode"
            )
        asked[target] = request
    return asked


def _plan_pivot(
    disk: Disk,
    request: DiskRequest | None,
    snapshot: str,
    token: str,
    index: int,
    fdset_id: int,
    earlier: Sequence[PivotPlan],
) -> PivotPlan:
    backing_format = _BASE_FORMATS.get(disk.format)
    if backing_format is None:
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
            f"disk {disk.target} already has {disk.depth} layers of backing images, the limit "
            f"is {CHAIN_LIMIT}: delete some snapshots first"
        )
    path = Path(request.file) if request is not None and request.file else None
    if path is None:
        path = default_overlay_path(disk, snapshot)
        if any(other.overlay.path == str(path) for other in earlier):
            path = path.with_name(f"{disk.target}-{path.name}")
    elif any(other.overlay.path == str(path) for other in earlier):
        raise BadRequest(f"disk {disk.target}: another disk's overlay has the same file {path}")
    if len(path.name.encode()) + len(".12345678.partial") > FILE_NAME_LIMIT_BYTES:
        raise BadRequest(f"disk {disk.target}: the overlay's name {path.name!r} is too long")
    return PivotPlan(
        overlay=OverlayPlan(
            target=disk.target,
            path=str(path),
            partial=str(path.with_name(f"{path.name}.{token}.partial")),
            backing=disk.path,
            backing_format=backing_format,
            virtual_size_bytes=disk.virtual_size_bytes,
            cluster_size_bytes=disk.cluster_size_bytes if backing_format == "qcow2" else None,
            extended_l2=disk.extended_l2,
        ),
        node=disk.node,
        overlay_node=f"qsnapd-{token}-{index}",
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


def _unused_ids(used: frozenset[int], count: int) -> list[int]:
    start = max(used, default=-1) + 1
    return list(range(start, start + count))
