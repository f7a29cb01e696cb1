"""Two things at once, one of which only watches."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from qsnapd.errors import QsnapError

T = TypeVar("T")


async def with_watcher(
    watch: Callable[[], Awaitable[None]], work: Callable[[], Awaitable[T]]
) -> T:
    """Do *work*, and beside it *watch*, which ends when the work does.

    On a foreseeable failure of either the other is cancelled, and it comes out as it is, in
    no group.
    """
    results: list[T] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            results.append(await work())
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # Whoever is cancelled meanwhile will notice at its next step.
        others = group.split((QsnapError, trio.Cancelled))[1]
        foreseen = group.subgroup(QsnapError)
        if foreseen is None or others is not None:
            raise
        raise _first(foreseen) from None
    return results[0]


def _first(group: BaseExceptionGroup[QsnapError]) -> QsnapError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
