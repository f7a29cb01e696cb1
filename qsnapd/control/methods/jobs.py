"""Calls about running jobs, and the events of the daemon."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More
from qsnapd.errors import WrongState
from qsnapd.model.base import Frozen
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobInfo
from qsnapd.model.names import VmName


class JobReply(Frozen):
    job: JobInfo | None


class EventReply(Frozen):
    event: Event | None


class GetJob(Method):
    """Look at the running job, or at the one that ended last."""

    vm: VmName
    completed: bool = False
    """Look at the one that ended last."""

    async def answer(self, host: Host, more: More | None) -> JobReply:
        return JobReply(job=host.last_job(self.vm) if self.completed else host.job(self.vm))


class AbortJob(Method):
    """Ask the running job to stop and to undo what it did.

    Does not wait for it: the job ends with JobCancelled, or succeeds if it was too late.
    """

    role = Role.OPERATOR
    vm: VmName
    id: int | None = None
    """Abort only this job, not one that began since."""

    async def answer(self, host: Host, more: More | None) -> JobReply:
        job = host.job(self.vm)
        if self.id is not None and (job is None or job.id != self.id):
            raise WrongState(f"job {self.id} of {self.vm} has ended")
        host.abort(self.vm)
        return JobReply(job=job)


class Subscribe(Method):
    """Report events as they happen; call with "more".

    The first reply comes at once, without an event: from then on none is missed.
    """

    only_more = True
    vm: VmName | None = None
    """Only events of this VM."""
    kinds: tuple[EventKind, ...] = ()
    """Only events of these kinds."""

    async def answer(self, host: Host, more: More | None) -> EventReply:
        if self.vm is not None:
            host.name_of(self.vm)
        assert more is not None, "the server refuses Subscribe without more"
        with host.subscribe() as events:
            await more(EventReply(event=None))
            async for event in events:
                if self.vm in (None, event.vm) and (not self.kinds or event.kind in self.kinds):
                    await more(EventReply(event=event))
        return EventReply(event=None)
