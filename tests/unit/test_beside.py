"""Two things at once: which failure comes out."""

import pytest
import trio

from qsnapd.errors import StoreError
from qsnapd.snapshot.moving.beside import with_watcher


async def test_failure_while_being_cancelled() -> None:
    """The failure comes out, and not in a group with the cancellation."""

    async def watch() -> None:
        await trio.sleep_forever()

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise StoreError("cannot clean up")

    with trio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(StoreError, match="cannot clean up"):
            await with_watcher(watch, work)


async def test_cancelled() -> None:
    async def forever() -> None:
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        scope.cancel()
        await with_watcher(forever, forever)
    assert scope.cancelled_caught


async def test_bugs_are_not_hidden() -> None:
    async def watch() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    async def work() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise StoreError("cannot clean up")

    with pytest.RaisesGroup(ZeroDivisionError, StoreError):
        await with_watcher(watch, work)
