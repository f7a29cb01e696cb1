"""Loading a memory image into a QEMU that was started to receive it.

Some QEMUs (after 11.1) can let the guest go on before its pages are read, and then read those
first that it asks for. Whether this one can is asked by trying.
"""

import os
from collections.abc import Set
from pathlib import Path
from typing import Protocol

import trio

from qsnapd.errors import CaptureFailed, CommandRefused, TargetRefused
from qsnapd.model.job import Progress
from qsnapd.model.plan import Loading
from qsnapd.model.snapshot import ImageFormat
from qsnapd.qmp.commands import AddFd, GetFd, QueryFdsets, RemoveFd
from qsnapd.qmp.migration import (
    MigrateIncoming,
    MigrateSetCapabilities,
    MigrationInfo,
    QueryIncoming,
    QueryMigrateCapabilities,
)
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.taking.saving import PROGRESS_EVERY_S, progress_of

FD_NAME = "qsnapd-load"
_MAPPED_RAM, _POSTCOPY = "mapped-ram", "postcopy-ram"
_CAPABILITIES = frozenset({"events", _MAPPED_RAM, _POSTCOPY})


class Waiting(Protocol):
    """A QEMU that waits for its memory: an `AttachedVm`, or a throwaway."""

    @property
    def session(self) -> QmpSession: ...
    async def run_state(self) -> str: ...


class Reporter(Protocol):
    """Takes note of the progress: a `Job`."""

    def report(self, progress: Progress) -> None: ...


async def load_memory(vm: Waiting, loading: Loading, job: Reporter) -> bool:
    """Load the memory; QEMU was started with `-incoming defer -S` and stands still afterwards.

    On success: memory and devices are those of the snapshot. False: all is done, and QEMU's
      migration capabilities are as they were. True: QEMU goes on reading pages, which the
      guest need not wait for; `finish_loading` is to follow once it runs.
    On failure or cancellation: QEMU is of no use any more; most versions end by themselves.
    Raises: CaptureFailed: QEMU could not load it. TargetRefused: the file cannot be opened.
    """
    session = vm.session
    known = await _known_capabilities(session)
    await _set_capabilities(session, loading, known)
    image = Path(loading.view or loading.memory_file)
    fdset_id = await _hand_over(session, image, by_fdset=_MAPPED_RAM in known)
    uri = f"fd:{FD_NAME}" if fdset_id is None else f"file:/dev/fdset/{fdset_id}"
    await session.execute(MigrateIncoming(uri=uri))
    if await _wait_loaded(vm, job, guest_may_go_on=loading.on_demand):
        return True
    await _tidy(session, known)
    return False


async def finish_loading(vm: Waiting, job: Reporter) -> None:
    """Wait until QEMU has read all pages; nothing to do if it has none to read.

    Cancellation: it goes on reading; may be called again.
    Raises: CaptureFailed: it could not, and the guest waits for a page that will not come.
    """
    await _wait_loaded(vm, job, guest_may_go_on=False)
    await _tidy(vm.session, await _known_capabilities(vm.session))


async def can_load_on_demand(session: QmpSession) -> bool:
    """Whether this QEMU, or another of its kind, can let a guest go on before it has its pages.

    Asked of a QEMU that is not migrating; its capabilities are as they were afterwards.
    """
    before = {c.capability: c.state for c in await session.execute(QueryMigrateCapabilities())}
    both = (_MAPPED_RAM, _POSTCOPY)
    if not before.keys() >= set(both):
        return False
    put_back = MigrateSetCapabilities.of({name: before[name] for name in both})
    try:
        await session.execute(MigrateSetCapabilities.of(dict.fromkeys(both, True)))
    except CommandRefused:
        return False
    finally:
        with trio.fail_after(put_back.timeout_s, shield=True):
            await session.execute(put_back)
    return True


async def _known_capabilities(session: QmpSession) -> Set[str]:
    return {c.capability for c in await session.execute(QueryMigrateCapabilities())}


async def _set_capabilities(session: QmpSession, loading: Loading, known: Set[str]) -> None:
    wanted = {"events": True}
    if loading.image_format is ImageFormat.MAPPED_RAM:
        wanted[_MAPPED_RAM] = True
        if loading.on_demand and _POSTCOPY in known:
            try:
                await session.execute(MigrateSetCapabilities.of({**wanted, _POSTCOPY: True}))
                return
            except CommandRefused:  # QEMU <= 11.1 wants one or the other
                pass
    await session.execute(MigrateSetCapabilities.of(wanted))


async def _wait_loaded(vm: Waiting, job: Reporter, *, guest_may_go_on: bool) -> bool:
    """Follow the load to its end, or until the guest could run; returns whether pages lack."""
    session = vm.session
    with session.watch("MIGRATION") as events:
        while True:
            info = await session.execute(QueryIncoming())
            if info.status == "completed":
                return False
            _require_alive(info)
            if (
                guest_may_go_on
                and info.status == "postcopy-active"
                and await vm.run_state() != "inmigrate"  # before that, devices are loaded
            ):
                return True
            job.report(progress_of(info))
            with trio.move_on_after(PROGRESS_EVERY_S):
                await events.receive()


def _require_alive(info: MigrationInfo) -> None:
    if info.status in (None, "none", "failed", "cancelled", "cancelling"):
        raise CaptureFailed(
            f"QEMU could not load the memory: {info.error_desc or 'it does not say why'}"
        )


async def _tidy(session: QmpSession, known: Set[str]) -> None:
    """Take back what the load needed; in a QEMU that was just started, nothing else was set."""
    for fdset in await session.execute(QueryFdsets()):
        if any(fd.opaque == FD_NAME for fd in fdset.fds):
            await session.execute(RemoveFd(fdset_id=fdset.fdset_id))
    await session.execute(MigrateSetCapabilities.of(dict.fromkeys(_CAPABILITIES & known, False)))


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
        await session.execute(AddFd(fdset_id=fdset_id, opaque=FD_NAME), descriptor=descriptor)
        return fdset_id
    finally:
        os.close(descriptor)
