"""What is asked of a VM's guest agent by hand."""

from collections.abc import Sequence

from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import VmBusy, WrongState
from qsnapd.model.freeze import Filesystem
from qsnapd.model.state import State
from qsnapd.snapshot.taking.filesystems import freeze_by_hand, list_filesystems, thaw_by_hand
from qsnapd.vm.attached import AttachedVm


async def freeze_filesystems(supervisor: Supervisor, mountpoints: Sequence[str]) -> int:
    """See `control.host.Host`."""
    vm = _running(supervisor)
    agent = supervisor.provisions.require_agent(vm.name)
    if supervisor.job is not None:
        raise VmBusy(
            f"a {supervisor.job.kind} job runs on VM {vm.name}: its file systems can be frozen by "
            "hand when that has ended"
        )
    try:
        return await freeze_by_hand(
            *(vm, supervisor.store, agent),
            limit_s=supervisor.provisions.freeze_limit_s,
            mountpoints=mountpoints,
        )
    finally:
        supervisor.thawer.look()  # a thaw may be owed


async def thaw_filesystems(supervisor: Supervisor) -> int:
    """See `control.host.Host`."""
    vm = _running(supervisor)
    agent = supervisor.provisions.require_agent(vm.name)
    count = await thaw_by_hand(vm, supervisor.store, agent)
    supervisor.thawer.look()  # none is owed any more
    return count


async def filesystems(supervisor: Supervisor) -> tuple[Filesystem, ...]:
    """See `control.host.Host`."""
    vm = _running(supervisor)
    return await list_filesystems(vm, supervisor.provisions.require_agent(vm.name))


def _running(supervisor: Supervisor) -> AttachedVm:
    """The VM, if its guest can answer. Raises: WrongState."""
    vm = supervisor.require_attached()
    condition = supervisor.tracker.condition
    if condition.state is not State.RUNNING:
        raise WrongState(
            f"domain is not running: VM {vm.name} is {condition.text}, so that the agent in its "
            "guest cannot answer"
        )
    return vm
