"""Jobs whose events are lost, doubled or late, and one of whose replies comes late or never."""

from dataclasses import dataclass
from functools import partial

from tests.attacks.deeds import REPLY_LIMIT_S
from tests.attacks.garbled import BEGIN, Garbling
from tests.attacks.killing import Job, Work
from tests.attacks.lane import Lane, difference, outcome

REPLIES = {
    Work.STOPPED: 60,
    Work.PRECOPY: 60,
    Work.BACKGROUND: 60,
    Work.DISK_ONLY: 60,
    Work.REVERT: 60,
    Work.DELETE: 60,
}


@dataclass(frozen=True)
class Garbles:
    """One job over a monitor that garbles."""

    work: Work
    garbling: Garbling

    def __str__(self) -> str:
        return f"{self.work}, {self.garbling}"

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
                now = await lane.look()
                assert now == before, f"left over: {difference(before, now)}; {error}"
            await daemon.end()
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await job.require_whole(daemon, error)
            await daemon.end()
