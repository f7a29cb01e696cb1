"""Blocking work on files, beside the event loop: a file system that does not answer holds nobody.

A thread that is stuck in the kernel cannot be ended. It is left alone then: what waits for it is
told so, and what it was doing may yet be done, all at once, when the file system answers again.
Whoever undoes it has to wait for that.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Generic, TypeVar

import trio
from outcome import Outcome

from qsnapd.errors import DiskStalled
from qsnapd.patience import Patience

FILE_LIMIT_S = 30.0
"""How long a file system may take for what is done in no time: a small file, a name, a sync."""
SLOW = trio.CapacityLimiter(8)
"""Room for what takes seconds, apart from what must not wait: the journal, and undoing a job
whose guest stands still."""
_QUICK = trio.CapacityLimiter(40)
_TICK_EVERY_S = 0.5

ResultT = TypeVar("ResultT")
Check = Callable[[], None]
"""To be called again and again by slow work: it has come further. Ends it, by raising, if nobody
wants it any more."""


class NotWanted(Exception):
    """Ends slow work that was cancelled; nobody sees it."""


class _Run(Generic[ResultT]):
    """One piece of work in a thread of its own, from now on."""

    def __init__(self, work: Callable[[], ResultT]) -> None:
        self.over = trio.Event()
        self._outcome: Outcome[ResultT] | None = None
        self._token = trio.lowlevel.current_trio_token()
        trio.lowlevel.start_thread_soon(work, self._deliver)

    def _deliver(self, outcome: Outcome[ResultT]) -> None:
        self._outcome = outcome
        with suppress(trio.RunFinishedError):  # nobody waits any more
            self._token.run_sync_soon(self.over.set)

    def result(self, waited_s: float) -> ResultT:
        if self._outcome is None:
            raise DiskStalled(waited_s, self.over)
        return self._outcome.unwrap()


async def in_thread(
    work: Callable[..., ResultT], *arguments: object, limit_s: float | None = None
) -> ResultT:
    """Do *work* in a thread and return what it returns.

    Cancellation: before it begins, or not at all: the work is waited for.
    Raises: DiskStalled: it is not done within *limit_s*, by default FILE_LIMIT_S, and goes on.
      What *work* raises.
    """
    limit_s = FILE_LIMIT_S if limit_s is None else limit_s
    await trio.lowlevel.checkpoint_if_cancelled()
    async with _QUICK:
        run = _Run(partial(work, *arguments))
        with trio.CancelScope(shield=True, deadline=trio.current_time() + limit_s):
            await run.over.wait()
    return run.result(limit_s)


async def in_slow_thread(work: Callable[[Check], ResultT], patience: Patience) -> ResultT:
    """The same for what takes its time, as long as it comes further by *patience*.

    Cancellation: the work is ended at its next check, and waited for.
    Raises: DiskStalled: it comes no further, and goes on. What *work* raises.
    """
    told = threading.Event()
    async with SLOW:
        run = _Run(partial(work, _check(told, patience)))
        try:
            await run.over.wait()
        finally:
            told.set()
            with (
                trio.move_on_after(patience.limit_s, shield=True) as ending,
                patience.extending(ending),
            ):
                await run.over.wait()
            if not run.over.is_set():  # also in place of a cancellation: there is more to know
                raise DiskStalled(patience.limit_s, run.over)
    return run.result(patience.limit_s)


def _check(told: threading.Event, patience: Patience) -> Check:
    token, ticked_s = trio.lowlevel.current_trio_token(), 0.0

    def check() -> None:
        nonlocal ticked_s
        if told.is_set():
            raise NotWanted
        if (now_s := time.monotonic()) > ticked_s + _TICK_EVERY_S:
            ticked_s = now_s
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(patience.tick)

    return check
