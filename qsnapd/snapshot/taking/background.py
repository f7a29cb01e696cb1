"""Strategy `background`: QEMU write-protects memory and saves each page once, the guest
running; a write to a page not yet saved waits until it is.
"""

import trio

from qsnapd.errors import CaptureFailed
from qsnapd.faults import Point
from qsnapd.qmp.migration import QueryMigrate
from qsnapd.qmp.session import QmpSession
from qsnapd.qmp.transport import QmpEvent
from qsnapd.snapshot.taking.capture import Capture, Stopwatch
from qsnapd.snapshot.taking.hold import hold_for_storage
from qsnapd.snapshot.taking.saving import STANDSTILL_LIMIT_S, require_alive, wait_saved

SETUP_LOOK_EVERY_S = 0.1
"""Backstop between looks at a migration whose next event has not come."""
FIRST_PAGE_LIMIT_S = 10.0
"""The guest stands still until then; QEMU goes through 200 GiB and more in this time."""
ANSWER_LIMIT_S = 5.0
"""QEMU < 10.0 is silent for ever when its save fails while a virtual CPU has its lock."""


async def capture_background(capture: Capture) -> None:
    """Stop, pivot, begin to save; go on as soon as QEMU has captured the instant.

    That is not when the status says "active" (it says so before the device state is
    captured, and a guest let go then tears memory from disk), but when the first page has
    been saved.

    On success: the image is handed to the kernel in full; a guest that ran runs since long.
    On failure or cancellation: as far as it came; the plan's undo finds out how far.
    """
    vm, session = capture.vm, capture.vm.session
    await capture.respect_stop()
    with vm.tracker.holding() as capture.window:
        await capture.halt()
        await capture.pivot()
        await hold_for_storage(capture)
        watch = Stopwatch()
        with session.watch("MIGRATION") as events:
            await capture.begin_saving()
            try:
                with trio.fail_after(FIRST_PAGE_LIMIT_S):
                    await _wait_captured(session, events)
            except trio.TooSlowError:
                raise CaptureFailed(
                    f"QEMU saved no page within {FIRST_PAGE_LIMIT_S:g} s: the disk that it writes "
                    "to stalls"
                ) from None
        capture.capture_ms = watch.ms
        await capture.job.reach(Point.CAPTURE_CAPTURED)
        if vm.at_least_10:
            capture.require_held()
            await capture.release_at_once()
        else:
            # QEMU <= 8.2 has started the guest itself, right after protecting its memory.
            await capture.release()
    await capture.job.reach(Point.CAPTURE_RELEASED)
    await capture.reserve_again()
    limit_s = QueryMigrate.timeout_s if vm.at_least_10 else ANSWER_LIMIT_S
    with capture.job.patience.at_most(STANDSTILL_LIMIT_S):
        info = await wait_saved(
            session, "completed", watcher=capture.watch, answer_limit_s=limit_s
        )
    capture.tell(info)
    await capture.job.reach(Point.CAPTURE_SAVED)


async def _wait_captured(
    session: QmpSession, events: trio.MemoryReceiveChannel[QmpEvent]
) -> None:
    """Wait until the first page has been saved; asks QEMU only once that can be.

    In "setup" QEMU touches all of guest RAM: no page is saved, and each question would take
    CPU time from what the guest is waiting for.
    Raises: CaptureFailed: the migration has failed, or somebody cancelled it.
    """
    while True:
        info = await session.execute(QueryMigrate())
        if info.ram is not None and info.ram.saved_pages > 0:
            return
        require_alive(info)
        if info.status == "setup":
            with trio.move_on_after(SETUP_LOOK_EVERY_S):
                await events.receive()
