"""Many attacks one after the other, on a few VMs at a time; what was found is counted."""

import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import trio

from tests.attacks.forge import Forge
from tests.attacks.lane import Lane, open_lane
from tests.parts import Qemu

LANES = 2
"""As many as there are CPUs."""
CASES_PER_VM = 12
"""Then its chain is long, and its files are many."""
CASE_LIMIT_S = 300.0

OpenLane = Callable[[Forge, Qemu, Path], AbstractAsyncContextManager[Lane]]


class Attack(Protocol):
    """One case; its text says which."""

    async def attack(self, lane: Lane) -> None: ...


@dataclass
class Tally:
    """What came of a campaign."""

    name: str
    cases: int = 0
    violations: list[str] = field(default_factory=list)
    """One text each: which case, and what was wrong."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What else was counted."""
    took_s: float = 0.0

    def remark(self, what: str) -> None:
        self.remarks[what] = self.remarks.get(what, 0) + 1


async def carry_out(
    tally: Tally,
    attacks: Iterable[Attack],
    forge: Forge,
    qemu: Qemu,
    folder: Path,
    *,
    open_a_lane: OpenLane = open_lane,
) -> None:
    """Do all of *attacks*, and count. A VM on which something was wrong is not used again."""
    begun_s = time.monotonic()
    waiting, numbers = deque(attacks), count()
    async with trio.open_nursery() as nursery:
        for _ in range(LANES):
            nursery.start_soon(
                _work_off, tally, waiting, numbers, _opener(open_a_lane, forge, qemu, folder)
            )
    tally.took_s += time.monotonic() - begun_s


def _opener(
    open_a_lane: OpenLane, forge: Forge, qemu: Qemu, folder: Path
) -> Callable[[int], AbstractAsyncContextManager[Lane]]:
    @asynccontextmanager
    async def opened(number: int) -> AsyncIterator[Lane]:
        async with open_a_lane(forge, qemu, folder / f"lane{number}") as lane:
            yield lane

    return opened


async def _work_off(
    tally: Tally,
    waiting: deque[Attack],
    numbers: Iterator[int],
    opened: Callable[[int], AbstractAsyncContextManager[Lane]],
) -> None:
    while waiting:
        async with opened(next(numbers)) as lane:
            for _ in range(CASES_PER_VM):
                if not waiting or not await _once(tally, lane, waiting.popleft()):
                    break


async def _once(tally: Tally, lane: Lane, attack: Attack) -> bool:
    tally.cases += 1
    try:
        with trio.fail_after(CASE_LIMIT_S):
            await attack.attack(lane)
    # Whatever it was: the next case may be well all the same, and all are counted.
    except Exception as exc:
        log = lane.log.read_text(errors="replace")[-3000:]
        tally.violations.append(f"{attack}: {type(exc).__name__}: {exc}\n{log}")
        return False
    return True
