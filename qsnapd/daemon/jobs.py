"""Jobs from their beginning to their end, with what has to be mended before and after."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from itertools import count

import trio

from qsnapd.daemon.events import EventHub
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import Effect
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobKind, Phase
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.deleting.former_names import note_disks
from qsnapd.snapshot.job import Job

_SNAPSHOT_EVENTS = {
    (JobKind.CREATE, Phase.DONE): "created",
    (JobKind.REVERT, Phase.DONE): "reverted",
    (JobKind.CLONE, Phase.DONE): "cloned",
}


class Jobs:
    """Those of one daemon. They run in *running*, so that no client's leaving ends them."""

    def __init__(self, events: EventHub, running: trio.Nursery) -> None:
        self._events = events
        self._running = running
        self._numbers = count(1)

    def new(self, supervisor: Supervisor, kind: JobKind, snapshot: str | None) -> Job:
        """A job on that VM, which is to claim it before `start`."""
        return Job(
            *(next(self._numbers), supervisor.name, kind, snapshot, self._publish),
            stall_limit_s=supervisor.stall_limit_s,
        )

    def start(
        self, supervisor: Supervisor, job: Job, work: Callable[[], Awaitable[Manifest | None]]
    ) -> None:
        """Let *job*, which has the VM, do its work; then somebody else may have it."""

        async def mend_and_work() -> Manifest | None:
            await supervisor.mender.mend_before_job()
            result = await work()
            # Still within the job: who waits for its end may begin another one at once.
            with trio.CancelScope(shield=True):
                # Done, but what has to be tidied up behind it may be left.
                if job.effect is Effect.UNKNOWN and await supervisor.mender.mend_once(job):
                    job.effect = Effect.NONE
                if supervisor.attached is not None:  # its disks may have moved
                    await supervisor.launcher.follow(supervisor.attached)
                    await note_disks(supervisor.attached, supervisor.store)
            return result

        async def run() -> None:
            try:
                await job.run(mend_and_work)
                if job.effect is Effect.UNKNOWN:  # undoing it has failed
                    await supervisor.mender.mend_after_job(job)
            finally:
                supervisor.let_go()

        self._running.start_soon(run, name=f"{job.kind} {job.vm}")

    def _publish(self, job: Job) -> None:
        publish = partial(
            Event, vm=job.vm, at=datetime.now(UTC), snapshot=job.snapshot, job=job.info()
        )
        self._events.publish(publish(kind=EventKind.JOB, event=job.phase.value))
        event = _SNAPSHOT_EVENTS.get((job.kind, job.phase))
        if job.phase in (Phase.FAILED, Phase.CANCELLED):
            event = "failed"
        if event is not None:
            detail = str(job.error) if job.error else ""
            self._events.publish(publish(kind=EventKind.SNAPSHOT, event=event, detail=detail))
