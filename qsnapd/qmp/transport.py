"""The seam between typed commands and whatever carries them: real QMP, or a fake in tests."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self


@dataclass(frozen=True)
class QmpEvent:
    """One asynchronous message of QEMU (QMP specification, "Asynchronous events")."""

    name: str
    data: Mapping[str, object]
    at_s: float
    """QEMU's own timestamp: wall clock seconds since the epoch, microsecond steps."""

    @classmethod
    def of(cls, message: Mapping[str, object]) -> Self | None:
        """What QEMU has sent; None if it is no event. One without a time happened now."""
        name, data = message.get("event"), message.get("data", {})
        if not isinstance(name, str) or not isinstance(data, dict):
            return None
        return cls(name, data, _seconds(message.get("timestamp")))


_LATEST_S = 1 << 37
"""In the year 6325, which calendars know."""


def _seconds(stamp: object) -> float:
    match stamp:
        case {"seconds": int(seconds), "microseconds": int(microseconds)} if (
            0 <= seconds < _LATEST_S and 0 <= microseconds < 1_000_000
        ):
            return seconds + microseconds / 1e6
    return time.time()  # QEMU says -1 where it cannot tell


EventListener = Callable[[QmpEvent], None]


class QmpTransport(Protocol):
    """Carries commands to one QEMU and events back."""

    async def execute(
        self,
        name: str,
        arguments: Mapping[str, object],
        *,
        timeout_s: float,
        descriptor: int | None = None,
    ) -> object:
        """Send one command and return what QEMU returned.

        `descriptor` goes along as SCM_RIGHTS, and stays open here. Cancellation abandons
        the reply, never the command. Raises CommandRefused, ReplyTimeout, SessionLost.
        """
        ...

    def listen(self, listener: EventListener) -> None:
        """Call *listener* with every event from now on; it must neither block nor raise."""
        ...

    def unlisten(self, listener: EventListener) -> None:
        """Stop calling *listener*; unknown ones are ignored."""
        ...
