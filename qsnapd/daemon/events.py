"""What happens to the VMs, to everybody who wants to know; nobody is waited for."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from qsnapd.model.event import Event

BACKLOG = 256
"""Events a subscriber may fall behind by; what overflows is counted, not kept."""


class EventHub:
    """Distributes events; owned by the host, used from its one thread."""

    def __init__(self) -> None:
        self._subscribers: dict[trio.MemorySendChannel[Event], int] = {}

    def publish(self, event: Event) -> None:
        """Give *event* to every subscriber that has room; the others lose it, and are told."""
        for sender, lost in self._subscribers.items():
            try:
                sender.send_nowait(event.model_copy(update={"lost": lost}) if lost else event)
                self._subscribers[sender] = 0
            except trio.WouldBlock:
                self._subscribers[sender] = lost + 1
            except trio.BrokenResourceError:
                pass  # its block is just ending

    @contextmanager
    def subscribe(self) -> Iterator[trio.MemoryReceiveChannel[Event]]:
        """Deliver all events from now until the block ends."""
        sender, receiver = trio.open_memory_channel[Event](BACKLOG)
        self._subscribers[sender] = 0
        try:
            yield receiver
        finally:
            del self._subscribers[sender]
            sender.close()
            receiver.close()
