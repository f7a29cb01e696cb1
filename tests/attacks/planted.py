"""What an attack by planted faults consists of: which faults, in which daemons."""

from collections.abc import Iterable
from dataclasses import dataclass

import trio

from qsnapd.faults import Action, Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import END_LIMIT_S, Forged
from tests.attacks.lane import STALL_LIMIT_S, Lane

Fault = tuple[Point, Action]

FAILURES = (Action.ERROR, Action.HANG, Action.KILL)

IN_THREADS = frozenset(
    {
        Point.FINISH_SYNCED,
        Point.FINISH_SEALED,
        Point.FINISH_VERIFIED,
        Point.COMMIT_MEMORY_NAMED,
        Point.COMMIT_OVERLAYS_NOTED,
        Point.COMMIT_MANIFEST_WRITTEN,
        Point.DELETE_UNLISTED,
        Point.DELETE_FILES_REMOVED,
        Point.DELETED,
        Point.RENAME_NOTED,
        Point.RENAME_COPIED,
        Point.RENAME_MOVED,
        Point.RENAMED,
    }
)
"""What hangs there is a thread, as of a file system that never answers again: nothing ends it but
the end of its process. Until then the journal stands, and the guest runs."""


@dataclass(frozen=True)
class Faults:
    """Those of one case."""

    first: tuple[Fault, ...]
    """In the daemon that does the job."""
    later: tuple[Fault, ...] = ()
    """In the one that finds what the first has left."""

    def __str__(self) -> str:
        return " then ".join(map(spelled, filter(None, (self.first, self.later))))

    @property
    def kills(self) -> bool:
        return _has(self.first, Action.KILL)

    @property
    def kills_later(self) -> bool:
        return _has(self.later, Action.KILL)

    @property
    def holds_a_thread(self) -> bool:
        return any(p in IN_THREADS and action is Action.HANG for p, action in self.first)

    async def strike_later(self, lane: Lane) -> None:
        """Let the second daemon have its faults, if there are any; check that all have struck."""
        if self.later:
            async with lane.daemon(spelled(self.later)) as daemon:
                await self._suffer(lane, daemon)
        self.require_struck(lane)

    def require_struck(self, lane: Lane) -> None:
        """Fail if one has not."""
        planted = [f"{action} at point {point.number}" for point, action in self.first + self.later]
        struck = lane.struck()
        assert len(struck) == len(planted), f"planted: {planted}, struck: {struck}"

    async def _suffer(self, lane: Lane, daemon: Forged) -> None:
        if self.kills_later:
            await died(daemon)
        elif any(p in IN_THREADS and action is Action.HANG for p, action in self.later):
            await trio.sleep(STALL_LIMIT_S)
        else:
            await lane.settled(daemon)
            await daemon.end()


@dataclass(frozen=True)
class Planted:
    """An attack on one job by faults."""

    strategy: Strategy
    """Of the checkpoint that the job takes, or is about."""
    faults: Faults

    def __str__(self) -> str:
        return f"{self.strategy}, {self.faults}"


def between(first: Point, last: Point) -> list[Point]:
    """All points from one to another, in the order of their numbers."""
    return [point for point in Point if first.number <= point.number <= last.number]


def each(points: Iterable[Point], *before: Fault) -> list[Faults]:
    """Every failure at each of the points, behind faults that have to come *before*."""
    return [Faults((*before, (point, action))) for point in points for action in FAILURES]


def each_later(points: Iterable[Point], *first: Fault) -> list[Faults]:
    """Every failure at each of the points in the daemon that comes after *first* have struck."""
    return [Faults(first, ((point, action),)) for point in points for action in FAILURES]


async def died(daemon: Forged) -> None:
    """Wait until it has been killed."""
    with trio.fail_after(END_LIMIT_S):
        await daemon.ended()


def spelled(faults: Iterable[Fault]) -> str:
    return ",".join(f"{point.number}:{action}" for point, action in faults)


def _has(faults: Iterable[Fault], wanted: Action) -> bool:
    return any(action is wanted for _, action in faults)
