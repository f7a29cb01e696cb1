"""Strategy `precopy`: memory is copied while the guest runs and dirties it again.

QEMU stops the guest by itself when what is left fits its downtime limit, and waits there
("pre-switchover") for us to move the disks.
"""

import trio

from qsnapd.errors import CaptureFailed
from qsnapd.faults import Point
from qsnapd.model.request import OnLimit
from qsnapd.qmp.commands import Stop
from qsnapd.qmp.migration import MigrateContinue, MigrationInfo
from qsnapd.snapshot.taking.capture import Capture, Stopwatch
from qsnapd.snapshot.taking.hold import hold_for_storage
from qsnapd.snapshot.taking.saving import STANDSTILL_LIMIT_S, wait_saved


class LimitReached(Exception):
    """The copy has not converged within what the request allows."""


async def capture_precopy(capture: Capture) -> None:
    """Copy memory until QEMU switches over, move the disks, write the rest, go on.

    A copy that does not converge within the request's limits obeys it: the guest is
    stopped, so that it does, or the capture is given up.

    On success: the image is handed to the kernel in full; a guest that ran runs.
    On failure or cancellation: as far as it came; the plan's undo finds out how far.
    """
    session = capture.vm.session
    await capture.respect_stop()
    with capture.vm.tracker.holding() as capture.window:
        await capture.begin_saving()
        await capture.reserve_again()
        limit = _Limit(capture)
        try:
            await wait_saved(session, "pre-switchover", watcher=limit.check)
        except LimitReached as exc:
            if capture.plan.on_limit is OnLimit.ABORT:
                raise CaptureFailed(
                    f"precopy did not converge: {exc}. Allow more, let it stop the guest "
                    "(--on-limit stop), or use --strategy background or stopped"
                ) from None
            await session.execute(Stop())
            await wait_saved(session, "pre-switchover", watcher=capture.watch)
        capture.window.begun = True
        await capture.job.reach(Point.CAPTURE_SWITCHOVER)
        watch = Stopwatch()
        await capture.pivot()
        await hold_for_storage(capture)
        await session.execute(MigrateContinue())
        await capture.job.reach(Point.CAPTURE_CONTINUED)
        with capture.job.patience.at_most(STANDSTILL_LIMIT_S):
            info = await wait_saved(session, "completed", watcher=capture.watch)
        capture.capture_ms = round(watch.ms - capture.pivot_ms, 3)
        await capture.job.reach(Point.CAPTURE_SAVED)
        await capture.leave_postmigrate()
        capture.tell(info)


class _Limit:
    """Watches time and bytes of a copy."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._begun_s = trio.current_time()

    async def check(self, info: MigrationInfo) -> None:
        await self._capture.watch(info)
        plan = self._capture.plan
        if trio.current_time() - self._begun_s > plan.precopy_limit_s:
            raise LimitReached(f"still copying after {plan.precopy_limit_s:g} s")
        if info.ram is not None and info.ram.transferred_bytes > plan.precopy_limit_bytes:
            raise LimitReached(f"{info.ram.transferred_bytes} bytes written and not done")
