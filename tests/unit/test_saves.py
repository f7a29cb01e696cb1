"""Saves that wait for each other, and share what may be written."""

import trio
import trio.testing

from qsnapd.model.job import JobKind, Phase
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.saves import UNLIMITED_BYTES_PER_S, Saves


def new_job() -> Job:
    return Job(1, "vm1", JobKind.CREATE, "s1", lambda job: None)


async def test_so_many_at_once_and_no_more() -> None:
    saves, jobs = Saves(2), [new_job() for _ in range(5)]
    most = now = 0

    async def save(job: Job) -> None:
        nonlocal most, now
        async with saves.turn(job):
            assert job.phase is Phase.PREPARING
            now += 1
            most = max(most, now)
            await trio.testing.wait_all_tasks_blocked()
            now -= 1

    async with trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(save, job)
        await trio.testing.wait_all_tasks_blocked()
    assert most == 2


async def test_who_waits_says_so_and_may_be_cancelled() -> None:
    saves, first, second = Saves(1), new_job(), new_job()
    async with saves.turn(first), trio.open_nursery() as nursery:

        async def wait() -> None:
            async with saves.turn(second):
                raise AssertionError("it is not its turn")

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert second.phase is Phase.WAITING
        nursery.cancel_scope.cancel()
    async with saves.turn(new_job()):
        pass  # the place is free again


async def test_waiting_is_no_stalling(autojump_clock: trio.testing.MockClock) -> None:
    saves, first, second = Saves(1), new_job(), new_job()
    with trio.CancelScope() as scope, second.patience.extending(scope):
        async with trio.open_nursery() as nursery:

            async def hold() -> None:
                async with saves.turn(first):
                    await trio.sleep(10_000)

            nursery.start_soon(hold)
            await trio.testing.wait_all_tasks_blocked()
            async with saves.turn(second):
                pass
    assert not scope.cancelled_caught


async def test_shares() -> None:
    assert Saves().share_bytes_per_s == UNLIMITED_BYTES_PER_S
    saves = Saves(3, 300)
    assert saves.share_bytes_per_s == 300
    async with saves.turn(new_job()):
        assert saves.share_bytes_per_s == 300
        async with saves.turn(new_job()), saves.turn(new_job()):
            assert saves.share_bytes_per_s == 100
        assert saves.share_bytes_per_s == 300
