"""What all ways to take a snapshot share: the pause window, the pivot, the way out of the pause."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import trio

from qsnapd.errors import CaptureFailed, CommandRefused
from qsnapd.faults import Point
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.snapshot import PauseParts
from qsnapd.model.state import Condition
from qsnapd.qmp.block import BlockdevSetActive, Transaction
from qsnapd.qmp.commands import Cont, Stop
from qsnapd.qmp.migration import MigrateSetParameters, MigrationInfo
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.freeze import Quiesced
from qsnapd.snapshot.taking.memory import MemoryTarget
from qsnapd.snapshot.taking.overlays import pivot_actions
from qsnapd.snapshot.taking.room import Room
from qsnapd.snapshot.taking.saves import Saves
from qsnapd.snapshot.taking.saving import Advance, progress_of
from qsnapd.threads import in_thread
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.tracker import PauseWindow

FINALIZE_LIMIT_S = 10.0
ROOM_EVERY_S = 1.0


@dataclass
class Capture:
    """One capture under way; the strategies are functions on it."""

    vm: AttachedVm
    plan: CheckpointPlan
    target: MemoryTarget | None
    """None: disk-only."""
    job: Job
    room: Room
    saves: Saves
    window: PauseWindow = field(default_factory=PauseWindow)
    stop_ms: float = 0.0
    pivot_ms: float = 0.0
    capture_ms: float = 0.0
    pivoted_at: datetime | None = None
    quiesced: Quiesced | None = None
    ran: bool = False
    """Whether the guest ran when its disks moved; known afterwards."""

    def __post_init__(self) -> None:
        self.share_bytes_per_s = self.plan.parameters.get("max-bandwidth", 0)
        self._advance = Advance(self.job.patience)
        self._looked_s = trio.current_time()

    def parts(self) -> PauseParts:
        return PauseParts(
            stop_ms=self.stop_ms, pivot_ms=self.pivot_ms, capture_ms=self.capture_ms
        )

    def tell(self, info: MigrationInfo) -> None:
        self.job.report(progress_of(info))
        self._advance.note(info)

    async def watch(self, info: MigrationInfo) -> None:
        """Look after a save under way.

        Raises: StoreFull: what has to stay free on a disk does not. DiskStalled. VmError.
        """
        self.tell(info)
        if self.share_bytes_per_s != (share := self.saves.share_bytes_per_s):
            self.share_bytes_per_s = share
            rate = MigrateSetParameters(parameters={"max-bandwidth": share})
            await self.vm.session.execute(rate)
        if trio.current_time() > self._looked_s + ROOM_EVERY_S:
            self._looked_s = trio.current_time()
            await in_thread(self.room.require_low_water, self.room.places(self.plan))

    async def reserve_again(self) -> None:
        """Take the room again that QEMU has given up when it emptied the file (10.0 does).

        Raises: StoreFull, StoreError.
        """
        assert self.target is not None, "a checkpoint has a place for its memory"
        await in_thread(self.target.reserve)

    async def respect_stop(self) -> None:
        """Leave a guest paused in the end that somebody has stopped since the plan was made.

        Raises: VmError.
        """
        if self.plan.was_running:
            await self.vm.confirm_condition()  # the event may be on its way
            self.vm.tracker.held_by_user |= not self.vm.tracker.running

    async def halt(self) -> None:
        """Stop the guest, if it runs; QEMU drains and flushes its disks.

        It may run by now though it stood still when the plan was made.
        """
        self.window.begun = True
        if self.plan.was_running or self.vm.tracker.running:
            begun_s = trio.current_time()
            await self.vm.session.execute(Stop())
            self.stop_ms = _since_ms(begun_s)
        await self.job.reach(Point.CAPTURE_STOPPED)

    async def pivot(self) -> None:
        """Move every disk to its overlay, all at once or none."""
        self.pivoted_at = datetime.now(UTC)
        self.window.resumed = False
        self.ran = self.vm.tracker.running
        if self.plan.pivots:
            begun_s = trio.current_time()
            actions = pivot_actions(self.plan.pivots)
            await self.vm.session.execute(Transaction(actions=actions))
            self.pivot_ms = _since_ms(begun_s)
        self.ran |= self.vm.tracker.running
        await self.job.reach(Point.CAPTURE_PIVOTED)

    def require_held(self) -> None:
        """Make sure that the guest has stood still since its disks moved.

        Raises: CaptureFailed: somebody has resumed it, on another monitor.
        """
        if self.ran or self.window.resumed:
            raise CaptureFailed(
                f"VM {self.plan.vm} was resumed past qsnapd, on another monitor, while it was to "
                "stand still: its disks and what is saved with them are not of one instant"
            )

    async def begin_saving(self) -> None:
        assert self.target is not None, "a checkpoint has a place for its memory"
        await self.vm.session.execute(self.target.command())
        await self.job.reach(Point.CAPTURE_SAVING)

    @property
    def to_resume(self) -> bool:
        """The guest ran, or its user has asked for that meanwhile, and not for the contrary.

        Never if it is held: what it did after its state was saved would be lost.
        """
        return not self.plan.holds and self.vm.tracker.is_to_run(ran_before=self.plan.was_running)

    async def release(self) -> None:
        """Let the guest run again, if it is to."""
        if self.to_resume:
            await self.vm.ensure_running()
        await self._respect_user()

    async def release_at_once(self) -> None:
        """The same without asking first: for QEMU >= 9.0, where only we end this pause."""
        if not self.to_resume:
            return
        try:
            with self.vm.tracker.resuming(Condition.RUNNING_UNPAUSED):
                await self.vm.session.execute(Cont())
        except CommandRefused:
            await self.vm.ensure_running()
        await self._respect_user()

    async def _respect_user(self) -> None:
        """Stop a guest again that its user suspended while it was on its way to running.

        QEMU < 9.0 resumes by itself in the background, whatever the user said.
        """
        if self.vm.tracker.held_by_user and self.vm.tracker.running:
            with self.vm.tracker.pausing(Condition.PAUSED_USER):
                await self.vm.session.execute(Stop())

    async def leave_postmigrate(self) -> None:
        """After a completed save the disks are inactive: `cont` wakes them, or this does.

        A VM that stays paused on QEMU < 10.0 keeps them inactive until it is resumed.
        """
        if self.to_resume:
            await self.vm.ensure_running()
            await self._respect_user()
        elif self.plan.nodes_can_be_activated:
            # "completed" comes a moment before QEMU has let go of the run state.
            with trio.move_on_after(FINALIZE_LIMIT_S):
                while await self.vm.run_state() == "finish-migrate":
                    pass
            await self.vm.session.execute(BlockdevSetActive(active=True))


def _since_ms(begun_s: float) -> float:
    return round((trio.current_time() - begun_s) * 1000, 3)


class Stopwatch:
    """Measures one part of the pause."""

    def __init__(self) -> None:
        self._begun_s = trio.current_time()

    @property
    def ms(self) -> float:
        return _since_ms(self._begun_s)
