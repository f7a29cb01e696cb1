"""Faults at every point that a revert passes, on its way there and back."""

from dataclasses import dataclass
from functools import partial

from qsnapd.errors import QsnapError
from qsnapd.faults import Action, Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import Forged
from tests.attacks.lane import Lane, outcome, require_as_before
from tests.attacks.planted import Planted, between, died, each, spelled
from tests.real.footprint import Footprint

TARGET = "target"
_TAKING_BACK = (Point.TAKE_BACK_NOTED, Point.TAKE_BACK_WITHDRAWN, Point.REVERT_UNDONE)


@dataclass(frozen=True)
class Reverting(Planted):
    """One revert that goes wrong."""

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            if TARGET not in await lane.listed(daemon):
                await lane.create(daemon, TARGET, strategy=self.strategy)
            await daemon.end()
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            before, pid = await lane.look(), lane.vm.pid
            known = set(await lane.listed(daemon))
            error = await outcome(partial(lane.revert, daemon, TARGET, discard=False))
            if self.faults.kills:
                await died(daemon)
            else:
                await lane.settled(daemon)
                await daemon.end()
        await self.faults.strike_later(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await _require_one_or_the_other(lane, daemon, before, pid, known, error)
            await lane.guest_is_well(since=len(lane.vm.log_lines()))
            await lane.goes_on(daemon, Strategy.STOPPED)
            await daemon.end()


def reverting(strategy: Strategy) -> list[Reverting]:
    points = between(Point.REVERT_PLANNED, Point.REVERTED)
    return [Reverting(strategy, faults) for faults in each(points)]


def taking_back(strategy: Strategy) -> list[Reverting]:
    """The state is kept already, and then the revert fails."""
    failed = (Point.REVERT_PREPARED, Action.ERROR)
    return [Reverting(strategy, faults) for faults in each(_TAKING_BACK, failed)]


async def _require_one_or_the_other(
    lane: Lane,
    daemon: Forged,
    before: Footprint,
    pid: int,
    known: set[str],
    error: QsnapError | None,
) -> None:
    """The VM has gone back, and what it left is kept; or it goes on as if never asked.

    But for that its state may have been kept, if the daemon was killed then.
    """
    now, listed = await lane.look(), set(await lane.listed(daemon))
    assert now.status == "running", f"the guest does not run: {now.status}"
    assert known <= listed, f"lost: {known - listed}"
    if lane.vm.pid == pid:
        assert error is not None, "reported as reverted, and the old QEMU runs"
        if listed == known:
            require_as_before(before, now, error)
            return
    assert len(listed - known) == 1, f"kept: {listed - known}"
    current = (await daemon.call("GetCurrentSnapshot", vm="vm1"))["snapshot"]["name"]
    assert current in (TARGET, *(listed - known))
