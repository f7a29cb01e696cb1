"""The condition of one VM over time, and when it stood still because of us."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qsnapd.model.state import Condition, State
from qsnapd.qmp.transport import QmpEvent
from qsnapd.vm.condition import after_event, after_exit, from_status, pending_after

Observer = Callable[[Condition, Condition], None]


class PauseWindow:
    """One stretch of standing still, by QEMU's own event timestamps."""

    def __init__(self) -> None:
        self.stopped_at_s: float | None = None
        self.resumed_at_s: float | None = None
        self.resumed = False
        """QEMU has said that the guest goes on, perhaps more than once; whoever looks resets it."""
        self.begun = False
        """From now on the job needs the guest to stand still, whoever has stopped it."""

    @property
    def paused_ms(self) -> float:
        """0 if the guest never stopped, or has not been resumed."""
        if self.stopped_at_s is None or self.resumed_at_s is None:
            return 0.0
        return round(max(0.0, self.resumed_at_s - self.stopped_at_s) * 1000, 3)

    def note(self, event: QmpEvent) -> None:
        """Take the times of the first STOP and of the last RESUME."""
        self.resumed |= event.name == "RESUME"
        if event.name == "STOP" and self.stopped_at_s is None:
            self.stopped_at_s = event.at_s
        elif event.name == "RESUME" and self.stopped_at_s is not None:
            self.resumed_at_s = event.at_s


class Tracker:
    """Owned by the VM's supervisor; fed with every event of every session of the VM."""

    def __init__(self, observer: Observer) -> None:
        self.condition = Condition.NOSTATE_UNKNOWN
        self.heard = 0
        """How many events there have been: an answer that is older than one of them is void."""
        self._observer = observer
        self._announced: Condition | None = None
        self._pausing: Condition | None = None
        self._running: Condition | None = None
        self._window: PauseWindow | None = None
        self._ends_as: Condition | None = None
        self.held_by_user = False
        """The user has suspended the VM, perhaps while a job held it anyway."""
        self.resume_asked = False
        """The user wants it to run as soon as the job that holds it lets go."""

    def on_event(self, event: QmpEvent) -> None:
        """Follow one QEMU event."""
        self.heard += 1
        if event.name == "SHUTDOWN" and self._ends_as is not None:
            return  # it is we who end it: no guest is being shut down
        self._announced = pending_after(self._announced, event)
        self.become(
            after_event(
                self.condition,
                event,
                pausing=self._announced or self._pausing,
                running=self._running,
            )
        )
        if event.name == "STOP":
            self._announced = None
        if event.name == "RESUME" and self._window is None:
            self.held_by_user = False  # somebody has resumed it, here or on another monitor
        if self._window is not None and (event.name != "STOP" or self.held_by_job):
            self._window.note(event)

    def on_attached(self, status: str, remembered: Condition | None) -> None:
        """Take QEMU's word for the state, and memory's for the reason."""
        self._announced = None
        self.become(from_status(status, remembered))
        self.held_by_user = self.condition is Condition.PAUSED_USER

    def on_asked(self, status: str) -> None:
        """Take QEMU's word for the state, if it is another: an event was lost, or came too late."""
        self.become(from_status(status, self.condition))

    def on_exit(self, condition: Condition | None = None) -> None:
        """The process has ended; *condition* if somebody knows why."""
        self.become(condition or self._ends_as or after_exit(self.condition))

    def become(self, condition: Condition) -> None:
        """Change the condition and tell the observer, if it is a change."""
        old, self.condition = self.condition, condition
        if old is not condition:
            self._observer(old, condition)

    @contextmanager
    def pausing(self, reason: Condition) -> Iterator[None]:
        """During the block a STOP happens for *reason*."""
        before, self._pausing = self._pausing, reason
        try:
            yield
        finally:
            self._pausing = before

    @contextmanager
    def holding(self) -> Iterator[PauseWindow]:
        """During the block a job holds the guest, or is about to; yields when it did."""
        self._window = window = PauseWindow()
        self.resume_asked = self.running  # though it stood still, perhaps, when that was planned
        if self.running:
            self.held_by_user = False
        try:
            with self.pausing(Condition.PAUSED_SNAPSHOT):
                yield window
        finally:
            self._window = None

    @contextmanager
    def ending(self, condition: Condition) -> Iterator[None]:
        """During the block we end the process, and the VM is in *condition* once it is gone.

        That holds on success, however late the end is noticed.
        """
        self._ends_as = condition
        try:
            yield
        except BaseException:
            self._ends_as = None
            raise
        self.on_exit()
        self._ends_as = None

    @contextmanager
    def resuming(self, reason: Condition) -> Iterator[None]:
        """During the block a RESUME happens for *reason*."""
        before, self._running = self._running, reason
        try:
            yield
        finally:
            self._running = before

    @property
    def held_by_job(self) -> bool:
        """A job is inside its pause window right now, and alone decides when it ends."""
        return (
            self._window is not None
            and self._window.resumed_at_s is None
            and (self._window.begun or self.condition is Condition.PAUSED_SNAPSHOT)
        )

    def is_to_run(self, *, ran_before: bool) -> bool:
        """Whether a guest that a job lets go of is to run, by what its user wants."""
        return not self.held_by_user and (ran_before or self.resume_asked)

    @property
    def running(self) -> bool:
        return self.condition.state is State.RUNNING
