"""Jobs whose disk fills up, breaks or stalls, that of the memory image and of the store."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import trio

from qsnapd.errors import QsnapError
from qsnapd.model.snapshot import Strategy
from tests.attacks.campaign import OpenLane
from tests.attacks.forge import Forge, Forged
from tests.attacks.killing import Job, Work, struck
from tests.attacks.lane import Lane, open_lane, outcome, require_as_before
from tests.attacks.media import MIB, Kind, Medium, open_medium, run
from tests.parts import Qemu
from tests.real.cases import VM
from tests.real.footprint import Footprint

SMALL_BYTES, LARGE_BYTES = 512 * MIB, 1024 * MIB
"""A tmpfs is filled with memory, others with nothing; and they need room of their own."""
NEEDED_BYTES = 230 * MIB
"""For the guest's memory, its devices' state, and what is to stay free; and a little more."""
LEVELS = 20
LATEST_S = 0.6
ANSWER_LIMIT_S = 10.0


def medium_of(lane: Lane) -> Medium:
    assert lane.medium is not None, "its store is on a file system of its own"
    return lane.medium


@dataclass(frozen=True)
class Filled:
    """Not more than that is free when the job begins."""

    strategy: Strategy
    level: int
    """0: nothing; LEVELS - 1: just enough."""

    def __str__(self) -> str:
        return f"disk filled to level {self.level}, {self.strategy}"

    async def attack(self, lane: Lane) -> None:
        medium = medium_of(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            before, name = await lane.look(), lane.new_name("s")
            medium.fill(leaving_bytes=NEEDED_BYTES * self.level // (LEVELS - 1))
            error = await outcome(partial(lane.create, daemon, name, strategy=self.strategy))
            await lane.guest_runs()
            medium.clear()
            await lane.settled(daemon)
            assert (error is None) is (self.level == LEVELS - 1), repr(error)
            if error is not None:
                require_as_before(before, await lane.look(), error)
            await lane.goes_on(daemon, self.strategy)
            await lane.delete_all(daemon)  # the disk is small
            await daemon.end()


class Failure(StrEnum):
    """What becomes of a disk in the midst of a job."""

    FULL = "full"
    """ENOSPC."""
    QUOTA = "quota used up"
    """EDQUOT."""
    DEAD = "dead"
    """EIO, until it is mounted again."""
    READ_ONLY = "read-only"
    """EROFS, until it is mounted again."""
    STALLED = "stalled"

    @property
    def kind(self) -> Kind:
        return {Failure.QUOTA: Kind.BTRFS, Failure.FULL: Kind.XFS}.get(self, Kind.EXT4)

    @property
    def needs_mount(self) -> bool:
        return self in (Failure.DEAD, Failure.READ_ONLY)


@dataclass(frozen=True)
class Fails:
    """In the midst of a job the disk fails, and is mended only once the guest runs all the same."""

    failure: Failure
    work: Work
    seed: int

    def __str__(self) -> str:
        return f"disk {self.failure}, {self.work}, {self.seed}"

    async def attack(self, lane: Lane) -> None:
        medium = medium_of(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)
            before = await lane.look()
            fail = partial(self._fail, medium)
            after_s = random.Random(self.seed).uniform(0, LATEST_S)
            error = await struck(partial(job.do, daemon), fail, after_s)
            await lane.guest_runs()
            with trio.fail_after(ANSWER_LIMIT_S):
                await daemon.call("GetVm", vm=VM)
            if self.failure.needs_mount:
                await daemon.end()
            await self._mend(medium)
            if not self.failure.needs_mount:
                await self._require_whole(job, daemon, error, before)
        if self.failure.needs_mount:
            async with lane.daemon() as daemon:
                await self._require_whole(job, daemon, error, before)

    async def _fail(self, medium: Medium) -> None:
        match self.failure:
            case Failure.FULL:
                medium.fill(leaving_bytes=0)
            case Failure.QUOTA:
                await medium.limit(MIB)
            case Failure.DEAD:
                medium.shut_down()
            case Failure.READ_ONLY:
                medium.become_read_only()
            case Failure.STALLED:
                await medium.stall()

    async def _mend(self, medium: Medium) -> None:
        match self.failure:
            case Failure.FULL:
                medium.clear()
            case Failure.QUOTA:
                await medium.lift()
            case Failure.DEAD | Failure.READ_ONLY:
                await medium.unmount()
                await medium.mount()
            case Failure.STALLED:
                await medium.go_on()

    async def _require_whole(
        self, job: Job, daemon: Forged, error: QsnapError | None, before: Footprint
    ) -> None:
        """It was done, and for good; or there is nothing of it."""
        lane = job.lane
        await lane.settled(daemon)
        listed = await lane.listed(daemon)
        if self.work not in (Work.REVERT, Work.DELETE) and job.name not in listed:
            require_as_before(before, await lane.look(), error)
        await job.require_whole(daemon, error)
        await lane.delete_all(daemon)  # the disk is small
        await daemon.end()


def fillings() -> list[Filled]:
    """All levels, from nothing to just enough, by each strategy."""
    return [Filled(strategy, level) for strategy in Strategy for level in range(LEVELS)]


def fillings_in_turn() -> list[Filled]:
    """All levels, by the strategies in turn."""
    return [Filled(strategy, n) for n, strategy in enumerate(islice(cycle(Strategy), LEVELS))]


def failures(failure: Failure, how_many: int, seed: int) -> list[Fails]:
    """So many, at instants drawn by lot, in each kind of job in turn."""
    drawn = enumerate(islice(cycle(Work), how_many))
    return [Fails(failure, work, seed * 1_000_000 + number) for number, work in drawn]


def lanes_on(kind: Kind) -> OpenLane:
    """VMs whose store is on a small file system of that kind."""

    size_bytes = SMALL_BYTES if kind is Kind.TMPFS else LARGE_BYTES

    @asynccontextmanager
    async def opened(forge: Forge, qemu: Qemu, folder: Path) -> AsyncIterator[Lane]:
        async with (
            open_medium(kind, folder, size_bytes) as medium,
            open_lane(forge, qemu, folder, medium=medium) as lane,
        ):
            await run("sync", "--file-system", medium.path)
            yield lane

    return opened
