"""The end of a background snapshot that failed on a QEMU before 9.0, which freezes its guest then.

Such a QEMU never takes back what it had protected of the guest's memory: the guest stands still
at its next write, though its state says "running", and often the monitor with it. So the save is
drained (`memory.Drain`) and never cancelled; but the drain dies with its daemon, and others may
cancel. What is looked at here is what is there, never what was done: whether the save goes on, by
QEMU's word or by its silence, and whether memory is protected, by the kernel's.
"""

import logging
import os
from contextlib import suppress

import trio

from qsnapd.errors import (
    CommandRefused,
    Effect,
    GuestLeftPaused,
    NothingToRescue,
    ReplyTimeout,
    RescueFailed,
)
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.state import Condition
from qsnapd.patience import Patience
from qsnapd.qmp.commands import GetFd, Stop
from qsnapd.qmp.migration import Migrate, MigrationInfo, QueryMigrate, QueryMigrateCapabilities
from qsnapd.snapshot.taking.saving import Advance, ask
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.identity import ProcessIdentity
from qsnapd.vm.rescue import release_memory

ANSWER_LIMIT_S = 3.0
"""A monitor that is silent for so long, while memory is protected, waits for its guest."""
SILENCE_LIMIT_S = 30.0
"""How long it may be silent for another reason."""
LOOK_EVERY_S = 0.1
"""Backstop between looks at something that also sends events."""
FREED = (
    "QEMU had frozen its guest, as it does before 9.0 when a background snapshot fails; qsnapd has "
    "freed it from outside"
)
BEGIN_LIMIT_S = 5.0
"""A save that has failed is still being cleared away for a moment."""

_CAPABILITY = "background-snapshot"

_log = logging.getLogger(__name__)


async def settle_drained(
    vm: AttachedVm, plan: CheckpointPlan, patience: Patience
) -> str | None:
    """Return when the save of *plan* has ended and holds none of the guest's memory.

    Preconditions: the snapshot has been given up.
    Returns what had to be done for that, in words; None if QEMU did it by itself. A save that
    goes on properly is waited for; a guest that is paused is not resumed.
    Raises: GuestLeftPaused: QEMU has frozen its guest, and it could not be freed. ReplyTimeout:
      QEMU is silent for another reason. VmError.
    """
    is_freed = False
    silence: ReplyTimeout | None = None
    heard_s = trio.current_time()
    advance = Advance(patience)
    with vm.session.watch("MIGRATION") as events:
        while silence is None or trio.current_time() - heard_s < SILENCE_LIMIT_S:
            try:
                info = await ask(vm.session, limit_s=ANSWER_LIMIT_S)
            except ReplyTimeout as exc:
                info, silence = None, exc
            else:
                silence, heard_s = None, trio.current_time()
                advance.note(info)
            if info is None or not info.active:
                is_freed |= await free_guest(plan.vm, vm.identity)
            if info is not None:
                if not info.active:
                    return FREED if is_freed else None
                with trio.move_on_after(LOOK_EVERY_S):
                    await events.receive()
    raise silence


async def free_guest(vm: str, identity: ProcessIdentity) -> bool:
    """Free the guest of *vm* from a save that is over or stuck; needs no monitor.

    Preconditions: the snapshot has been given up, and its save has ended or QEMU is silent, or
    it is a QEMU that has been told to cancel.
    Returns whether any of its memory was protected. Idempotent.
    Raises: GuestLeftPaused: it could not be freed. SessionLost: the process has ended. VmError.
    """
    try:
        # Not abandoned when cancelled: half of the memory would be of no use to anybody.
        freed = await trio.to_thread.run_sync(release_memory, identity)
    except NothingToRescue:
        return False
    except RescueFailed as exc:
        raise GuestLeftPaused(
            f"the guest of VM {vm} is frozen by a background snapshot that has failed, and qsnapd "
            f"could not free it: {exc}. Else only a restart of QEMU helps",
            effect=Effect.GUEST_PAUSED,
        ) from exc
    held_bytes = sum(memory.length_bytes for memory in freed)
    _log.info("VM %s: released %d MiB of QEMU's memory", vm, held_bytes >> 20)
    return True


async def make_save_again(vm: AttachedVm, plan: CheckpointPlan) -> None:
    """Let this QEMU save memory again, which it fails to do after a background snapshot failed.

    It takes memory for protected still, and cannot end that protection: every save of whatever
    kind fails (seen on 7.2), until a background snapshot has completed. So one is made, to
    /dev/null: it cannot fail, and needs nobody who might die meanwhile. The guest stands still
    for as long as in every other.

    Preconditions: no save is under way, and the capabilities are those of *plan*.
    What goes wrong is a warning. Raises: SessionLost, ReplyTimeout.
    """
    if (await vm.session.execute(QueryMigrate())).status not in ("failed", "cancelled"):
        return
    capabilities = await vm.session.execute(QueryMigrateCapabilities())
    if not any(known.state for known in capabilities if known.capability == _CAPABILITY):
        return  # it had not come to a save of this plan
    if await vm.run_state() != "running":  # QEMU would make it run
        _log.warning(
            "VM %s: the guest stands still, so QEMU cannot be made to save again: the next "
            "snapshots fail, until one by --strategy background has succeeded",
            plan.vm,
        )
        return
    info = await _save_to_nowhere(vm, plan)
    if info is None or info.status != "completed":
        reason = info.error_desc or info.status if info else "it does not begin to"
        _log.warning("VM %s: QEMU may fail to save again: %s", plan.vm, reason)


async def _save_to_nowhere(vm: AttachedVm, plan: CheckpointPlan) -> MigrationInfo | None:
    with vm.tracker.holding(), vm.session.watch("MIGRATION") as events:
        if not await _begin(vm, f"qsnapd-{plan.token}-void"):
            return None
        while (info := await vm.session.execute(QueryMigrate())).active:
            with trio.move_on_after(LOOK_EVERY_S):
                await events.receive()
        if vm.tracker.held_by_user and vm.tracker.running:
            # Its user has suspended it just before QEMU resumed it.
            with vm.tracker.pausing(Condition.PAUSED_USER):
                await vm.session.execute(Stop())
    return info


async def _begin(vm: AttachedVm, fdname: str) -> bool:
    with trio.move_on_after(BEGIN_LIMIT_S):
        while True:
            nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
            try:
                await vm.session.execute(GetFd(fdname=fdname), descriptor=nowhere)
            finally:
                os.close(nowhere)
            with suppress(CommandRefused):
                await vm.session.execute(Migrate(uri=f"fd:{fdname}"))
                return True
            await trio.sleep(LOOK_EVERY_S)
    return False
