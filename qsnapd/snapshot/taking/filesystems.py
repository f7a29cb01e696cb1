"""What a user does to the guest's file systems by hand, through the guest agent."""

from collections.abc import Sequence

import trio

from qsnapd.errors import VmBusy
from qsnapd.model.freeze import Filesystem
from qsnapd.qmp import agent_commands
from qsnapd.qmp.agent import GuestAgent
from qsnapd.snapshot.taking.freeze import connect, freeze
from qsnapd.store.owed_thaw import forget_owed_thaw
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm

FORGET_LIMIT_S = 10.0


async def freeze_by_hand(
    vm: AttachedVm,
    store: VmStore,
    agent: GuestAgent,
    *,
    limit_s: float,
    mountpoints: Sequence[str] = (),
) -> int:
    """Freeze for the user, who thaws again; returns how many file systems.

    On failure or cancellation: what may have been frozen is thawed, or a thaw is owed.
    Raises: as `freeze.frozen`. VmBusy: the agent is in use.
    """
    _require_idle(vm, agent)
    async with agent.alone():
        session, count = await freeze(
            vm, store, agent, "its user", limit_s=limit_s, mountpoints=mountpoints
        )
        session.close()
        with trio.fail_after(FORGET_LIMIT_S, shield=True):  # from now on it is the user's
            await in_thread(forget_owed_thaw, store)
    return count


async def thaw_by_hand(vm: AttachedVm, store: VmStore, agent: GuestAgent) -> int:
    """Thaw whatever is frozen, whoever froze it; returns how many file systems were.

    Raises: AgentError. StoreError. VmBusy: the agent is in use.
    """
    _require_idle(vm, agent)
    async with agent.alone():
        session = await connect(vm, agent)
        try:
            count = await agent_commands.thaw(session)
        finally:
            session.close()
        await in_thread(forget_owed_thaw, store)
    return count


async def list_filesystems(vm: AttachedVm, agent: GuestAgent) -> tuple[Filesystem, ...]:
    """What is mounted in the guest, as the guest says.

    Raises: AgentError. VmBusy: the agent is in use.
    """
    _require_idle(vm, agent)
    async with agent.alone():
        session = await connect(vm, agent)
        try:
            return await agent_commands.read_filesystems(session)
        finally:
            session.close()


def _require_idle(vm: AttachedVm, agent: GuestAgent) -> None:
    if agent.is_in_use:
        raise VmBusy(f"the guest agent of VM {vm.name} is in use right now, as for a snapshot")
