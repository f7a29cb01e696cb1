"""Jobs whose events are lost, doubled or late, and one of whose replies comes late or never."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

from tests.attacks.deeds import REPLY_LIMIT_S
from tests.attacks.garbled import BEGIN, Fate, Garbling
from tests.attacks.killing import Job, Work
from tests.attacks.lane import Lane, outcome, require_as_before

REPLIES = 85
"""A job has hardly more."""


@dataclass(frozen=True)
class Garbles:
    """One job over a monitor that garbles."""

    work: Work
    garbling: Garbling

    def __str__(self) -> str:
        return f"{self.garbling}, {self.work}"

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            job = await Job.prepared(lane, daemon, self.work)
            await daemon.end()
        order = self.garbling.as_order()
        async with lane.daemon(reply_limit_s=REPLY_LIMIT_S, garbling=order) as daemon:
            await lane.settled(daemon)
            before, pid = await lane.look(), lane.vm.pid
            daemon.signal(BEGIN)
            error = await outcome(partial(job.do, daemon))
            await lane.settled(daemon)
            if error is not None and lane.vm.pid == pid and self.work is not Work.DELETE:
                require_as_before(before, await lane.look(), error)
            await daemon.end()
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await job.require_whole(daemon, await job.finish(daemon, error))
            await daemon.end()


def by_lot(how_many: int, seed: int) -> list[Garbles]:
    """Each work in turn; a third each with garbled events, a late reply, and a missing one."""
    chance = random.Random(seed)
    return [_drawn(work, chance, number) for number, work in _in_turn(how_many)]


def _in_turn(how_many: int) -> Iterator[tuple[int, Work]]:
    return enumerate(islice(cycle(Work), how_many))


def _drawn(work: Work, chance: random.Random, number: int) -> Garbles:
    seed = chance.randrange(1 << 30)
    reply = chance.randrange(1, REPLIES + 1)
    match (number + number // len(Work)) % 3:
        case 0:
            return Garbles(work, Garbling(seed, True, 0, Fate.LATE))
        case 1:
            return Garbles(work, Garbling(seed, False, reply, Fate.LATE))
    return Garbles(work, Garbling(seed, False, reply, Fate.NEVER))


def every() -> list[Garbles]:
    """Each reply of each work comes too late, or never; and events garbled in many ways."""
    return by_lot(120, 1) + [
        Garbles(work, Garbling(0, False, reply, fate))
        for work in Work
        for reply in range(1, REPLIES + 1)
        for fate in Fate
    ]
