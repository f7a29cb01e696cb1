"""Nothing is lost, and no guest is left paused, whatever goes wrong and whenever.

Each attack is on a real QEMU, whose guest checks itself; after each, the next checkpoint succeeds
and restores. What was done and found is told at the end of the run, as tables.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest

from qsnapd.faults import Point
from tests.attacks.campaign import carry_out
from tests.attacks.forge import open_forge
from tests.attacks.kinds import Batch, by_lot, misbehaviour, on_bad_disks, planted
from tests.tallies import Number, Record, count

PLANTED = tuple(planted())


def _each(batches: Iterable[Batch]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("batch", tuple(batches), ids=str)


def test_every_point_is_struck() -> None:
    struck = {number for batch in PLANTED for number in batch.points}
    assert struck == {point.number for point in Point}


@_each(PLANTED)
async def test_planted_faults(batch: Batch, tmp_path: Path, record_property: Record) -> None:
    await _attack(batch, "faults planted at points", tmp_path, record_property)


@_each(by_lot())
async def test_struck_at_any_instant(
    batch: Batch, tmp_path: Path, record_property: Record
) -> None:
    await _attack(batch, "struck at instants drawn by lot", tmp_path, record_property)


@_each(on_bad_disks())
async def test_bad_disks(batch: Batch, tmp_path: Path, record_property: Record) -> None:
    await _attack(batch, "disks that fill up or fail", tmp_path, record_property)


@_each(misbehaviour())
async def test_qemu_that_misbehaves(
    batch: Batch, tmp_path: Path, record_property: Record
) -> None:
    await _attack(batch, "QEMU that misbehaves", tmp_path, record_property)


async def _attack(batch: Batch, table: str, folder: Path, record: Record) -> None:
    async with open_forge() as forge:
        tally = await carry_out(
            batch.attacks, forge, batch.qemu, folder, open_a_lane=batch.open_a_lane
        )
    numbers: dict[str, Number] = {"points": batch.points} if batch.points else {}
    numbers |= {
        "cases": tally.cases,
        "violations": len(tally.violations),
        "QEMUs that hung": tally.hung,
    }
    count(record, table, f"QEMU {batch.qemu}: {batch.row}", numbers)
    assert not tally.violations, "\n".join(tally.violations)
    assert tally.cases == len(batch.attacks)
