"""A migration to a file under way: begin it, follow it, know when it has ended."""

from collections.abc import Awaitable, Callable

import trio

from qsnapd.errors import CaptureFailed, Effect, ReplyTimeout
from qsnapd.model.job import Progress
from qsnapd.patience import Patience
from qsnapd.qmp.migration import MigrationInfo, QueryMigrate
from qsnapd.qmp.session import QmpSession

PROGRESS_EVERY_S = 0.2
"""Between the events that tell of a change of status, ask this often for the bytes."""
STANDSTILL_LIMIT_S = 10.0
"""How long a save may come no further for which the guest stands still, or waits at a page."""

Watcher = Callable[[MigrationInfo], Awaitable[None]]


async def wait_saved(
    session: QmpSession,
    *until: str,
    watcher: Watcher,
    answer_limit_s: float = QueryMigrate.timeout_s,
) -> MigrationInfo:
    """Follow the migration until its status is one of *until*; tell *watcher* each look.

    Cancellation: the migration goes on.
    Raises: CaptureFailed: it failed, or somebody cancelled it. ReplyTimeout: QEMU is silent for
      *answer_limit_s*. What *watcher* raises.
    """
    with session.watch("MIGRATION") as events:
        while True:
            info = await ask(session, limit_s=answer_limit_s)
            if info.status in until:
                return info
            require_alive(info)
            await watcher(info)
            with trio.move_on_after(PROGRESS_EVERY_S):
                await events.receive()


async def ask(session: QmpSession, *, limit_s: float) -> MigrationInfo:
    """How the migration is. Raises: ReplyTimeout: QEMU is silent for *limit_s*. QMP's errors."""
    try:
        with trio.fail_after(limit_s):
            return await session.execute(QueryMigrate())
    except trio.TooSlowError:
        raise ReplyTimeout(
            f"QEMU did not answer {QueryMigrate.name} within {limit_s:g} s", effect=Effect.UNKNOWN
        ) from None


class Advance:
    """Notes whenever a save has come further, and lets a patience hear it."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._was: tuple[str | None, int] | None = None
        self._came_at_s = trio.current_time()

    def note(self, info: MigrationInfo | None) -> bool:
        """Whether it has come further since the last call. *info*: None if QEMU has not said."""
        if info is None:
            return False
        now = info.status, info.ram.transferred_bytes if info.ram is not None else 0
        if now == self._was:
            return False
        self._was = now
        self._came_at_s = trio.current_time()
        self._patience.tick()
        return True

    @property
    def stands_for_s(self) -> float:
        """How long it has come no further."""
        return trio.current_time() - self._came_at_s


def require_alive(info: MigrationInfo) -> None:
    """Raise CaptureFailed if the migration has failed or was cancelled."""
    if info.status == "failed":
        raise CaptureFailed(
            f"QEMU could not save the memory: {info.error_desc or 'it does not say why'}"
        )
    if info.status in ("cancelled", "cancelling"):
        raise CaptureFailed("the save was cancelled by somebody else on this QEMU")
    if info.status in (None, "none"):
        raise CaptureFailed("QEMU knows of no save: it was started anew")


def progress_of(info: MigrationInfo) -> Progress:
    """Bytes of guest RAM dealt with, and the rate at which bytes reach the file."""
    if info.ram is None:
        return Progress()
    ram = info.ram
    done_bytes = max(0, ram.total_bytes - ram.remaining_bytes)
    rate_bytes_per_s = ram.mbit_per_s * 1e6 / 8
    return Progress(
        done_bytes=done_bytes,
        total_bytes=ram.total_bytes,
        rate_bytes_per_s=round(rate_bytes_per_s, 1),
        left_s=round(ram.remaining_bytes / rate_bytes_per_s, 2) if rate_bytes_per_s >= 1 else None,
    )
