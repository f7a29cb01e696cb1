"""Faults at every point that deleting or renaming a snapshot passes."""

from dataclasses import dataclass
from functools import partial

from qsnapd.faults import Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import Forged
from tests.attacks.lane import Lane, outcome
from tests.attacks.planted import Faults, Planted, between, died, each, spelled
from tests.real.cases import VM


@dataclass(frozen=True)
class Deleting(Planted):
    """One deletion that goes wrong: of the older of two snapshots."""

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        older, newer = lane.new_name("old"), lane.new_name("new")
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await lane.create(daemon, older, strategy=self.strategy)
            await lane.create(daemon, newer, strategy=self.strategy)
            await daemon.end()
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            error = await outcome(partial(_delete, daemon, older))
            if self.faults.kills:
                await died(daemon)
            elif self.faults.holds_a_thread:
                assert (await lane.look()).status == "running"
            else:
                await lane.settled(daemon)
                await daemon.end()
        await self.faults.strike_later(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            assert (await lane.look()).status == "running"
            if older in await lane.listed(daemon):
                assert error is not None, "reported as deleted, and listed"
                await _delete(daemon, older)
            listed = await lane.listed(daemon)
            assert (older in listed, newer in listed) == (False, True), listed
            await lane.restores(daemon, newer)
            await lane.goes_on(daemon, self.strategy)
            await daemon.end()


@dataclass(frozen=True)
class Renaming:
    """One rename that goes wrong."""

    faults: Faults

    def __str__(self) -> str:
        return str(self.faults)

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        old, new = lane.new_name("old"), lane.new_name("new")
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            await lane.create(daemon, old)
            rename = partial(daemon.call, "RenameSnapshot", vm=VM, name=old, new_name=new)
            error = await outcome(rename)
            if self.faults.kills:
                await died(daemon)
            elif not self.faults.holds_a_thread:
                await daemon.end()
        await self.faults.strike_later(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            listed = await lane.listed(daemon)
            [name] = {old, new} & set(listed)
            assert name == new or error is not None, "reported as renamed, and is not"
            await lane.restores(daemon, name)
            await lane.goes_on(daemon, Strategy.STOPPED)
            await daemon.end()


def deleting(strategy: Strategy) -> list[Deleting]:
    points = between(Point.DELETE_PLANNED, Point.DELETED)
    return [Deleting(strategy, faults) for faults in each(points)]


def renaming(_strategy: Strategy) -> list[Renaming]:
    return [Renaming(faults) for faults in each(between(Point.RENAME_NOTED, Point.RENAMED))]


async def _delete(daemon: Forged, name: str) -> object:
    return await daemon.call("DeleteSnapshot", vm=VM, request={"name": name})
