"""How far a transfer has come, told from whatever thread does it."""

from collections.abc import Callable

import trio

from qsnapd.model.transfer import TransferProgress

Tell = Callable[[TransferProgress], None]
"""Keeps what it is given; called often, and from threads."""


class Meter:
    """Counts the bytes of one step after the other."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._step = ""
        self._done_bytes = 0
        self._total_bytes = 0

    def begin(self, step: str, total_bytes: int) -> None:
        self._step, self._done_bytes, self._total_bytes = step, 0, total_bytes
        self.reached(0)

    def reached(self, done_bytes: int) -> None:
        self._done_bytes = done_bytes
        self._tell(
            TransferProgress(
                step=self._step,
                done_bytes=done_bytes,
                total_bytes=max(done_bytes, self._total_bytes),
            )
        )

    def tick(self, count_bytes: int) -> None:
        """Count on, in a thread of trio's; raises trio.Cancelled if its caller is cancelled."""
        trio.from_thread.check_cancelled()
        if count_bytes:
            self.reached(self._done_bytes + count_bytes)
