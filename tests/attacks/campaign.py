"""Many attacks one after the other, on one VM after the other; what was found is counted."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import trio

from qsnapd.snapshot.taking.rescuing import FREED
from tests.attacks.forge import Forge
from tests.attacks.lane import Lane, open_lane
from tests.parts import Qemu

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

    cases: int = 0
    violations: list[str] = field(default_factory=list)
    """One text each: which case, and what was wrong."""
    hung: int = 0
    """How often QEMU had frozen its guest for good, and it was freed from outside."""


async def carry_out(
    attacks: Iterable[Attack],
    forge: Forge,
    qemu: Qemu,
    folder: Path,
    *,
    open_a_lane: OpenLane = open_lane,
) -> Tally:
    """Do all of *attacks*, and count. A VM on which something was wrong is not used again."""
    tally, waiting, numbers = Tally(), deque(attacks), count()
    while waiting:
        async with open_a_lane(forge, qemu, folder / f"lane{next(numbers)}") as lane:
            for _ in range(CASES_PER_VM):
                if not waiting or not await _once(tally, lane, waiting.popleft()):
                    break
            log = await trio.Path(lane.log).read_text(errors="replace")
            tally.hung += log.count(FREED)
    return tally


async def _once(tally: Tally, lane: Lane, attack: Attack) -> bool:
    tally.cases += 1
    try:
        with trio.fail_after(CASE_LIMIT_S):
            await attack.attack(lane)
    # Whatever it was: the next case may be well all the same, and all are counted.
    except Exception as exc:
        log = lane.log.read_text(errors="replace")[-3000:]
        reasons = "; ".join(f"{type(each).__name__}: {each}" for each in _reasons(exc))
        tally.violations.append(f"{attack}: {reasons}\n{log}")
        return False
    return True


def _reasons(exc: Exception) -> Iterator[BaseException]:
    if not isinstance(exc, ExceptionGroup):
        yield exc
        return
    for each in exc.exceptions:
        yield from _reasons(each)
