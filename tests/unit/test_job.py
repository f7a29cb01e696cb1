"""One job: its phases, its end, its cancelling, and those who watch."""

import pytest
import trio
import trio.testing

from qsnapd.daemon.events import BACKLOG, EventHub
from qsnapd.errors import CaptureFailed, Effect, JobCancelled, SessionLost, WrongState
from qsnapd.model.event import Event, EventKind
from qsnapd.model.job import JobKind, Phase, Progress
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.job import Job
from tests.unit.test_store import EPOCH, manifest


def new_job(seen: list[Phase] | None = None) -> Job:
    phases = [] if seen is None else seen
    return Job(1, "vm1", JobKind.CREATE, "s1", lambda job: phases.append(job.phase))


async def test_a_job_that_succeeds() -> None:
    seen: list[Phase] = []
    job = new_job(seen)

    async def work() -> Manifest:
        await trio.lowlevel.checkpoint()
        job.enter(Phase.SAVING)
        return manifest("s1")

    await job.run(work)
    assert (await job.wait()).name == "s1"
    assert seen == [Phase.SAVING, Phase.DONE]
    with pytest.raises(WrongState, match="already done"):
        job.cancel()


async def test_a_failure_is_kept_for_those_who_wait() -> None:
    job = new_job()

    async def work() -> Manifest:
        await trio.lowlevel.checkpoint()
        raise CaptureFailed("no luck", effect=Effect.ROLLED_BACK)

    await job.run(work)
    assert (job.phase, job.info().error) == (Phase.FAILED, "no luck")
    with pytest.raises(CaptureFailed, match="no luck"):
        await job.wait()


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (Effect.NONE, "nothing had been touched"),
        (Effect.ROLLED_BACK, "everything is as before"),
        (Effect.UNKNOWN, "not finished"),
    ],
)
async def test_a_cancelled_job_says_what_is_true(effect: Effect, words: str) -> None:
    job = new_job()

    async def work() -> Manifest:
        job.effect = effect
        job.cancel()
        await trio.sleep_forever()
        raise AssertionError("it is cancelled before")

    await job.run(work)
    assert job.phase is Phase.CANCELLED
    with pytest.raises(JobCancelled, match=words) as failure:
        await job.wait()
    assert failure.value.effect is effect


async def test_a_lost_monitor_says_what_comes_next() -> None:
    job = new_job()

    async def work() -> Manifest:
        await trio.lowlevel.checkpoint()
        raise SessionLost("QEMU closed the monitor during stop", effect=Effect.UNKNOWN)

    await job.run(work)
    with pytest.raises(SessionLost, match=r"during stop\. Undoing it .* tried again when the VM"):
        await job.wait()


async def test_a_cancel_that_comes_too_late_changes_nothing() -> None:
    job = new_job()

    async def work() -> Manifest:
        job.cancel()
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
        return manifest("s1")

    await job.run(work)
    assert job.phase is Phase.DONE


async def test_going_back_cannot_be_cancelled() -> None:
    job = new_job()
    await trio.lowlevel.checkpoint()
    job.enter(Phase.UNDOING)
    with pytest.raises(WrongState, match="already undoing"):
        job.cancel()


async def test_a_bug_is_no_foreseeable_failure() -> None:
    job = new_job()

    async def work() -> Manifest:
        await trio.lowlevel.checkpoint()
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        await job.run(work)
    assert job.phase is Phase.FAILED
    with pytest.raises(JobCancelled, match="cut off"):
        await job.wait()


async def test_watching_progress(autojump_clock: trio.testing.MockClock) -> None:
    job = new_job()

    async def work() -> Manifest:
        for done_bytes in (50, 100):
            await trio.sleep(1)
            job.report(Progress(done_bytes=done_bytes, total_bytes=200))
        await trio.sleep(1)
        return manifest("s1")

    percents = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run, work)
        info = job.info()
        while not info.phase.ended:
            info = await job.changed(info)
            percents.append(info.percent)
    assert percents[:2] == [25.0, 50.0]
    assert job.elapsed_ms == 3000
    await trio.sleep(5)
    assert job.elapsed_ms == 3000, "the clock of a job that has ended stands still"


def test_percents_of_nothing_and_of_too_much() -> None:
    assert Progress().percent == 0
    assert Progress(done_bytes=3, total_bytes=2).percent == 100


# --- events for everybody ------------------------------------------------------------------


def event(number: int) -> Event:
    return Event(kind=EventKind.LIFECYCLE, vm="vm1", at=EPOCH, event=f"e{number}")


async def test_every_subscriber_gets_every_event() -> None:
    hub = EventHub()
    hub.publish(event(0))
    with hub.subscribe() as first, hub.subscribe() as second:
        hub.publish(event(1))
        assert [(await each.receive()).event for each in (first, second)] == ["e1", "e1"]
    hub.publish(event(2))


async def test_a_slow_subscriber_is_told_what_it_lost_and_holds_up_nobody() -> None:
    hub = EventHub()
    with hub.subscribe() as slow, hub.subscribe() as quick:
        for number in range(BACKLOG + 3):
            hub.publish(event(number))
            assert (await quick.receive()).lost == 0
        received = [slow.receive_nowait() for _ in range(BACKLOG)]
        assert [each.lost for each in received] == [0] * BACKLOG
        hub.publish(event(1000))
        late = slow.receive_nowait()
        assert (late.event, late.lost) == ("e1000", 3)
        hub.publish(event(1001))
        assert slow.receive_nowait().lost == 0
