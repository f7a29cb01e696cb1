"""Calls about VMs."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More
from qsnapd.model.base import Frozen
from qsnapd.model.names import VmName
from qsnapd.model.vm import DiskInfo, VmInfo


class VmsReply(Frozen):
    vms: tuple[VmInfo, ...]


class VmReply(Frozen):
    vm: VmInfo


class DisksReply(Frozen):
    disks: tuple[DiskInfo, ...]


class ListVms(Method):
    """List the configured VMs, by name."""

    async def answer(self, host: Host, more: More | None) -> VmsReply:
        return VmsReply(vms=await host.look_at_all())


class GetVm(Method):
    """Look at one VM."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> VmReply:
        return VmReply(vm=await host.look(self.vm))


class ListDisks(Method):
    """List the disks of a running VM, also those that snapshots leave out."""

    vm: VmName

    async def answer(self, host: Host, more: More | None) -> DisksReply:
        return DisksReply(disks=await host.disks(self.vm))


class Suspend(Method):
    """Pause the guest; the reply shows the VM as it then is."""

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> VmReply:
        await host.suspend(self.vm)
        return VmReply(vm=await host.look(self.vm))


class Resume(Method):
    """Let a paused guest run; the reply shows the VM as it then is."""

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> VmReply:
        await host.resume(self.vm)
        return VmReply(vm=await host.look(self.vm))
