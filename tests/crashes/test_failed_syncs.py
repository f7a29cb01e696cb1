"""A sync fails once, anywhere in a job: that is no success, nor is it by trying again.

The ordinary run takes some of the jobs, and goes as far as all stays as it was; QSNAPD_LONG=1
takes all, and goes on behind the commit.
"""

from pathlib import Path

import pytest

from tests.crashes.failing import Swept, fail_next
from tests.crashes.scene import open_scene
from tests.crashes.works import WORKS
from tests.long import LONG
from tests.real.cases import NEWEST

SOME = (
    *("disk-only", "stopped mapped-ram", "memory elsewhere", "without metadata"),
    *("checkpoint, undone", "delete the middle one", "delete the current one offline"),
    *("forget", "rename", "edit", "set current", "define again"),
    *("export", "import", "revert to disks", "clone", "undefine"),
)


@pytest.mark.parametrize("name", WORKS if LONG else SOME)
async def test_each_sync_of_a_job(name: str, tmp_path: Path) -> None:
    work, swept, number = WORKS[name], Swept(), 1
    as_before: bool | None = False
    while as_before is not None:
        async with open_scene(NEWEST, tmp_path / str(number)) as scene:
            await work.prepare(scene)
            as_before = True
            while as_before:
                as_before = await fail_next(scene, work, number, swept)
                number += 1
        if as_before is False and not LONG:
            break
    assert not swept.complaints, "\n".join(swept.complaints)
    assert swept.undone or swept.done
