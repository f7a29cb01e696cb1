"""Faults while a checkpoint is undone whose daemon was killed, and whose QEMU has ended since."""

from dataclasses import dataclass
from functools import partial

import trio

from qsnapd.faults import Action, Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.lane import LOOK_AGAIN_S, SETTLE_LIMIT_S, Lane, outcome
from tests.attacks.planted import Planted, died, each_later, spelled

_POINTS = (Point.OFFLINE_MERGED, Point.OFFLINE_FILES_REMOVED)
_KILLED = (Point.CAPTURE_PIVOTED, Action.KILL)


@dataclass(frozen=True)
class Ended(Planted):
    """The guest has written into overlays by then, and flushed what it wrote."""

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        name = lane.new_name("s")
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            await outcome(partial(lane.create, daemon, name, strategy=self.strategy))
            await died(daemon)
        await lane.vm.kill()
        async with lane.daemon(spelled(self.faults.later)) as daemon:
            if self.faults.kills_later:
                await died(daemon)
            else:
                await _struck(lane)
                await daemon.end()
        self.faults.require_struck(lane)
        async with lane.daemon() as daemon:
            await lane.start_if_off(daemon)
            assert name not in await lane.listed(daemon)
            await lane.goes_on(daemon, self.strategy)
            await daemon.end()


def ended(strategy: Strategy) -> list[Ended]:
    return [Ended(strategy, faults) for faults in each_later(_POINTS, _KILLED)]


async def _struck(lane: Lane) -> None:
    with trio.fail_after(SETTLE_LIMIT_S):
        while not lane.has_struck(2):  # noqa: ASYNC110 -- of a file that grows nobody tells
            await trio.sleep(LOOK_AGAIN_S)
