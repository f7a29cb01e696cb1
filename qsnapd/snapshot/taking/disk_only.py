"""A snapshot without memory: one `transaction`, while the guest runs."""

from contextlib import AsyncExitStack, suppress

import trio

from qsnapd.errors import VmError
from qsnapd.faults import Point
from qsnapd.model.job import Phase
from qsnapd.qmp.agent import GuestAgent
from qsnapd.snapshot.taking.capture import Capture
from qsnapd.snapshot.taking.freeze import frozen
from qsnapd.snapshot.taking.hold import hold_for_storage
from qsnapd.store.snapshots import VmStore

RELEASE_LIMIT_S = 30.0


async def capture_disks(capture: Capture, store: VmStore, agent: GuestAgent | None) -> None:
    """Move the disks; *agent* freezes the guest's file systems around that, if given.

    The guest never stands still, unless its storage is to take a snapshot of other disks.

    On success: the disks are on their overlays, nothing is frozen, a guest that ran runs.
    On failure or cancellation: as far as it came; the plan's undo finds out how far.
    Raises: what `frozen` and `hold_for_storage` raise.
    """
    plan = capture.plan
    async with AsyncExitStack() as around:
        if agent is not None:
            capture.quiesced = await around.enter_async_context(
                frozen(capture.vm, store, capture.job, agent=agent, limit_s=plan.freeze_limit_s)
            )
            await capture.job.reach(Point.CAPTURE_FROZEN)
        capture.job.enter(Phase.SAVING)
        if not plan.manual:
            await capture.pivot()
            return
        with capture.vm.tracker.holding() as capture.window:
            try:
                await capture.halt()
                await capture.pivot()
                await hold_for_storage(capture)
            except BaseException:
                # before `frozen` ends: a guest that stands still cannot be thawed
                with trio.move_on_after(RELEASE_LIMIT_S, shield=True), suppress(VmError):
                    await capture.release()
                raise
            await capture.release()
