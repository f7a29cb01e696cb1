"""Calls that make VMs out of snapshots, and forget them."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, ProgressReply, follow
from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName
from qsnapd.model.request import CloneRequest


class UndefineReply(Frozen):
    removed: tuple[str, ...]
    """Paths of files that were made for the VM and are gone now."""


class CloneSnapshot(Method):
    """Start another VM from a snapshot, beside the one it was taken of.

    Replies are those of CreateSnapshot, and the job is the new VM's. Its notes say what
    differs from the original, and what the two share. Requests that name a monitor or
    substitutes are for root only.
    """

    role = Role.OPERATOR
    vm: VmName
    request: CloneRequest

    def needed_role(self) -> Role:
        # Names on the host, which root's helper would use as the QEMU's user.
        return Role.ADMIN if self.request.qmp or self.request.substitutes else self.role

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await follow(await host.clone(self.vm, self.request), host, more)


class UndefineVm(Method):
    """Forget a clone that is shut off. VMs of the configuration file are refused."""

    role = Role.OPERATOR
    vm: VmName
    remove_storage: bool = False
    """Remove its disk images too, with all that its guest has written."""

    async def answer(self, host: Host, more: More | None) -> UndefineReply:
        removed = await host.undefine(self.vm, remove_storage=self.remove_storage)
        return UndefineReply(removed=removed)
