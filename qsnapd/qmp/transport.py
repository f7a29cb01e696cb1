"""The seam between typed commands and whatever carries them: real QMP, or a fake in tests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class QmpEvent:
    """One asynchronous message of QEMU (QMP specification, "Asynchronous events")."""

    name: str
    data: Mapping[str, object]
    at_s: float
    """QEMU's own timestamp: wall clock seconds since the epoch, microsecond steps."""


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
