"""Thawing a guest's file systems that qsnapd has frozen, until the agent says that it is done.

The invariant: from before a freeze is sent until a thaw is confirmed, the store says that a thaw
is owed. So whoever dies, somebody thaws: the job that froze, the daemon when that could not, or
the next daemon.
"""

import logging
from pathlib import Path

import trio

from qsnapd.errors import AgentError, AgentSilent, AgentUnresponsive, StoreError
from qsnapd.model.freeze import OwedThaw
from qsnapd.qmp import agent_commands
from qsnapd.qmp.agent import AgentSession, GuestAgent
from qsnapd.store.owed_thaw import forget_owed_thaw, read_owed_thaw
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm

THAW_LIMIT_S = 20.0
"""How long a job goes on trying to thaw; then it is tried in the background."""
AGAIN_S = 0.2

_log = logging.getLogger(__name__)


async def thaw_owed(
    vm: AttachedVm, store: VmStore, agent: GuestAgent | None, *, limit_s: float = THAW_LIMIT_S
) -> str | None:
    """Thaw what a job has frozen and nobody has thawed; returns it in words, None if none is owed.

    *agent* is the VM's by the configuration, if it still has one. Idempotent.
    Raises: AgentError: it cannot be done now, the thaw stays owed. VmBusy. StoreError.
    """
    owed = await in_thread(read_owed_thaw, store)
    if owed is None:
        return None
    if agent is None or str(agent.path) != owed.agent:
        agent = GuestAgent(Path(owed.agent))
    async with agent.alone():
        owed = await in_thread(read_owed_thaw, store)
        if owed is None:
            return None  # the job has done it meanwhile
        is_thawed = await thaw_left_over(vm, store, agent, limit_s=limit_s)
    words = f"thawed the file systems of the guest, which were frozen for {owed.why}"
    return words if is_thawed else None


async def thaw_left_over(
    vm: AttachedVm, store: VmStore, agent: GuestAgent, *, limit_s: float = THAW_LIMIT_S
) -> bool:
    """The same for whoever is `alone` with the agent; returns whether there was anything to do."""
    owed = await in_thread(read_owed_thaw, store)
    if owed is None:
        return False
    concerns_this = is_of(owed, vm)
    if concerns_this:
        await thaw(agent, None, limit_s=limit_s)
    await in_thread(forget_owed_thaw, store)
    return concerns_this


def is_of(owed: OwedThaw, vm: AttachedVm) -> bool:
    """Whether it is the guest of this very process, and not of one that has ended."""
    now = vm.identity
    return (owed.pid, owed.start_time_ticks) == (now.pid, now.start_time_ticks)


async def thaw_or_owe(
    store: VmStore, agent: GuestAgent, session: AgentSession
) -> tuple[int | None, str | None]:
    """Thaw, and if that fails leave it owed; closes *session*.

    Returns what `thaw` does, and if it failed why, in words. Takes a little over THAW_LIMIT_S at
    most, whatever the guest does.
    """
    try:
        count = await thaw(agent, session, limit_s=THAW_LIMIT_S)
    except AgentError as exc:
        return None, str(exc)
    try:
        await in_thread(forget_owed_thaw, store)
    except StoreError as exc:
        _log.warning("VM %s: it will be thawed once more: %s", store.vm, exc)
    return count, None


async def thaw(
    agent: GuestAgent, session: AgentSession | None, *, limit_s: float
) -> int | None:
    """Thaw, on a new connection after each lost answer; closes *session*.

    On success: the agent says that nothing is frozen. Returns how many file systems were; None
      if an answer was lost, so that nobody knows.
    Raises: AgentError: the agent does not say so within *limit_s*.
    """
    if session is not None and not session.is_in_step:
        session.close()
        session = None
    failure: AgentError | None = None
    is_lost = False
    with trio.move_on_after(limit_s):
        while True:
            try:
                session = session or await agent.connect()
                count = await agent_commands.thaw(session)
                return None if is_lost else count
            except AgentError as exc:
                failure = exc
                is_lost |= isinstance(exc, AgentSilent)
            finally:
                if session is not None:
                    session.close()
                    session = None
            await trio.sleep(AGAIN_S)
    raise failure or AgentUnresponsive(
        f"the guest agent at {agent.path} has not said within {limit_s:g} s that all is thawed"
    )


def may_be_frozen(vm: str) -> str:
    """What to tell when a thaw stays owed."""
    return (
        f"the file systems of VM {vm} may be frozen still: qsnapd goes on trying to thaw them, "
        f"qsnapctl domfsthaw {vm} does so at once"
    )
