"""Strategy `stopped`: stop, pivot, save, cont. The guest stands still for the whole save."""

from qsnapd.faults import Point
from qsnapd.snapshot.taking.capture import Capture, Stopwatch
from qsnapd.snapshot.taking.hold import hold_for_storage
from qsnapd.snapshot.taking.saving import STANDSTILL_LIMIT_S, wait_saved


async def capture_stopped(capture: Capture) -> None:
    """Hold the guest, move its disks, write all of its memory, let it go on.

    On success: the image is handed to the kernel in full; a guest that ran runs.
    On failure or cancellation: as far as it came; the plan's undo finds out how far.
    """
    await capture.respect_stop()
    with capture.vm.tracker.holding() as capture.window:
        await capture.halt()
        watch = Stopwatch()
        await capture.pivot()
        await hold_for_storage(capture)
        await capture.begin_saving()
        await capture.reserve_again()
        with capture.job.patience.at_most(STANDSTILL_LIMIT_S):
            info = await wait_saved(capture.vm.session, "completed", watcher=capture.watch)
        capture.require_held()
        capture.capture_ms = round(watch.ms - capture.pivot_ms, 3)
        await capture.job.reach(Point.CAPTURE_SAVED)
        await capture.leave_postmigrate()
        capture.tell(info)
