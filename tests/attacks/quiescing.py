"""Faults around the moment in which the guest's file systems are frozen."""

from dataclasses import dataclass
from functools import partial

from qsnapd.faults import Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.lane import Lane, outcome, require_as_before
from tests.attacks.planted import Faults, died, each, spelled
from tests.real.quiescing import wait_writing

_POINTS = (
    Point.THAW_OWED,
    Point.CAPTURE_FROZEN,
    Point.CAPTURE_PIVOTED,
    Point.CAPTURE_THAWED,
    Point.CAPTURE_LEFT,
    Point.COMMITTED,
)


@dataclass(frozen=True)
class Quiescing:
    """One quiesced snapshot that goes wrong."""

    faults: Faults

    def __str__(self) -> str:
        return str(self.faults)

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError, or TooSlowError if the guest stays frozen."""
        name = lane.new_name("q")
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            before = await lane.look()
            quiesced = partial(lane.create, daemon, name, disk_only=True, quiesce=True)
            error = await outcome(quiesced)
            if self.faults.kills:
                await died(daemon)
            else:
                await lane.settled(daemon)
                await wait_writing(lane.vm)
                await daemon.end()
        await self.faults.strike_later(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await wait_writing(lane.vm)
            now = await lane.look()
            if name in await lane.listed(daemon):
                assert now.status == "running"
            else:
                assert error is not None, "reported as taken, and not listed"
                require_as_before(before, now, error)
            again = lane.new_name("n")
            await lane.create(daemon, again, disk_only=True, quiesce=True)
            await wait_writing(lane.vm)
            await lane.tidy(daemon)
            await daemon.end()


def quiescing(_strategy: Strategy) -> list[Quiescing]:
    return [Quiescing(faults) for faults in each(_POINTS)]
