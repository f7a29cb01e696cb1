"""Threads that a file system holds for ever hold nobody else."""

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from qsnapd.errors import DiskStalled
from qsnapd.patience import Patience
from qsnapd.threads import Check, in_slow_thread, in_thread

LIMIT_S = 0.05
LONG_S = 20.0


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """What the threads of a test wait for."""
    event = threading.Event()
    yield event
    event.set()


async def test_work_is_done_in_another_thread() -> None:
    assert await in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


async def test_work_that_is_stuck_is_left_alone(stuck: threading.Event) -> None:
    with pytest.raises(DiskStalled, match=r"has not answered for 0\.05 s") as stalled:
        await in_thread(stuck.wait, limit_s=LIMIT_S)
    assert not stalled.value.over.is_set()
    stuck.set()
    with trio.fail_after(LONG_S):
        await stalled.value.over.wait()


async def test_stuck_threads_take_nobodys_place(stuck: threading.Event) -> None:
    async def get_stuck() -> None:
        with pytest.raises(DiskStalled):
            await in_thread(stuck.wait, limit_s=LIMIT_S)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(get_stuck)
    with trio.fail_after(LONG_S):
        assert await in_thread(lambda: 1) == 1


async def test_cancelled_work_is_waited_for(stuck: threading.Event) -> None:
    done = threading.Event()
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def work() -> None:
        token.run_sync_soon(begun.set)
        stuck.wait()
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, work)
        await begun.wait()
        nursery.cancel_scope.cancel()
        stuck.set()
    assert done.is_set()


async def test_work_is_not_begun_when_cancelled() -> None:
    begun: list[bool] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread(begun.append, True)
    assert begun == []


async def test_slow_work_ends_at_its_next_check() -> None:
    checks = 0
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def work(check: Check) -> None:
        nonlocal checks
        while True:
            check()
            checks += 1
            token.run_sync_soon(begun.set)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(in_slow_thread, work, Patience(LONG_S)))
        await begun.wait()
        nursery.cancel_scope.cancel()
    before = checks
    await trio.sleep(LIMIT_S)
    assert checks == before


async def test_slow_work_that_comes_further_is_waited_for() -> None:
    def work(check: Check) -> str:
        for _ in range(30):
            check()
            threading.Event().wait(0.1)
        return "done"

    patience = Patience(1.0)
    with trio.CancelScope() as scope, patience.extending(scope):
        assert await in_slow_thread(work, patience) == "done"


async def test_slow_work_that_is_stuck(stuck: threading.Event) -> None:
    patience = Patience(LIMIT_S)
    with (
        pytest.raises(DiskStalled) as stalled,
        trio.CancelScope() as scope,
        patience.extending(scope),
    ):
        await in_slow_thread(lambda check: stuck.wait(), patience)
    assert not stalled.value.over.is_set()
