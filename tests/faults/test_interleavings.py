"""What a real QEMU does only now and then: late, silent, repeated, failing in the middle."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from qsnapd.errors import (
    CaptureFailed,
    Effect,
    GuestLeftPaused,
    JobCancelled,
    QsnapError,
    SessionLost,
)
from qsnapd.model.job import Phase
from qsnapd.model.request import OnLimit
from qsnapd.model.snapshot import Strategy
from qsnapd.model.state import Condition
from qsnapd.snapshot.job import Job
from tests.faults.fake_migration import RAM_BYTES, SavingScript
from tests.faults.fake_transport import Fault
from tests.faults.scene import CASES, Case, Scene, open_scene

STOPPED, PRECOPY, BACKGROUND = (Case("10.0.2", strategy) for strategy in Strategy)
OLD_BACKGROUND = Case("7.2.22", Strategy.BACKGROUND)

cases = pytest.mark.parametrize("case", CASES, ids=str)


async def run_job(
    scene: Scene, meanwhile: Callable[[Job], Awaitable[None]] | None = None
) -> Job:
    """Take the case's checkpoint as a job, with something else going on beside it."""
    job = scene.new_job()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.run, lambda: scene.take(scene.case.request, job))
        if meanwhile is not None:
            await meanwhile(job)
    return job


async def until(claim: Callable[[], bool]) -> None:
    """Return when *claim* has become true; looking often costs nothing on a clock that jumps."""
    with trio.fail_after(60):
        while not claim():  # noqa: ASYNC110 -- nothing sets an event here
            await trio.sleep(0.001)


# --- QEMU is late --------------------------------------------------------------------------


@cases
async def test_the_guest_runs_only_long_after_cont(case: Case, autojump_clock: MockClock) -> None:
    async with open_scene(case) as scene:
        scene.qemu.cont_takes_s = 2.0
        manifest = await scene.take_one()
        await until(lambda: scene.qemu.running)
        assert scene.complaints(manifest) == []


@pytest.mark.parametrize("case", [BACKGROUND, OLD_BACKGROUND], ids=str)
async def test_active_long_before_the_instant_is_captured(
    case: Case, autojump_clock: MockClock
) -> None:
    saving = SavingScript(capture_s=1.0, self_resume_s=0.2)
    async with open_scene(replace(case, saving=saving)) as scene:
        manifest = await scene.take_one()
        assert scene.complaints(manifest) == []
        assert 1000 <= manifest.paused_ms < 1500


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("case", [STOPPED, PRECOPY, BACKGROUND], ids=str)
async def test_stopped_by_its_user_while_files_are_made(
    case: Case, silent: bool, autojump_clock: MockClock
) -> None:
    """On another monitor, of which the event may be missing: it is to stand afterwards."""
    async with open_scene(case) as scene:
        if silent:
            scene.qemu.monitor.silent.add("STOP")

        async def stop(_job: Job) -> None:
            await until(lambda: "blockdev-add" in scene.transport.sent)
            scene.qemu.halt("paused")

        job = await run_job(scene, stop)
        assert job.phase is Phase.DONE
        assert not scene.qemu.running
        assert scene.store.journal.read() is None


async def test_old_qemu_resumes_the_guest_late_by_itself(autojump_clock: MockClock) -> None:
    saving = SavingScript(self_resume_s=3.0)
    async with open_scene(replace(OLD_BACKGROUND, saving=saving)) as scene:
        manifest = await scene.take_one()
        assert scene.complaints(manifest) == []
        assert manifest.paused_ms >= 3000


@pytest.mark.parametrize("case", [STOPPED, PRECOPY, BACKGROUND], ids=str)
async def test_cont_is_refused_at_first(case: Case, autojump_clock: MockClock) -> None:
    async with open_scene(case) as scene:
        scene.qemu.monitor.refusals["cont"] = ["not yet"] * 3
        manifest = await scene.take_one()
        assert scene.complaints(manifest) == []


async def test_cancelling_takes_a_while(autojump_clock: MockClock) -> None:
    case = replace(BACKGROUND, saving=SavingScript(step_s=10.0, cancelling_s=20.0))
    async with open_scene(case) as scene:

        async def cancel(job: Job) -> None:
            await until(lambda: scene.qemu.migration.under_way and scene.qemu.running)
            job.cancel()

        job = await run_job(scene, cancel)
        assert job.phase is Phase.CANCELLED
        assert isinstance(job.error, JobCancelled)
        assert job.error.effect is Effect.ROLLED_BACK
        assert job.elapsed_ms > 20_000
        assert scene.complaints(None) == []


async def test_cancelled_in_the_moment_of_switchover(autojump_clock: MockClock) -> None:
    """QEMU forgets the cancel, and would hold its guest for ever."""
    case = replace(PRECOPY, saving=SavingScript(step_s=10.0, forgets_cancel=True))
    async with open_scene(case) as scene:

        async def cancel(job: Job) -> None:
            await until(lambda: scene.qemu.migration.under_way)
            job.cancel()

        job = await run_job(scene, cancel)
        assert job.phase is Phase.CANCELLED
        assert "migrate-continue" in scene.transport.sent
        assert job.elapsed_ms < 15_000
        assert scene.complaints(None) == []


async def test_what_must_not_be_cancelled_is_left_to_end(autojump_clock: MockClock) -> None:
    """A multifd save: cancelling it could kill QEMU, so it is finished and thrown away."""
    async with open_scene(replace(STOPPED, saving=SavingScript(step_s=1.0))) as scene:

        async def cancel(job: Job) -> None:
            await until(lambda: scene.qemu.migration.under_way)
            job.cancel()

        job = await run_job(scene, cancel)
        assert job.phase is Phase.CANCELLED
        assert "migrate_cancel" not in scene.transport.sent
        assert scene.qemu.migration.save is not None
        assert scene.qemu.migration.save.status == "completed"
        assert scene.complaints(None) == []


# --- events --------------------------------------------------------------------------------


@cases
async def test_no_event_of_the_migration_comes(case: Case, autojump_clock: MockClock) -> None:
    async with open_scene(case) as scene:
        scene.qemu.monitor.silent.update({"MIGRATION", "JOB_STATUS_CHANGE"})
        manifest = await scene.take_one()
        assert scene.complaints(manifest) == []
        assert manifest.total_ms < 2000


async def test_undone_without_any_event(autojump_clock: MockClock) -> None:
    async with open_scene(replace(STOPPED, saving=SavingScript(fails_in="device"))) as scene:
        scene.qemu.monitor.silent.update({"MIGRATION", "JOB_STATUS_CHANGE"})
        with pytest.raises(CaptureFailed):
            await scene.take_one()
        assert scene.complaints(None) == []


@cases
async def test_stop_and_resume_come_twice(case: Case, autojump_clock: MockClock) -> None:
    async with open_scene(case) as scene:
        scene.qemu.monitor.doubled.update({"STOP", "RESUME"})
        changes: list[Condition] = []
        scene.vm.tracker._observer = lambda _old, new: changes.append(new)
        manifest = await scene.take_one()
        assert scene.complaints(manifest) == []
        assert changes == [Condition.PAUSED_SNAPSHOT, Condition.RUNNING_UNPAUSED]
        assert 0 < manifest.paused_ms < 1000


# --- failures ------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["setup", "active", "saving", "device"])
@cases
async def test_the_save_fails(case: Case, stage: str, autojump_clock: MockClock) -> None:
    if case.strategy is Strategy.BACKGROUND and stage == "device":
        stage = "saving"  # it has no such stage
    async with open_scene(replace(case, saving=SavingScript(fails_in=stage))) as scene:
        with pytest.raises(CaptureFailed, match=f"no luck in stage {stage}") as failure:
            await scene.take_one()
        assert failure.value.effect is Effect.ROLLED_BACK
        assert scene.complaints(None) == []
        assert (await scene.take_another()).name == "s2"


@pytest.mark.parametrize("command", ["stop", "transaction", "migrate", "cont"])
async def test_qemu_hangs_for_longer_than_anybody_waits(
    command: str, autojump_clock: MockClock
) -> None:
    """Carried out after all, when everybody has given up: the next daemon clears up."""
    async with open_scene(STOPPED) as scene:
        scene.qemu.monitor.hangs[command] = answer = trio.Event()
        with pytest.raises(QsnapError) as failure:
            await scene.take_one()
        assert failure.value.effect in (Effect.UNKNOWN, Effect.GUEST_PAUSED)
        assert scene.store.journal.read() is not None
        answer.set()
        await scene.attach()
        await scene.recover()
        assert scene.complaints(None) == []


async def test_a_guest_that_cannot_be_resumed_is_reported_as_such(
    autojump_clock: MockClock
) -> None:
    async with open_scene(replace(STOPPED, saving=SavingScript(fails_in="saving"))) as scene:
        scene.qemu.monitor.refusals["cont"] = ["Failed to get shared lock"] * 10_000
        with pytest.raises(GuestLeftPaused, match="Failed to get shared lock"):
            await scene.take_one()
        assert scene.vm.tracker.condition is Condition.PAUSED_API_ERROR
        scene.qemu.monitor.refusals.clear()
        await scene.recover()
        assert scene.complaints(None) == []


async def test_the_host_does_not_allow_background(autojump_clock: MockClock) -> None:
    """QEMU tells only when the capability is set; then --live means precopy."""
    refusal = "Background-snapshot is not supported by host kernel"
    async with open_scene(BACKGROUND) as scene:
        scene.qemu.monitor.refusals["migrate-set-capabilities"] = [refusal]
        live = BACKGROUND.request.model_copy(update={"strategy": None, "live": True})
        manifest = await scene.take(live)
        assert manifest.strategy is Strategy.PRECOPY
        assert scene.complaints(manifest) == []
    async with open_scene(BACKGROUND) as scene:
        scene.qemu.monitor.refusals["migrate-set-capabilities"] = [refusal]
        with pytest.raises(QsnapError, match=refusal) as failure:
            await scene.take_one()
        assert failure.value.code == "capability-missing"
        assert scene.complaints(None) == []


# --- precopy that does not converge --------------------------------------------------------


@pytest.mark.parametrize(
    "limit",
    [
        {"precopy_limit_s": 30.0, "precopy_limit_bytes": 1 << 28},
        {"precopy_limit_bytes": 2 * RAM_BYTES},
    ],
    ids=["time", "bytes"],
)
@pytest.mark.parametrize("on_limit", list(OnLimit))
@pytest.mark.parametrize("version", ["7.2.22", "10.0.2"])
async def test_precopy_reaches_its_limit(
    version: str, on_limit: OnLimit, limit: dict[str, float], autojump_clock: MockClock
) -> None:
    case = replace(PRECOPY, version=version, saving=SavingScript(converges=False))
    async with open_scene(case) as scene:
        request = case.request.model_copy(update={**limit, "on_limit": on_limit})
        if on_limit is OnLimit.ABORT:
            with pytest.raises(CaptureFailed, match="precopy did not converge"):
                await scene.take(request)
            assert scene.complaints(None) == []
            return
        manifest = await scene.take(request)
        assert scene.complaints(manifest) == []
        by_time = "precopy_limit_s" in limit
        assert (manifest.total_ms > 30_000) == by_time


# --- the user interferes -------------------------------------------------------------------


@cases
async def test_suspended_while_the_job_holds_the_guest(
    case: Case, autojump_clock: MockClock
) -> None:
    async with open_scene(case) as scene:

        async def suspend(_job: Job) -> None:
            await until(lambda: scene.vm.tracker.held_by_job)
            await scene.vm.suspend()

        job = await run_job(scene, suspend)
        assert job.phase is Phase.DONE
        assert not scene.qemu.running
        assert scene.vm.tracker.condition is Condition.PAUSED_USER
        await scene.vm.resume()
        await until(lambda: scene.qemu.running)
        assert scene.vm.tracker.running


async def test_suspended_and_resumed_while_the_job_holds_the_guest(
    autojump_clock: MockClock
) -> None:
    async with open_scene(STOPPED) as scene:

        async def interfere(_job: Job) -> None:
            await until(lambda: scene.vm.tracker.held_by_job)
            await scene.vm.suspend()
            seen.append(scene.vm.tracker.condition)
            await scene.vm.resume()
            seen.append(scene.vm.tracker.condition)

        seen = list[Condition]()
        job = await run_job(scene, interfere)
        assert seen == [Condition.PAUSED_USER, Condition.PAUSED_SNAPSHOT]
        assert scene.complaints(await job.wait()) == []


# --- QEMU vanishes -------------------------------------------------------------------------


async def test_the_journal_stays_until_somebody_has_cleared_up(autojump_clock: MockClock) -> None:
    async with open_scene(STOPPED) as scene:
        scene.transport.faults["migrate"] = Fault.LOST_AFTER
        with pytest.raises(SessionLost) as failure:
            await scene.take_one()
        assert failure.value.effect is Effect.UNKNOWN
        assert not scene.qemu.running
        entry = scene.store.journal.read()
        assert entry is not None
        assert entry.pid == scene.identity.pid
        await scene.attach()
        assert "undid the unfinished snapshot s1" in str(await scene.recover())
        assert scene.complaints(None) == []
        assert await scene.recover() is None


async def test_a_committed_snapshot_is_finished_by_the_next_daemon(
    autojump_clock: MockClock
) -> None:
    async with open_scene(STOPPED) as scene:
        scene.transport.faults["remove-fd"] = Fault.LOST_BEFORE
        manifest = await scene.take_one()  # that much is true already
        assert scene.store.journal.read() is not None
        await scene.attach()
        assert "finished the snapshot s1" in str(await scene.recover())
        assert scene.complaints(manifest) == []


async def test_another_qemu_is_not_touched_for_the_old_ones_job(autojump_clock: MockClock) -> None:
    """What the journal's QEMU left is merged on disk, not asked of the new one."""
    async with open_scene(STOPPED) as scene:
        scene.transport.faults["transaction"] = Fault.LOST_BEFORE
        with pytest.raises(QsnapError):
            await scene.take_one()
        await scene.attach(identity=replace(scene.identity, start_time_ticks=1))
        assert "whose QEMU has ended" in str(await scene.recover())
        assert set(scene.transport.sent) == set()
