"""Who may save memory at the same time, and how much each of them may write.

Nobody waits for another's QEMU: each job looks at its share, and tells its own.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from qsnapd.model.job import Phase
from qsnapd.snapshot.job import Job

UNLIMITED_BYTES_PER_S = 2**63 - 1
SAVES_AT_ONCE = 4


class Saves:
    """All saves of one daemon."""

    def __init__(
        self, at_once: int = SAVES_AT_ONCE, bandwidth_bytes_per_s: int | None = None
    ) -> None:
        self._places = trio.CapacityLimiter(at_once)
        self._bandwidth_bytes_per_s = bandwidth_bytes_per_s

    @asynccontextmanager
    async def turn(self, job: Job) -> AsyncIterator[None]:
        """Wait until *job* may save, and let others wait until the block ends.

        Nothing is touched while it waits, and the VM's user may cancel it.
        """
        if not self._places.available_tokens:
            job.enter(Phase.WAITING)
        with job.patience.suspended():
            await self._places.acquire_on_behalf_of(job)
        try:
            job.enter(Phase.PREPARING)
            yield
        finally:
            self._places.release_on_behalf_of(job)

    @property
    def share_bytes_per_s(self) -> int:
        """What each of those that save now may write."""
        if self._bandwidth_bytes_per_s is None:
            return UNLIMITED_BYTES_PER_S
        return max(1, self._bandwidth_bytes_per_s // max(1, self._places.borrowed_tokens))
