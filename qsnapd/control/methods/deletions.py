"""Calls that delete snapshots."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, ProgressReply, follow
from qsnapd.model.names import VmName
from qsnapd.model.request import DeleteRequest


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
