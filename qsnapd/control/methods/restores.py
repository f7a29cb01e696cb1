"""Calls that put VMs back to snapshots."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More, ProgressReply, follow
from qsnapd.model.base import Frozen
from qsnapd.model.launch import LaunchInfo
from qsnapd.model.names import VmName
from qsnapd.model.request import RevertRequest


class LaunchReply(Frozen):
    launch: LaunchInfo


class RevertSnapshot(Method):
    """Put the VM back to a snapshot. Replies are those of CreateSnapshot."""

    role = Role.OPERATOR
    vm: VmName
    request: RevertRequest

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await follow(await host.revert(self.vm, self.request), host, more)


class StartVm(Method):
    """Start a VM left shut off by a revert to a snapshot without memory, or a clone.

    Replies are those of CreateSnapshot; the snapshot is the one that the VM goes on from.
    """

    role = Role.OPERATOR
    vm: VmName

    async def answer(self, host: Host, more: More | None) -> ProgressReply:
        return await follow(await host.start(self.vm), host, more)


class DescribeLaunch(Method):
    """Say how QEMU would be started by a revert; does nothing."""

    role = Role.OPERATOR
    vm: VmName
    request: RevertRequest

    async def answer(self, host: Host, more: More | None) -> LaunchReply:
        return LaunchReply(launch=await host.launch(self.vm, self.request))
