"""A daemon's monitors, over which events get lost and replies come late: runs in the daemon.

It sits where messages are received. A proxy in front of QEMU's socket would hide which process
serves it, and could not pass descriptors on.
"""

import asyncio
import logging
import random
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from heapq import heappop, heappush
from itertools import count
from typing import Any

from qemu.qmp import Message

from qsnapd.qmp import bridge

LATEST_EVENT_S = 0.5
SLOW_REPLY_S = 0.2
TOO_LATE_S = 4.0
"""Longer than a daemon under attack waits."""
BEGIN = signal.SIGUSR1
"""Until then all comes as QEMU sends it."""
STRIKES = "a message is garbled"

_log = logging.getLogger(__name__)


class Fate(StrEnum):
    """Of one reply."""

    NEVER = "never"
    LATE = "late"


@dataclass(frozen=True)
class Garbling:
    """What becomes of messages: by lot, the same for each *seed*."""

    seed: int
    events: bool
    """A fifth of them each is lost, comes twice, or later than what was sent after it."""
    reply: int
    """Number of the one, from BEGIN on, that has a fate; 0: none."""
    fate: Fate

    def __str__(self) -> str:
        words = [f"reply {self.reply} {self.fate}"] if self.reply else []
        words += [f"events garbled by lot {self.seed}"] if self.events else []
        return " and ".join(words)

    def as_order(self) -> dict[str, object]:
        return {**vars(self)}


class Garbler:
    """Decides for all sessions of one daemon."""

    def __init__(self, garbling: Garbling) -> None:
        self._garbling = garbling
        self._chance = random.Random(garbling.seed)
        self._begun = False
        self._replies = 0

    def begin(self) -> None:
        self._begun = True

    def delays_s(self, message: Mapping[str, Any]) -> tuple[float, ...]:
        """When the message is to be received: now, later, twice, or never."""
        if not self._begun:
            return (0.0,)
        if "event" in message:
            delays_s = self._of_event() if self._garbling.events else (0.0,)
        else:
            delays_s = self._of_reply()
        if delays_s != (0.0,):
            what = message.get("event", f"reply {self._replies}")
            _log.warning("%s: %s comes after %s s", STRIKES, what, delays_s or "infinitely many")
        return delays_s

    def _of_event(self) -> tuple[float, ...]:
        match self._chance.randrange(5):
            case 0:
                return ()
            case 1:
                return (0.0, 0.0)
            case 2:
                return (self._chance.uniform(0, LATEST_EVENT_S),)
        return (0.0,)

    def _of_reply(self) -> tuple[float, ...]:
        self._replies += 1
        if self._replies == self._garbling.reply:
            return () if self._garbling.fate is Fate.NEVER else (TOO_LATE_S,)
        return (SLOW_REPLY_S if self._garbling.events and not self._chance.randrange(10) else 0.0,)


def install(order: Mapping[str, Any]) -> None:
    """Let this process's monitors be garbled from BEGIN on."""
    garbler = Garbler(Garbling(**{**order, "fate": Fate(order["fate"])}))
    signal.signal(BEGIN, lambda *_: garbler.begin())

    class Garbled(bridge._Client):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self._numbers = count()
            self._held: list[tuple[float, int, Message]] = []
            self._receiving: asyncio.Task[Message] | None = None

        async def _do_recv(self) -> Message:
            clock = asyncio.get_running_loop().time
            while not self._held or self._held[0][0] > clock():
                if self._receiving is None:
                    self._receiving = asyncio.ensure_future(super()._do_recv())
                timeout_s = max(0.0, self._held[0][0] - clock()) if self._held else None
                try:
                    await asyncio.wait({self._receiving}, timeout=timeout_s)
                except asyncio.CancelledError:
                    self._receiving.cancel()
                    raise
                if self._receiving.done():
                    message, self._receiving = self._receiving.result(), None
                    for delay_s in garbler.delays_s(message):
                        heappush(self._held, (clock() + delay_s, next(self._numbers), message))
            return heappop(self._held)[2]

    bridge._Client = Garbled  # type: ignore[misc, assignment]
