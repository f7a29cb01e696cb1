"""All kinds of attacks, and how many of each make a proof.

The gate strikes at every point there is, with each strategy in another way; QSNAPD_ALL=1 in every
way with each, and twice as often where instants are drawn by lot. The old QEMU is attacked only in
jobs where that goes its own, in one way at each point; QSNAPD_LONG=1 leaves nothing out, and draws
ten times as many.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qsnapd.model.snapshot import Strategy
from tests.attacks import (
    cloning,
    creating,
    deleting,
    disks,
    ended,
    garbling,
    killing,
    misbehaving,
    quiescing,
    reverting,
    stopping,
)
from tests.attacks.campaign import CASES_PER_VM, Attack, OpenLane
from tests.attacks.killing import DaemonKilled, JobAborted, QemuKilled, Work
from tests.attacks.lane import open_agent_lane, open_lane
from tests.attacks.media import Kind
from tests.attacks.planted import FAILURES, Faults
from tests.long import ALL, LONG
from tests.parts import Qemu, qemu_versions

OLDEST, *_, NEWEST = qemu_versions()
TIMES = 10 if LONG else 2 if ALL else 1
_OWN_WAYS = (Strategy.BACKGROUND,)
"""Of checkpoints, of a QEMU before 9.0: drained, and rescued."""
SEED = 5


@dataclass(frozen=True)
class Batch:
    """What one test does, on one VM if all is well."""

    row: str
    """Of the table that it is counted in."""
    qemu: Qemu
    number: int
    attacks: Sequence[Attack]
    open_a_lane: OpenLane = open_lane

    def __str__(self) -> str:
        return f"{self.qemu}-{self.row}-{self.number}"

    @property
    def points(self) -> list[int]:
        """Those that a fault is planted at."""
        plans = [getattr(attack, "faults", None) for attack in self.attacks]
        faults = [plan for plan in plans if isinstance(plan, Faults)]
        return sorted({p.number for plan in faults for p, _ in (*plan.first, *plan.later)})


def planted() -> Iterator[Batch]:
    """Faults at every point, of every kind, in checkpoints by every strategy."""
    by_strategy: list[Callable[[Strategy], Sequence[Attack]]] = [
        *(creating.creating, creating.undoing, creating.recovering, ended.ended),
    ]
    others: list[Callable[[Strategy], Sequence[Attack]]] = [
        *(reverting.reverting, reverting.taking_back, deleting.deleting, deleting.renaming),
        cloning.cloning,
    ]
    for qemu, strategies in ((NEWEST, Strategy), (OLDEST, Strategy if LONG else _OWN_WAYS)):
        for plan in by_strategy:
            for strategy in strategies:
                attacks = _some(plan(strategy), list(Strategy).index(strategy))
                if LONG or (ALL and qemu is NEWEST):
                    attacks = plan(strategy)
                yield from _batches(f"{plan.__name__}, {strategy}", qemu, attacks)
    for qemu in (NEWEST, OLDEST) if LONG else (NEWEST,):
        for plan in others:
            yield from _batches(plan.__name__, qemu, plan(Strategy.STOPPED))
        quiesced = quiescing.quiescing(Strategy.STOPPED)
        yield from _batches("quiescing", qemu, quiesced, open_agent_lane)
    yield from _batches("saving again", OLDEST, creating.saving_again(Strategy.BACKGROUND))


def by_lot() -> Iterator[Batch]:
    """Daemons and QEMUs that are killed, and jobs that are cancelled, at any instant."""
    for qemu, kind, how_many in (
        (NEWEST, DaemonKilled, 72),
        (OLDEST, DaemonKilled, 30),
        (NEWEST, QemuKilled, 18),
        (OLDEST, QemuKilled, 12),
        (NEWEST, JobAborted, 30),
        (OLDEST, JobAborted, 24),
    ):
        attacks = killing.by_lot(kind, list(Work), how_many * TIMES, SEED)
        yield from _batches(str(attacks[0]).split(",")[0], qemu, attacks)


def on_bad_disks() -> Iterator[Batch]:
    """Disks that are full, at each of so many levels, and that fill up, break or stall."""
    for kind in (Kind.TMPFS, Kind.EXT4):
        fillings = disks.fillings() if LONG else disks.fillings_in_turn()
        for qemu in (NEWEST, OLDEST) if LONG else (NEWEST,):
            yield from _batches(f"{kind} filled", qemu, fillings, disks.lanes_on(kind))
    for failure in disks.Failure:
        if failure is disks.Failure.STALLED and not ALL:
            continue  # now and then it holds QEMU itself, which writes devices' state just then
        for qemu in (NEWEST, OLDEST):
            attacks = disks.failures(failure, len(Work) * (5 if LONG else 1), SEED)
            yield from _batches(f"disk {failure}", qemu, attacks, disks.lanes_on(failure.kind))


def misbehaviour() -> Iterator[Batch]:
    """A QEMU that is killed, hung, started again, taken for another, stopped, or not understood."""
    for qemu, how_many in ((NEWEST, 20), (OLDEST, 6)):
        ported = misbehaving.open_ported_lane
        taken = misbehaving.taken() if LONG or qemu is NEWEST else misbehaving.taken()[:1]
        yield from _batches("monitor taken", qemu, taken, ported)
        full = stopping.io_errors() if LONG or qemu is NEWEST else stopping.io_errors()[:1]
        yield from _batches("guest stopped by I/O error", qemu, full, stopping.open_filling_lane)
        if not ALL:
            continue
        at_points = misbehaving.every() if LONG else misbehaving.some(how_many, SEED + how_many)
        yield from _batches("misbehaves at points", qemu, at_points, ported)
        garbled = garbling.by_lot(9 if qemu is NEWEST else 3, SEED)
        yield from _batches("messages garbled", qemu, garbling.every() if LONG else garbled)


def _some(attacks: Sequence[Attack], first: int) -> Sequence[Attack]:
    """Of those that are in every way at each point one, each in turn from the *first* on."""
    ways = len(FAILURES)
    return [a for n, a in enumerate(attacks) if n % ways == (n // ways + first) % ways]


def _batches(
    row: str, qemu: Qemu, attacks: Sequence[Attack], open_a_lane: OpenLane = open_lane
) -> Iterator[Batch]:
    for number, first in enumerate(range(0, len(attacks), CASES_PER_VM)):
        some = attacks[first : first + CASES_PER_VM]
        yield Batch(row, qemu, number, some, open_a_lane)
