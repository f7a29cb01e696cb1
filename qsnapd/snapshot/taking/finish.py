"""From a written memory image to a snapshot: sync, seal, verify, hash, describe."""

import logging
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from qsnapd.faults import Point, reach_in_thread
from qsnapd.image import digest, mapped_ram, stream
from qsnapd.image.files import allocated_bytes, sync_in_parts
from qsnapd.image.punch import punch
from qsnapd.image.reserve import give_back
from qsnapd.image.savevm import Verified
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.snapshot import (
    Consistency,
    DiskLayer,
    FileIdentity,
    ImageFormat,
    Manifest,
    MemoryImage,
    RamBlock,
    Strategy,
)
from qsnapd.model.state import Condition, State
from qsnapd.patience import Patience
from qsnapd.snapshot.taking.capture import Capture
from qsnapd.snapshot.taking.memory import MemoryTarget
from qsnapd.threads import Check, in_slow_thread
from qsnapd.vm.attached import AttachedVm

_log = logging.getLogger(__name__)


async def finish_image(
    target: MemoryTarget, ram_blocks: Sequence[RamBlock], patience: Patience
) -> tuple[MemoryImage, tuple[RamBlock, ...]]:
    """Make the image durable and loadable, and prove it; the guest runs meanwhile.

    *ram_blocks* are those QEMU must have saved. Returns the image under its final name, and
    all blocks found in it.
    Cancellation: stops at the next mebibyte; the image is then worth nothing.
    Raises: CaptureFailed, ImageInvalid, StoreError.
    """

    def work(check: Check) -> tuple[MemoryImage, tuple[RamBlock, ...]]:
        fd = os.dup(target.descriptor)  # a thread that is left alone must not meet another file
        try:
            return _finish_image(target, fd, ram_blocks, check)
        finally:
            os.close(fd)

    return await in_slow_thread(work, patience)


def _finish_image(
    target: MemoryTarget, fd: int, ram_blocks: Sequence[RamBlock], check: Check
) -> tuple[MemoryImage, tuple[RamBlock, ...]]:
    plan, file = target.plan, target.file
    assert plan.image_format is not None, "a checkpoint says how it is saved"
    assert plan.strategy is not None, "a checkpoint says how it is saved"
    if target.drain is not None:
        target.drain.finish()
    sync_in_parts(fd, check)
    reach_in_thread(Point.FINISH_SYNCED)
    give_back(fd, check)
    holes_are_zero = _mend(fd, plan, check)
    reach_in_thread(Point.FINISH_SEALED)
    verified = verify_image(
        fd, plan.image_format, plan.strategy, ram_blocks, check, holes_are_zero=holes_are_zero
    )
    if verified.unchecked:
        _log.warning("%s: checked in part only: %s", file, verified.unchecked)
    reach_in_thread(Point.FINISH_VERIFIED)
    check()
    status = os.fstat(fd)
    image = MemoryImage(
        path=file,
        size_bytes=status.st_size,
        allocated_bytes=allocated_bytes(fd),
        sha256=digest.sha256(fd, check) if plan.hash_memory else None,
        holes_are_zero=holes_are_zero,
        file=FileIdentity(path=file, device=status.st_dev, inode=status.st_ino),
    )
    return image, verified.ram_blocks


def _mend(fd: int, plan: CheckpointPlan, check_cancelled: Callable[[], object]) -> bool:
    """Complete what QEMU leaves out; return whether holes now stand for zero pages."""
    if plan.image_format is not ImageFormat.MAPPED_RAM:
        return False
    if plan.strategy is Strategy.PRECOPY:
        return punch(fd, check_cancelled)
    if plan.strategy is Strategy.BACKGROUND:
        mapped_ram.seal(fd)
    return True


def verify_image(
    fd: int,
    image_format: ImageFormat,
    strategy: Strategy,
    ram_blocks: Sequence[RamBlock],
    check_cancelled: Callable[[], object],
    *,
    holes_are_zero: bool = False,
) -> Verified:
    """Check that QEMU can load the image, and may map it if *holes_are_zero*.

    Blocks. Raises: ImageInvalid, StoreError.
    """
    if image_format is ImageFormat.STREAM:
        return stream.verify(fd, ram_blocks, check_cancelled)
    repeated = strategy is Strategy.PRECOPY and not holes_are_zero
    writes = mapped_ram.Writes.REPEATED if repeated else mapped_ram.Writes.ONCE
    return mapped_ram.verify(fd, ram_blocks, writes)


def describe(
    vm: AttachedVm,
    plan: CheckpointPlan,
    capture: Capture,
    image: MemoryImage | None,
    ram_blocks: tuple[RamBlock, ...],
    total_ms: float,
) -> Manifest:
    """The manifest of a finished snapshot; pure."""
    stopped_at_s = capture.window.stopped_at_s
    moved_at = capture.pivoted_at or plan.requested_at
    paused = Condition[plan.reason].state is State.PAUSED
    return Manifest(
        name=plan.name,
        vm=plan.vm,
        parent=plan.parent,
        description=plan.description,
        labels=plan.labels,
        created_at=(
            moved_at if stopped_at_s is None else datetime.fromtimestamp(stopped_at_s, UTC)
        ),
        state="paused" if paused else "running",
        reason=plan.reason,
        strategy=plan.strategy,
        image_format=plan.image_format,
        paused_ms=capture.window.paused_ms,
        pause=capture.parts(),
        total_ms=total_ms,
        memory=image,
        disks=tuple(
            DiskLayer(
                target=pivot.target,
                node=pivot.node,
                qdev=pivot.qdev,
                frozen=pivot.overlay.backing,
                frozen_format=pivot.overlay.backing_format,
                overlay=pivot.overlay.path,
                virtual_size_bytes=pivot.overlay.virtual_size_bytes,
                chain=pivot.chain,
            )
            for pivot in plan.pivots
        ),
        qemu_version=vm.version.text,
        qemu_package=vm.version.package,
        machine=vm.machine().model_copy(update={"ram_blocks": ram_blocks}),
        consistency=_consistency(plan, capture),
        left_out=plan.left_out,
        manual_disks=plan.manual,
    )


def _consistency(plan: CheckpointPlan, capture: Capture) -> Consistency:
    """What was planned, unless the file systems were not frozen all the time, or the guest ran."""
    quiesced = capture.quiesced
    if plan.consistency is Consistency.PAUSED and capture.ran:
        return Consistency.CRASH
    if plan.agent is None or (quiesced is not None and quiesced.filesystems and quiesced.held):
        return plan.consistency
    return Consistency.PAUSED if plan.manual else Consistency.CRASH
