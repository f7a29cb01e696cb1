"""Jobs in whose midst QEMU misbehaves, at exactly this point or that."""

import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path

import trio

from qsnapd.errors import QsnapError, WrongState
from qsnapd.faults import Action, Point
from tests.attacks.deeds import REPLY_LIMIT_S, Culprit, Deed, extra_arguments
from tests.attacks.forge import Forge, Forged
from tests.attacks.killing import Job, Work, struck
from tests.attacks.lane import (
    LOOK_AGAIN_S,
    SETTLE_LIMIT_S,
    Lane,
    open_lane,
    outcome,
    require_as_before,
)
from tests.attacks.planted import died, spelled
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.real.cases import VM

_STILL = (Point.CAPTURE_STOPPED, Point.CAPTURE_PIVOTED, Point.CAPTURE_SAVING)
POINTS = {
    Work.STOPPED: (
        *(Point.CREATE_PREPARED, *_STILL, Point.CAPTURE_SAVED, Point.CAPTURE_LEFT),
        *(Point.FINISH_SYNCED, Point.COMMITTED),
    ),
    Work.PRECOPY: (
        *(Point.CREATE_PREPARED, Point.CAPTURE_SAVING, Point.CAPTURE_SWITCHOVER),
        *(Point.CAPTURE_CONTINUED, Point.CAPTURE_SAVED, Point.CAPTURE_LEFT),
    ),
    Work.BACKGROUND: (
        *(Point.CREATE_PREPARED, *_STILL, Point.CAPTURE_CAPTURED, Point.CAPTURE_RELEASED),
        *(Point.CAPTURE_LEFT, Point.SETTLE_CURRENT_SET),
    ),
    Work.DISK_ONLY: (Point.CREATE_NODES_ADDED, Point.CAPTURE_PIVOTED),
    Work.REVERT: (
        *(Point.REVERT_PLANNED, Point.REVERT_KEPT, Point.REVERT_PREPARED, Point.REVERT_NO_RETURN),
        *(Point.REVERT_STARTED, Point.REVERT_LOADED, Point.REVERT_LET_GO, Point.REVERT_RUNS),
    ),
    Work.DELETE: (
        *(Point.DELETE_PLANNED, Point.DELETE_MERGING, Point.DELETE_AT_REST, Point.DELETE_COPIED),
        *(Point.DELETE_SWITCHED, Point.DELETE_RECORDED),
    ),
}

_PLACES = [(work, point) for work in Work for point in POINTS[work]]


@dataclass(frozen=True)
class Misbehaves:
    """One job, one point of it, and what is done there."""

    deed: Deed
    work: Work
    point: Point

    def __str__(self) -> str:
        return f"{self.deed}, {self.work}, {self.point.name}"

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)
            await daemon.end()
        fault = spelled([(self.point, Action.STOP)])
        async with lane.daemon(fault, reply_limit_s=REPLY_LIMIT_S) as daemon:
            await lane.settled(daemon)
            before, pid = await lane.look(), lane.vm.pid
            culprit = Culprit(self.deed, lane)
            error = await self._struck(job, daemon, culprit)
            await culprit.mend(daemon)
            await lane.settled(daemon)
            if error is not None:
                _require_clean(error)
                if lane.vm.pid == pid and self.work is not Work.DELETE:
                    require_as_before(before, await lane.look(), error)
            await daemon.end()
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await job.require_whole(daemon, await job.finish(daemon, error))
            await daemon.end()

    async def _struck(self, job: Job, daemon: Forged, culprit: Culprit) -> QsnapError | None:
        """Do the job, and the deed in its midst; returns what the job failed with, if it did."""

        async def strike() -> None:
            await stands(daemon)
            await culprit.strike()
            if (self.work, self.point) == (Work.PRECOPY, Point.CAPTURE_SAVING):
                culprit.stopped_it = False  # it cannot be told from QEMU's own stop, at its end
            daemon.signal(signal.SIGCONT)
            await culprit.later()

        return await struck(partial(job.do, daemon), strike, 0)


@dataclass(frozen=True)
class MonitorTaken:
    """A daemon is killed, and another client has the monitor before the next one."""

    work: Work
    point: Point

    def __str__(self) -> str:
        return f"monitor taken, {self.work}, {self.point.name}"

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)
            await daemon.end()
        async with lane.daemon(spelled([(self.point, Action.STOP)])) as daemon:
            await lane.settled(daemon)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(outcome, partial(job.do, daemon)))
                await stands(daemon)
                daemon.signal(signal.SIGKILL)
                await died(daemon)
        async with await trio.open_unix_socket(lane.vm.qmp) as other:
            await Monitor(other).greet()
            async with lane.daemon() as daemon:
                await _told_busy(daemon)
                await other.aclose()
                await lane.settled(daemon)
                error = await job.finish(daemon, WrongState("its daemon was killed"))
                await job.require_whole(daemon, error)
                await daemon.end()


async def _told_busy(daemon: Forged) -> None:
    """It says that somebody else has the monitor."""
    with trio.fail_after(SETTLE_LIMIT_S):
        while True:
            vm = (await daemon.call("GetVm", vm=VM))["vm"]
            if vm["problem"] and "one client" in vm["problem"]:
                return
            await trio.sleep(LOOK_AGAIN_S)


async def stands(daemon: Forged) -> None:
    """Wait until SIGSTOP has stopped it."""
    status = trio.Path(f"/proc/{daemon.pid}/stat")
    with trio.fail_after(SETTLE_LIMIT_S):
        while (await status.read_text()).rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC110
            await trio.sleep(LOOK_AGAIN_S)


def _require_clean(error: QsnapError) -> None:
    """It is one that tells a person why."""
    assert error.code not in ("internal", "control"), repr(error)


def every() -> list[Misbehaves]:
    """Every deed at every point."""
    return [Misbehaves(deed, *place) for deed, place in product(Deed, _PLACES)]


def taken() -> list[MonitorTaken]:
    """The monitor, while a guest stands still, or works on an overlay."""
    return [
        MonitorTaken(Work.STOPPED, Point.CAPTURE_SAVING),
        MonitorTaken(Work.BACKGROUND, Point.CAPTURE_RELEASED),
        MonitorTaken(Work.REVERT, Point.REVERT_KEPT),
        MonitorTaken(Work.DELETE, Point.DELETE_AT_REST),
    ]


def some(how_many: int, seed: int) -> list[Misbehaves]:
    """So many of them: all deeds in turn, each at other points."""
    places = _PLACES.copy()
    random.Random(seed).shuffle(places)
    pairs = zip(cycle(Deed), cycle(places), strict=False)
    return [Misbehaves(deed, *place) for deed, place in islice(pairs, how_many)]


@asynccontextmanager
async def open_ported_lane(forge: Forge, qemu: Qemu, folder: Path) -> AsyncIterator[Lane]:
    """A lane whose guest can be made to panic, to reboot, and to power itself off."""
    await trio.Path(folder).mkdir(parents=True, exist_ok=True)
    async with open_lane(forge, qemu, folder, extra=extra_arguments(folder)) as lane:
        yield lane
