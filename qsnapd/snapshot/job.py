"""One running operation on a VM: what it does now, how far it is, and a way to cancel it."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import trio

from qsnapd.errors import (
    DiskStalled,
    Effect,
    JobCancelled,
    JobStalled,
    QsnapError,
    StoreError,
    VmError,
    WrongState,
)
from qsnapd.faults import Point
from qsnapd.model.job import JobInfo, JobKind, Phase, Progress
from qsnapd.model.snapshot import Manifest
from qsnapd.patience import STALL_LIMIT_S, Patience

_log = logging.getLogger(__name__)

_OUTCOMES = {
    Effect.NONE: "nothing had been touched",
    Effect.ROLLED_BACK: "everything is as before",
    Effect.PARTIAL: "the VM goes on as before; the snapshot of it that was taken on the way stands",
    Effect.UNKNOWN: "undoing it is not finished, and is tried again when the VM answers",
}


_INSTRUCTING = (Phase.STARTING, Phase.HOLDING)


class Job:
    """Runs once. The VM's supervisor owns it; clients look at it and may cancel it."""

    def __init__(
        self,
        number: int,
        vm: str,
        kind: JobKind,
        snapshot: str | None,
        publish: Callable[["Job"], None],
        *,
        stall_limit_s: float = STALL_LIMIT_S,
    ) -> None:
        self.number = number
        self.vm = vm
        self.kind = kind
        self.snapshot = snapshot
        self.phase = Phase.PREPARING
        self.progress = Progress()
        self.patience = Patience(stall_limit_s)
        """Ends the job, and each part of it that is not cancelled, when it comes no further."""
        self.error: QsnapError | None = None
        self.stalled: DiskStalled | None = None
        """A file system did not answer: what was asked of it has to end before it is undone."""
        self.effect = Effect.NONE
        """What is true if the job ends now; kept by the work."""
        self.outcome: str | None = None
        """The same in words, where the effect does not say enough."""
        self.kept: str | None = None
        """The snapshot that the state before the job was kept as."""
        self.notes: tuple[str, ...] = ()
        """What the person who asked should know, though nothing has failed."""
        self.instruction: str | None = None
        """What a person must do now, for the job to go on."""
        self._publish = publish
        self._started_at = datetime.now(UTC)
        self._started_s = trio.current_time()
        self._ended_s: float | None = None
        self._scope: trio.CancelScope | None = None
        self._last_at_work = self.phase
        self._ended = trio.Event()
        self._result: Manifest | None = None
        self._is_done = False
        self._cancelled_by_user = False
        self._changed = trio.Event()
        self._told: trio.Event | None = None

    @property
    def elapsed_ms(self) -> float:
        """Since the request; stands still once the job has ended."""
        until_s = trio.current_time() if self._ended_s is None else self._ended_s
        return round((until_s - self._started_s) * 1000, 3)

    def info(self) -> JobInfo:
        return JobInfo(
            id=self.number,
            vm=self.vm,
            kind=self.kind,
            snapshot=self.snapshot,
            phase=self.phase,
            started_at=self._started_at,
            elapsed_ms=self.elapsed_ms,
            percent=round(self.progress.percent, 1),
            done_bytes=self.progress.done_bytes,
            total_bytes=self.progress.total_bytes,
            rate_bytes_per_s=self.progress.rate_bytes_per_s,
            left_s=self.progress.left_s,
            kept=self.kept,
            notes=self.notes,
            instruction=self.instruction if self.phase in _INSTRUCTING else None,
            error=str(self.error) if self.error else None,
        )

    async def changed(self, since: JobInfo) -> JobInfo:
        """Wait until phase or progress differ from *since*; what lay between is not kept."""
        while not since.phase.ended:
            now = self.info()
            if (now.phase, now.done_bytes) != (since.phase, since.done_bytes):
                return now
            await self._changed.wait()
        return self.info()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self._publish(self)

    def enter(self, phase: Phase) -> None:
        self.phase = phase
        if phase is not Phase.UNDOING:
            self._last_at_work = phase
        self.patience.tick()
        self._tell()

    async def reach(self, point: Point) -> None:
        """Come as far as *point*. Raises: PlantedFault."""
        await self.patience.reach(point)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Let no cancelling into the block: what it does has to come to an end.

        Raises: JobStalled: it comes no further, and what it leaves is not known.
        """
        with trio.CancelScope(shield=True) as scope, self.patience.extending(scope):
            yield
        if scope.cancelled_caught:
            self.effect = Effect.UNKNOWN
            raise self._stalled()

    def report(self, progress: Progress) -> None:
        if progress != self.progress:
            self.progress = progress
            self.patience.tick()
            self._tell()

    def cancel(self) -> None:
        """Ask the job to undo itself and end; returns at once.

        Raises: WrongState: it has ended, or it is already going back.
        """
        if self.phase.ended or self.phase is Phase.UNDOING:
            raise WrongState(f"the job on VM {self.vm} is already {self.phase}")
        self._cancelled_by_user = True
        if self._scope is not None:
            self._scope.cancel()

    async def wait_told(self) -> None:
        """Wait until somebody says that what the job waits for is done (`tell`)."""
        self._told = trio.Event()
        try:
            await self._told.wait()
        finally:
            self._told = None

    def tell(self) -> bool:
        """Say that it is done; returns whether the job was waiting for that."""
        if self._told is None:
            return False
        self._told.set()
        return True

    async def run(self, work: Callable[[], Awaitable[Manifest | None]]) -> None:
        """Do *work* to its end; a foreseeable failure is kept for those who wait.

        Cancellation: *work* undoes itself and the job counts as cancelled. The same is done to
        a job that comes no further for too long; that is a failure.
        """
        try:
            with trio.CancelScope() as scope, self.patience.extending(scope):
                self._scope = scope
                if self._cancelled_by_user:
                    scope.cancel()
                self._result = await work()
                self._is_done = True
            if not self._is_done:
                self.error = self._given_up()
        except QsnapError as exc:
            self.error = exc
            if isinstance(exc, DiskStalled):
                self.stalled = exc
            if exc.effect is Effect.NONE or (
                self.effect is Effect.UNKNOWN and exc.effect is not Effect.GUEST_PAUSED
            ):
                exc.effect = self.effect
            if exc.effect is Effect.UNKNOWN and isinstance(exc, VmError):
                outcome = self.outcome or _OUTCOMES[exc.effect]
                exc.add(outcome[0].upper() + outcome[1:])
        except OSError as exc:
            # The world's doing, wherever it was not foreseen: no reason to end other VMs' daemon.
            _log.exception("VM %s: the %s job failed", self.vm, self.kind)
            self.error = StoreError(f"{exc.filename or 'a file'}: {exc.strerror}")
            self.error.effect = self.effect
        finally:
            if self._is_done:
                self.phase = Phase.DONE
            elif self._cancelled_by_user and isinstance(self.error, JobCancelled):
                self.phase = Phase.CANCELLED
            else:
                self.phase = Phase.FAILED
            self._ended_s = trio.current_time()
            self._ended.set()
            self._tell()

    def _given_up(self) -> QsnapError:
        if self._cancelled_by_user:
            outcome = self.outcome or _OUTCOMES[self.effect]
            return JobCancelled(
                f"the job on VM {self.vm} was cancelled; {outcome}", effect=self.effect
            )
        return self._stalled()

    def _stalled(self) -> JobStalled:
        outcome = self.outcome or _OUTCOMES[self.effect]
        return JobStalled(
            f"the job on VM {self.vm} came no further for {self.patience.limit_s:g} s in phase "
            f"{self._last_at_work}, and was given up; {outcome}",
            effect=self.effect,
        )

    async def wait(self) -> Manifest:
        """Wait for the end, and return the snapshot or raise why there is none.

        Preconditions: it is a job that is about one snapshot.
        Cancellation: stops the waiting; the job goes on.
        """
        await self.wait_done()
        assert self._result is not None
        return self._result

    async def wait_done(self) -> None:
        """Wait for the end, and raise why it failed, if it did.

        Cancellation: stops the waiting; the job goes on.
        """
        await self._ended.wait()
        if not self._is_done:
            cut_off = JobCancelled(f"the job on VM {self.vm} was cut off", effect=Effect.UNKNOWN)
            raise self.error or cut_off
