"""The end of a save that was given up, and its guest on its way again.

The guest does not wait for the file that its memory went to: if the disk below that stalls, it
runs as soon as QEMU can let it, whenever the save itself comes to an end.
"""

import logging
from contextlib import suppress

import trio

from qsnapd.errors import CommandRefused, Effect, GuestLeftPaused, VmError
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.snapshot import Strategy
from qsnapd.model.state import Condition
from qsnapd.patience import Patience
from qsnapd.qmp.commands import Cont, Stop
from qsnapd.qmp.migration import MigrateCancel, MigrateContinue, QueryMigrate
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.taking.rescuing import free_guest, settle_drained
from qsnapd.snapshot.taking.saving import Advance
from qsnapd.vm.attached import AttachedVm

CANCEL_PATIENCE_S = 1.0
STUCK_AFTER_S = 3.0
"""A save that comes no further for so long does not hold the guest any longer."""
LOOK_EVERY_S = 0.1
"""Backstop between looks at something that also sends events."""

_log = logging.getLogger(__name__)


async def let_guest_go(
    vm: AttachedVm, plan: CheckpointPlan, patience: Patience
) -> str | None:
    """Settle the save, and make the guest run that ran before.

    Returns what had to be done to the guest for that, in words. Idempotent.
    Raises: what `settle_migration` and `give_back_run_state` raise.
    """
    done = await settle_migration(vm, plan, patience)
    await give_back_run_state(vm, plan)
    return done


async def settle_migration(
    vm: AttachedVm, plan: CheckpointPlan, patience: Patience
) -> str | None:
    """Return when no migration of ours is under way any more, by cancelling or by waiting.

    Cancelling is right only where QEMU survives it; elsewhere the save runs to its end. Returns
    what had to be done to the guest for that, in words.
    Cancellation: the save may be under way still; but one that was stuck holds no guest.
    Raises: GuestLeftPaused: QEMU holds its guest, which could not be freed. VmError.
    """
    if plan.disk_only:
        return None
    if plan.drained:
        return await settle_drained(vm, plan, patience)
    session = vm.session
    stuck = _Stuck(vm, plan)
    with session.watch("MIGRATION") as events:
        cancelled_s: float | None = None
        advance = Advance(patience)
        while (info := await session.execute(QueryMigrate())).active:
            if advance.note(info):
                await stuck.end()
            elif advance.stands_for_s > STUCK_AFTER_S:
                await stuck.begin()
            if plan.cancellable and cancelled_s is None:
                await session.execute(MigrateCancel())
                cancelled_s = trio.current_time()
            elif cancelled_s and trio.current_time() - cancelled_s > CANCEL_PATIENCE_S:
                await _kick(session)
            with trio.move_on_after(LOOK_EVERY_S):
                await events.receive()
    return stuck.done


class _Stuck:
    """What is done to the guest of a save that is stuck, as in a write to a disk that stalls."""

    def __init__(self, vm: AttachedVm, plan: CheckpointPlan) -> None:
        self._vm = vm
        self._plan = plan
        self._lasts = False
        self.done: str | None = None

    async def begin(self) -> None:
        """Let the guest run, though QEMU saves."""
        if self._lasts:
            return
        self._lasts = True
        vm, plan = self._vm, self._plan
        _log.warning("VM %s: the save is stuck, as of a disk that stalls", plan.vm)
        if plan.strategy is Strategy.BACKGROUND and await free_guest(plan.vm, vm.identity):
            self.done = (
                "the disk that QEMU saved to had stalled, and held the guest up; qsnapd has freed "
                "it from outside"
            )
        if plan.stops_guest and vm.tracker.is_to_run(ran_before=plan.was_running):
            # Refused: QEMU is in the midst of its switchover. There is nothing to be done then.
            with vm.tracker.resuming(Condition.RUNNING_UNPAUSED), suppress(CommandRefused):
                await vm.session.execute(Cont())

    async def end(self) -> None:
        """A save that cannot be cancelled goes on: it ends soonest if the guest stands still."""
        if self._lasts and not self._plan.cancellable and self._vm.tracker.running:
            with self._vm.tracker.pausing(Condition.PAUSED_SNAPSHOT):
                await self._vm.session.execute(Stop())
        self._lasts = False


async def _kick(session: QmpSession) -> None:
    """Wake a QEMU that was cancelled in the very moment of its switchover.

    It then waits for `migrate-continue`, in a state in which it says "cancelling", with the
    guest stopped, for ever (seen on 7.2). The command takes the state it is to be in.
    """
    with suppress(CommandRefused):  # it has moved on by itself
        await session.execute(MigrateContinue(state="cancelling"))


async def give_back_run_state(vm: AttachedVm, plan: CheckpointPlan) -> None:
    """Make a guest run that ran before, unless it stands still for another reason.

    Raises: GuestLeftPaused: it cannot be made to.
    """
    if not plan.stops_guest or not vm.tracker.is_to_run(ran_before=plan.was_running):
        return
    try:
        await vm.ensure_running()
    except VmError as exc:
        vm.tracker.become(Condition.PAUSED_API_ERROR)
        raise GuestLeftPaused(
            f"VM {plan.vm} is paused and could not be resumed ({exc}): look at QEMU's log, then "
            f"try qsnapctl resume {plan.vm}",
            effect=Effect.GUEST_PAUSED,
        ) from exc
