"""Calls that delete snapshots."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, ProgressReply, follow, tell_progress
from qsnapd.model.base import Frozen
from qsnapd.model.job import JobInfo
from qsnapd.model.names import VmName
from qsnapd.model.request import DeleteRequest, PruneRequest
from qsnapd.model.retention import Pruned


class PruneReply(Frozen):
    job: JobInfo | None = None
    """None if nothing was to be done but to look."""
    pruned: Pruned | None = None
    """In the last reply."""


class DeleteSnapshot(Method):
    """Delete snapshots: what was written after them goes down into the older image.

    The VM goes on as it is, running or not. Replies are those of CreateSnapshot; the
    snapshot is what the named one was. Files that qsnapd has not made are never removed; the
    job's notes name what is left.
    """

    role = Role.OPERATOR
    vm: VmName
    request: DeleteRequest

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await follow(await host.delete(self.vm, self.request), host, more)


class PruneSnapshots(Method):
    """Delete the snapshots that need not be kept, as DeleteSnapshot does, the oldest first.

    The current one is always kept. One whose deletion is refused stays, and the others go all
    the same. With "more", replies before the last one say how far the job is; a client that
    leaves does not end it.
    """

    role = Role.OPERATOR
    vm: VmName
    request: PruneRequest
    dry_run: bool = False
    """Only say what would be deleted, and what of it is in use."""

    async def answer(self, host: Host, more: More | None) -> PruneReply:
        if self.dry_run:
            return PruneReply(pruned=await host.foresee_prune(self.vm, self.request))
        pruning = await host.prune(self.vm, self.request)
        if more is not None:
            await tell_progress(pruning.job, lambda info: more(PruneReply(job=info)))
        await pruning.job.wait_done()
        return PruneReply(job=pruning.job.info(), pruned=pruning.pruned)
