"""Loading a memory image into a QEMU that was started to receive it."""

import os
from pathlib import Path

from qsnapd.errors import TargetRefused
from qsnapd.model.snapshot import ImageFormat
from qsnapd.qmp.commands import AddFd, GetFd, QueryFdsets, RemoveFd
from qsnapd.qmp.migration import (
    MigrateIncoming,
    MigrateSetCapabilities,
    QueryMigrateCapabilities,
)
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.saving import progress_of, wait_saved
from qsnapd.vm.attached import AttachedVm

FD_NAME = "qsnapd-load"


async def load_memory(vm: AttachedVm, image: Path, image_format: ImageFormat, job: Job) -> None:
    """Load *image*; QEMU was started with `-incoming defer -S` and stands still afterwards.

    On success: memory and devices are those of the snapshot, and QEMU's migration
      capabilities as they were.
    On failure or cancellation: QEMU is of no use any more; most versions end by themselves.
    Raises: CaptureFailed: QEMU could not load it. TargetRefused: the file cannot be opened.
    """
    session = vm.session
    before = {c.capability: c.state for c in await session.execute(QueryMigrateCapabilities())}
    wanted = {"events": True}
    if image_format is ImageFormat.MAPPED_RAM:
        wanted["mapped-ram"] = True
    await session.execute(MigrateSetCapabilities.of(wanted))
    fdset_id = await _hand_over(session, image, by_fdset="mapped-ram" in before)
    uri = f"fd:{FD_NAME}" if fdset_id is None else f"file:/dev/fdset/{fdset_id}"
    await session.execute(MigrateIncoming(uri=uri))
    await wait_saved(session, "completed", watcher=lambda info: job.report(progress_of(info)))
    if fdset_id is not None:
        await session.execute(RemoveFd(fdset_id=fdset_id))
    await session.execute(MigrateSetCapabilities.of({name: before[name] for name in wanted}))


async def _hand_over(session: QmpSession, image: Path, *, by_fdset: bool) -> int | None:
    """Give QEMU the image; returns the fdset, or None if it got a named descriptor."""
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise TargetRefused(f"cannot open {image}: {exc.strerror}") from exc
    try:
        if not by_fdset:
            await session.execute(GetFd(fdname=FD_NAME), descriptor=descriptor)
            return None
        used = {fdset.fdset_id for fdset in await session.execute(QueryFdsets())}
        fdset_id = max(used, default=-1) + 1
        await session.execute(AddFd(fdset_id=fdset_id, opaque=str(image)), descriptor=descriptor)
        return fdset_id
    finally:
        os.close(descriptor)
