"""Faults at every point that a checkpoint passes, and at those of undoing one."""

from dataclasses import dataclass
from functools import partial

from qsnapd.errors import DiskStalled, QsnapError
from qsnapd.faults import Action, Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import Forged
from tests.attacks.lane import Lane, outcome, require_as_before
from tests.attacks.planted import Planted, between, died, each, each_later, spelled
from tests.real.footprint import Footprint

_NOT_ALWAYS = {
    Point.CAPTURE_STOPPED: (Strategy.STOPPED, Strategy.BACKGROUND),
    Point.CAPTURE_SWITCHOVER: (Strategy.PRECOPY,),
    Point.CAPTURE_CONTINUED: (Strategy.PRECOPY,),
    Point.CAPTURE_CAPTURED: (Strategy.BACKGROUND,),
    Point.CAPTURE_RELEASED: (Strategy.BACKGROUND,),
    Point.CAPTURE_FROZEN: (),
    Point.CAPTURE_THAWED: (),
}
UNDO_POINTS = (
    Point.UNDO_SAVE_SETTLED,
    Point.UNDO_GUEST_RUNS,
    Point.UNDO_MERGING,
    Point.UNDO_MERGED,
    Point.UNDO_QEMU_RELEASED,
    Point.UNDO_NODES_REMOVED,
    Point.UNDO_FILES_REMOVED,
    Point.UNDO_UNSTAGED,
    Point.UNDONE,
)


@dataclass(frozen=True)
class Creating(Planted):
    """One checkpoint that goes wrong."""

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        name = lane.new_name("s")
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            before = await lane.look()
            error = await outcome(partial(lane.create, daemon, name, strategy=self.strategy))
            if self.faults.kills:
                await died(daemon)
            elif self.faults.holds_a_thread:
                assert isinstance(error, DiskStalled), f"it should be stalled: {error}"
                assert (await lane.look()).status == "running"
            else:
                await lane.settled(daemon)
                await _require_all_or_nothing(lane, daemon, before, name, error)
                await daemon.end()
        await self.faults.strike_later(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await _require_all_or_nothing(lane, daemon, before, name, error)
            await lane.goes_on(daemon, self.strategy)
            await daemon.end()


def creating(strategy: Strategy) -> list[Creating]:
    """At every point that a checkpoint by *strategy* passes."""
    points = between(Point.CREATE_PLANNED, Point.SETTLED)
    passed = [point for point in points if strategy in _NOT_ALWAYS.get(point, (strategy,))]
    return [Creating(strategy, faults) for faults in each(passed)]


def undoing(strategy: Strategy) -> list[Creating]:
    """While the job undoes itself."""
    failed = (Point.FINISH_SYNCED, Action.ERROR)
    return [Creating(strategy, faults) for faults in each(UNDO_POINTS, failed)]


def recovering(strategy: Strategy) -> list[Creating]:
    """While the next daemon undoes it."""
    crashed = (Point.CAPTURE_PIVOTED, Action.KILL)
    return [Creating(strategy, faults) for faults in each_later(UNDO_POINTS, crashed)]


def saving_again(strategy: Strategy) -> list[Creating]:
    """While QEMU is made able to save again after a drained save: that is before 9.0."""
    failed = (Point.FINISH_SYNCED, Action.ERROR)
    return [Creating(strategy, faults) for faults in each((Point.UNDO_SAVES_AGAIN,), failed)]


async def _require_all_or_nothing(
    lane: Lane, daemon: Forged, before: Footprint, name: str, error: QsnapError | None
) -> None:
    now = await lane.look()
    lane.no_complaints()
    listed = name in await lane.listed(daemon)
    assert listed or error is not None, "reported as taken, and not listed"
    assert now.status == "running", f"the guest does not run: {now.status}"
    if not listed:
        require_as_before(before, now, error)
        return
    for what in ("capabilities", "parameters", "block_jobs"):
        assert getattr(now, what) == getattr(before, what), f"{what} are not as before"
