"""What comes no further is ended; what does, never."""

import pytest
import trio
import trio.testing

from qsnapd.patience import Patience


async def test_what_comes_no_further(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10)
    with trio.CancelScope() as scope, patience.extending(scope):
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(10)


async def test_every_step_gives_it_the_whole_time(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10)
    with (
        trio.CancelScope() as outer,
        patience.extending(outer),
        trio.CancelScope(shield=True) as inner,
        patience.extending(inner),
    ):
        for _ in range(10):
            await trio.sleep(9)
            patience.tick()
    assert not outer.cancelled_caught
    assert not inner.cancelled_caught


async def test_what_has_a_deadline_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10)
    with trio.CancelScope() as scope, patience.extending(scope):
        with patience.suspended():
            await trio.sleep(1000)
        with patience.suspended(), patience.suspended():
            await trio.sleep(1000)
        await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(2010)


async def test_undoing_what_was_ended(autojump_clock: trio.testing.MockClock) -> None:
    patience = Patience(10)
    with trio.CancelScope() as work, patience.extending(work):
        try:
            await trio.sleep_forever()
        finally:
            with (
                trio.move_on_after(patience.limit_s, shield=True) as undoing,
                patience.extending(undoing),
            ):
                await trio.sleep(9)
            assert not undoing.cancelled_caught
    assert work.cancelled_caught
