"""One running operation on a VM: what it does now, how far it is, and a way to cancel it."""

import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import trio

from qsnapd.errors import Effect, JobCancelled, QsnapError, StoreError, WrongState
from qsnapd.model.job import JobInfo, JobKind, Phase, Progress
from qsnapd.model.snapshot import Manifest

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
    ) -> None:
        self.number = number
        self.vm = vm
        self.kind = kind
        self.snapshot = snapshot
        self.phase = Phase.PREPARING
        self.progress = Progress()
        self.error: QsnapError | None = None
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
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._result: Manifest | None = None
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
        self._tell()

    def report(self, progress: Progress) -> None:
        if progress != self.progress:
            self.progress = progress
            self._tell()

    def cancel(self) -> None:
        """Ask the job to undo itself and end; returns at once.

        Raises: WrongState: it has ended, or it is already going back.
        """
        if self.phase.ended or self.phase is Phase.UNDOING:
            raise WrongState(f"the job on VM {self.vm} is already {self.phase}")
        self._cancelled_by_user = True
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

    async def run(self, work: Callable[[], Awaitable[Manifest]]) -> None:
        """Do *work* to its end; a foreseeable failure is kept for those who wait.

        Cancellation: *work* undoes itself and the job counts as cancelled.
        """
        try:
            with self._scope:
                self._result = await work()
            if self._result is None:
                outcome = self.outcome or _OUTCOMES[self.effect]
                self.error = JobCancelled(
                    f"the job on VM {self.vm} was cancelled; {outcome}", effect=self.effect
                )
        except QsnapError as exc:
            self.error = exc
        except OSError as exc:
            # The world's doing, wherever it was not foreseen: no reason to end other VMs' daemon.
            _log.exception("VM %s: the %s job failed", self.vm, self.kind)
            self.error = StoreError(f"{exc.filename or 'a file'}: {exc.strerror}")
            self.error.effect = self.effect
        finally:
            if self._result is not None:
                self.phase = Phase.DONE
            elif self._cancelled_by_user and isinstance(self.error, JobCancelled):
                self.phase = Phase.CANCELLED
            else:
                self.phase = Phase.FAILED
            self._ended_s = trio.current_time()
            self._ended.set()
            self._tell()

    async def wait(self) -> Manifest:
        """Wait for the end, and return the snapshot or raise why there is none.

        Cancellation: stops the waiting; the job goes on.
        """
        await self._ended.wait()
        if self._result is not None:
            return self._result
        cut_off = JobCancelled(f"the job on VM {self.vm} was cut off", effect=Effect.UNKNOWN)
        raise self.error or cut_off
