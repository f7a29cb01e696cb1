"""How long something may come no further. The clock of all that has no other deadline."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from qsnapd import faults
from qsnapd.faults import Point

STALL_LIMIT_S = 60.0


class Patience:
    """Ends what it watches over when nothing has come further for `limit_s`.

        with trio.move_on_after(patience.limit_s) as scope, patience.extending(scope):
            ...
    """

    def __init__(self, limit_s: float = STALL_LIMIT_S) -> None:
        self.limit_s = limit_s
        self._is_suspended = False
        self._scopes: list[trio.CancelScope] = []

    @contextmanager
    def extending(self, scope: trio.CancelScope) -> Iterator[None]:
        """Put off the deadline of *scope* whenever something comes further in the block."""
        self._scopes.append(scope)
        self.tick()
        try:
            yield
        finally:
            self._scopes.remove(scope)

    def tick(self) -> None:
        """Something has come further."""
        limit_s = math.inf if self._is_suspended else self.limit_s
        for scope in self._scopes:
            scope.deadline = trio.current_time() + limit_s

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """What goes on in the block keeps a deadline of its own."""
        before, self._is_suspended = self._is_suspended, True
        self.tick()
        try:
            yield
        finally:
            self._is_suspended = before
            self.tick()

    @contextmanager
    def at_most(self, limit_s: float) -> Iterator[None]:
        """What goes on in the block must come further sooner."""
        before, self.limit_s = self.limit_s, min(self.limit_s, limit_s)
        self.tick()
        try:
            yield
        finally:
            self.limit_s = before
            self.tick()

    async def reach(self, point: Point) -> None:
        """Come as far as *point*. Raises: PlantedFault."""
        self.tick()
        await faults.reach(point)
