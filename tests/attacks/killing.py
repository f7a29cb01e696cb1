"""Daemons and QEMUs that are killed, and jobs that are cancelled, at instants drawn by lot."""

import random
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import cycle, islice

import trio

from qsnapd.errors import JobCancelled, QsnapError, WrongState
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import Forged
from tests.attacks.lane import Lane, outcome, require_as_before
from tests.attacks.planted import died
from tests.real.cases import VM

KEPT = "kept"
LATEST_S = 1.2
"""A job takes about that long at most; some are struck after their end."""


class Work(StrEnum):
    """What is being done when it strikes."""

    STOPPED = "stopped"
    PRECOPY = "precopy"
    BACKGROUND = "background"
    DISK_ONLY = "disk-only"
    REVERT = "revert"
    DELETE = "delete"


@dataclass
class Job:
    """One job, for somebody to break in upon."""

    lane: Lane
    work: Work
    name: str
    """Of the snapshot that is taken, reverted to or deleted."""
    known: set[str]
    """The snapshots before."""

    @classmethod
    async def prepared(cls, lane: Lane, daemon: Forged, work: Work) -> "Job":
        name = lane.new_name("s")
        if work in (Work.REVERT, Work.DELETE):
            await lane.create(daemon, name)
        if work is Work.DELETE:
            await lane.create(daemon, lane.new_name("above"))
        return cls(lane, work, name, set(await lane.listed(daemon)))

    async def do(self, daemon: Forged) -> object:
        match self.work:
            case Work.REVERT:
                return await self.lane.revert(daemon, self.name, discard=False)
            case Work.DELETE:
                return await daemon.call("DeleteSnapshot", vm=VM, request={"name": self.name})
            case Work.DISK_ONLY:
                return await self.lane.create(daemon, self.name, disk_only=True)
        return await self.lane.create(daemon, self.name, strategy=self.work)

    async def finish(self, daemon: Forged, error: QsnapError | None) -> QsnapError | None:
        """Ask again for a deletion that has failed half-way, as its user has to.

        *error*: what the job has failed with, if it has. Returns with what it has failed in all.
        """
        if self.work is not Work.DELETE:
            return error
        if self.name in await self.lane.listed(daemon):
            assert error is not None, "reported as deleted, and listed"
            await self.do(daemon)
        return None

    async def require_whole(self, daemon: Forged, error: QsnapError | None) -> None:
        """What it was to do was done, or not; no other snapshot is lost."""
        listed = set(await self.lane.listed(daemon))
        lost = self.known - listed - {self.name}
        assert not lost, f"lost: {lost}"
        if error is None:
            assert (self.name in listed) is (self.work is not Work.DELETE)
        await self.lane.guest_is_well(since=len(self.lane.vm.log_lines()))
        if self.name in listed and self.work not in (Work.DISK_ONLY, Work.DELETE):
            await self.lane.restores(daemon, self.name)
        await self.lane.goes_on(daemon, Strategy.STOPPED)


@dataclass(frozen=True)
class DaemonKilled:
    """Of SIGKILL; the next one finds what it left."""

    work: Work
    seed: int

    def __str__(self) -> str:
        return f"daemon killed, {self.work}, {self.seed}"

    async def attack(self, lane: Lane) -> None:
        chance = random.Random(self.seed)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)

            async def strike() -> None:
                daemon.signal(signal.SIGKILL)
                await trio.lowlevel.checkpoint()

            error = await struck(partial(job.do, daemon), strike, chance.uniform(0, LATEST_S))
            await died(daemon)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await job.require_whole(daemon, error)
            await daemon.end()


@dataclass(frozen=True)
class JobAborted:
    """As by Ctrl-C or domjobabort."""

    work: Work
    seed: int

    def __str__(self) -> str:
        return f"job cancelled, {self.work}, {self.seed}"

    async def attack(self, lane: Lane) -> None:
        chance = random.Random(self.seed)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)
            before, pid = await lane.look(), lane.vm.pid

            async def abort() -> None:
                error = await outcome(partial(daemon.call, "AbortJob", vm=VM))
                assert error is None or isinstance(error, WrongState), error

            error = await struck(partial(job.do, daemon), abort, chance.uniform(0, LATEST_S))
            assert error is None or isinstance(error, JobCancelled), repr(error)
            await lane.settled(daemon)
            # A deletion may have moved some data: it is deleted again later.
            if error is not None and lane.vm.pid == pid and self.work is not Work.DELETE:
                require_as_before(before, await lane.look(), error)
            await job.require_whole(daemon, error)
            await daemon.end()


@dataclass(frozen=True)
class QemuKilled:
    """The VM ends, with all that its guest had in memory; what was on its disks stays."""

    work: Work
    seed: int

    def __str__(self) -> str:
        return f"QEMU killed, {self.work}, {self.seed}"

    async def attack(self, lane: Lane) -> None:
        chance = random.Random(self.seed)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)
            await struck(partial(job.do, daemon), lane.vm.kill, chance.uniform(0, LATEST_S))
            await lane.start_if_off(daemon)
            await job.require_whole(daemon, None if self.work is Work.DELETE else WrongState(""))
            await daemon.end()


async def struck(
    work: Callable[[], Awaitable[object]], strike: Callable[[], Awaitable[object]], after_s: float
) -> QsnapError | None:
    """Do *work*, and *strike* in the middle; returns what the work failed with, if it did."""
    error: QsnapError | None = None

    async def do() -> None:
        nonlocal error
        error = await outcome(work)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(do)
        await trio.sleep(after_s)
        await strike()
    return error


Kind = type[DaemonKilled] | type[JobAborted] | type[QemuKilled]


def by_lot(
    kind: Kind, works: list[Work], how_many: int, seed: int
) -> list[DaemonKilled | JobAborted | QemuKilled]:
    """So many attacks of a kind, on each of *works* in turn."""
    drawn = enumerate(islice(cycle(works), how_many))
    return [kind(work, seed * 1_000_000 + number) for number, work in drawn]
