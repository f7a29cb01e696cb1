"""Power fails in the middle of a job, anywhere: what was promised is there at the next start.

Each job is recorded once, on a real QEMU. Then what may be on disk after each of its steps is
put there, again and again, and qsnapd started on it. The ordinary run takes a sample of that,
the same each time; QSNAPD_LONG=1 takes all.
"""

from pathlib import Path
from unittest import mock

import pytest

from tests.crashes.replay import replay
from tests.crashes.scene import open_scene
from tests.crashes.work import record
from tests.crashes.works import WORKS
from tests.long import LONG
from tests.parts import Qemu, qemu_versions
from tests.real.cases import NEWEST
from tests.tallies import Record

MIXTURES = 12 if LONG else 2
AT_MOST = None if LONG else 12
OLDEST = qemu_versions()[0]
ON_THE_OLDEST = (
    "disk-only, undone",
    "stopped stream",
    *(("checkpoint, undone", "revert to memory", "delete the first") if LONG else ()),
    "delete the current one",
)
CASES = [(NEWEST, name) for name in WORKS] + [(OLDEST, name) for name in ON_THE_OLDEST]


@pytest.mark.parametrize(("qemu", "name"), CASES, ids=str)
async def test_nothing_is_lost(
    qemu: Qemu, name: str, tmp_path: Path, record_property: Record
) -> None:
    async with open_scene(qemu, tmp_path) as scene:
        await record(scene, WORKS[name])
        replayed = await replay(
            scene, f"QEMU {qemu}: {name}", mixtures=MIXTURES, at_most=AT_MOST
        )
    replayed.count(record_property)
    assert not replayed.violations, "\n".join(replayed.violations)
    assert replayed.replayed


def _nothing(*_: object) -> None:
    pass


async def _nothing_either(*_: object) -> None:
    pass


PLANTED = [
    # what was removed may be there again, and no journal tells of it
    ("disk-only, undone", "qsnapd.snapshot.undo.sync_removals", _nothing, "was left behind"),
    # what was frozen was never synced by us
    ("disk-only", "qsnapd.snapshot.taking.create.flush_disks", _nothing, "shows something else"),
    # QEMU has rewritten headers, and the image they named before is gone
    ("delete the first", "qsnapd.snapshot.deleting.delete.sync", _nothing_either, "is missing"),
    # the names of overlays are not on disk, the journal that told of them is cleared
    ("disk-only", "qsnapd.image.files.sync_directory", _nothing, "is missing"),
]


@pytest.mark.parametrize(("name", "place", "instead", "words"), PLANTED)
async def test_planted_bugs_are_found(
    name: str, place: str, instead: object, words: str, tmp_path: Path
) -> None:
    async with open_scene(NEWEST, tmp_path) as scene:
        with mock.patch(place, instead):
            await record(scene, WORKS[name])
        replayed = await replay(scene, name, mixtures=2, at_most=25)
    assert any(words in violation for violation in replayed.violations), replayed
