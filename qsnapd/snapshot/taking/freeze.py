"""Freezing the guest's file systems around a pivot; `thaw` says why they always end thawed."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import trio

from qsnapd.errors import (
    AgentAbsent,
    AgentError,
    AgentRefused,
    AgentUnresponsive,
    Effect,
    FreezeFailed,
    FreezeOutcomeUnknown,
    WrongState,
)
from qsnapd.faults import Point, reach
from qsnapd.model.freeze import OwedThaw
from qsnapd.model.job import Phase
from qsnapd.qmp import agent_commands
from qsnapd.qmp.agent import AgentSession, GuestAgent
from qsnapd.qmp.chardev import ChardevInfo, QueryChardev
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.thaw import THAW_LIMIT_S, may_be_frozen, thaw_left_over, thaw_or_owe
from qsnapd.store.owed_thaw import owe_thaw
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm

SHIELD_LIMIT_S = 2 * THAW_LIMIT_S
"""A backstop: `thaw_or_owe` keeps its own limit."""
ASK_LIMIT_S = THAW_LIMIT_S
"""What comes before a freeze: the agent is found, and what was left frozen is thawed."""
LET_GO_LIMIT_S = 0.5
"""QEMU takes a moment to notice that a client, perhaps we, has gone."""
LOOK_EVERY_S = 0.02

_log = logging.getLogger(__name__)


@dataclass
class Quiesced:
    """What was frozen during the block of `frozen`."""

    filesystems: int
    """0: there was nothing that could be frozen."""
    held: bool = True
    """Whether they stayed frozen to the end; known afterwards."""
    frozen_ms: float = 0.0
    """From the freeze to the thaw; known afterwards."""


@asynccontextmanager
async def frozen(
    vm: AttachedVm, store: VmStore, job: Job, *, agent: GuestAgent, limit_s: float
) -> AsyncIterator[Quiesced]:
    """Hold the guest's file systems frozen for the block, which may take *limit_s*.

    Preconditions: everything slow was done before; the guest runs.
    On exit: however the block ends, they are thawed, or a note of the job says that this is
      being tried still. What the block has done stands all the same.
    On failure to freeze: they are thawed, or a thaw is owed and the error says so.
    Cancellation: as failure; thawing takes up to THAW_LIMIT_S of its own.
    Raises: AgentAbsent, AgentUnresponsive, VmBusy, StoreError: nothing was asked of the guest.
      WrongState: somebody else has frozen them, and keeps them so.
      FreezeFailed: the agent refused, or the block took too long. FreezeOutcomeUnknown.
    """
    async with agent.alone():
        job.enter(Phase.FREEZING)
        why = f"snapshot {job.snapshot}"
        with job.patience.suspended(), trio.move_on_after(limit_s + ASK_LIMIT_S) as asking:
            session, count = await freeze(vm, store, agent, why, limit_s=limit_s)
        if asking.cancelled_caught:
            raise FreezeFailed(f"the file systems of VM {vm.name} were not frozen in time")
        quiesced = Quiesced(count)
        since_s = trio.current_time()
        problem: str | None = "it took too long"
        try:
            patience = trio.CancelScope(deadline=since_s + limit_s)
            with patience:
                yield quiesced
            if patience.cancelled_caught:
                raise FreezeFailed(
                    f"the file systems of VM {vm.name} were frozen for {limit_s:g} s, and its "
                    "disks had not moved by then"
                )
        finally:
            with trio.move_on_after(SHIELD_LIMIT_S, shield=True):
                thawed, problem = await thaw_or_owe(store, agent, session)
                quiesced.held = thawed is None or thawed > 0
            quiesced.frozen_ms = round((trio.current_time() - since_s) * 1000, 3)
            _tell(vm.name, job, quiesced, problem)


def _tell(vm: str, job: Job, quiesced: Quiesced, problem: str | None) -> None:
    count, frozen_ms = quiesced.filesystems, quiesced.frozen_ms
    _log.info("VM %s: %d file systems were frozen for %.0f ms", vm, count, frozen_ms)
    note: str | None = None
    if problem is not None:
        note = f"{may_be_frozen(vm)} ({problem})"
        _log.error("VM %s: %s", vm, note)
    elif count == 0:
        note = "the guest agent found no file system that could be frozen"
    elif not quiesced.held:
        note = "the guest's file systems were thawed by somebody else before the snapshot was"
    if note is not None:
        job.notes = (*job.notes, note)


async def require_freezable(vm: AttachedVm, agent: GuestAgent) -> None:
    """Refuse early what could not be frozen; asks, and changes nothing.

    Raises: AgentError: it is not there or does not answer. VmBusy. WrongState: somebody has
      frozen them already.
    """
    async with agent.alone():
        session = await connect(vm, agent)
        try:
            await _require_thawed(session, vm.name)
        finally:
            session.close()


async def freeze(
    vm: AttachedVm,
    store: VmStore,
    agent: GuestAgent,
    why: str,
    *,
    limit_s: float,
    mountpoints: Sequence[str] = (),
) -> tuple[AgentSession, int]:
    """Freeze, for somebody who is `alone` with the agent and closes the session.

    On success: a thaw is owed. Returns also how many file systems were frozen.
    On failure or cancellation: see `frozen`, as also for what it raises.
    """
    await thaw_left_over(vm, store, agent)
    session = await connect(vm, agent)
    try:
        await _require_thawed(session, vm.name)
        owed = OwedThaw(
            agent=str(agent.path),
            pid=vm.identity.pid,
            start_time_ticks=vm.identity.start_time_ticks,
            since=datetime.now(UTC),
            why=why,
        )
        await in_thread(owe_thaw, store, owed)
        await reach(Point.THAW_OWED)
    except BaseException:
        session.close()
        raise
    try:
        count = await agent_commands.freeze(session, limit_s=limit_s, mountpoints=mountpoints)
    except AgentError as exc:
        problem: str | None = "it took too long"
        with trio.move_on_after(SHIELD_LIMIT_S, shield=True):
            _, problem = await thaw_or_owe(store, agent, session)
        raise _failed(vm.name, exc, problem) from exc
    except BaseException:
        with trio.move_on_after(SHIELD_LIMIT_S, shield=True):
            await thaw_or_owe(store, agent, session)
        raise
    return session, count


def _failed(vm: str, cause: AgentError, problem: str | None) -> AgentError:
    """Tell why a freeze came to nothing, and whether it was taken back."""
    now = f"{may_be_frozen(vm)} ({problem})" if problem else "nothing is frozen now"
    effect = Effect.UNKNOWN if problem else Effect.NONE
    if isinstance(cause, AgentRefused):
        return FreezeFailed(
            f"the file systems of VM {vm} cannot be frozen: {cause}; {now}", effect=effect
        )
    return FreezeOutcomeUnknown(
        f"whether the file systems of VM {vm} were frozen is not known: {cause}; {now}",
        effect=effect,
    )


async def connect(vm: AttachedVm, agent: GuestAgent) -> AgentSession:
    """Connect, after a look at QEMU that tells at once what would else only not answer.

    Raises: AgentAbsent, AgentUnresponsive. VmError: QEMU itself.
    """
    chardev = await _chardev(vm, agent)
    with trio.move_on_after(LET_GO_LIMIT_S):
        while chardev is not None and chardev.is_taken:
            await trio.sleep(LOOK_EVERY_S)
            chardev = await _chardev(vm, agent)
    if chardev is not None and chardev.is_taken:
        raise AgentUnresponsive(
            f"somebody else is connected to the guest agent's socket {agent.path}, and QEMU serves "
            "one client at a time: qsnapd needs it for itself"
        )
    if chardev is not None and not chardev.frontend_open:
        raise AgentAbsent(
            f"no agent has opened its port in the guest of VM {vm.name}: install and start "
            "qemu-guest-agent there"
        )
    return await agent.connect()


async def _chardev(vm: AttachedVm, agent: GuestAgent) -> ChardevInfo | None:
    """What QEMU says of the agent's socket; None if it is not QEMU's own, or not by that name."""
    for chardev in await vm.session.execute(QueryChardev()):
        if chardev.is_at(agent.path):
            return chardev
    return None


async def _require_thawed(session: AgentSession, vm: str) -> None:
    try:
        is_frozen = await agent_commands.is_frozen(session)
    except AgentError as exc:
        exc.effect = Effect.NONE  # a question without an answer
        raise
    if is_frozen:
        raise WrongState(
            f"the file systems of VM {vm} are frozen already, by somebody else, who is to thaw "
            f"them: qsnapctl domfsthaw {vm}; a snapshot without --quiesce can be taken meanwhile"
        )
