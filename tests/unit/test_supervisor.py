"""Mending when QEMU goes away in the middle of it."""

from pathlib import Path
from typing import cast

import pytest
import trio

from qsnapd.daemon.mending import Mender
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import SessionLost
from qsnapd.store.layout import Store
from qsnapd.store.renaming import RENAMING_NAME, Renaming, copy_snapshot
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.spawn import Spawn
from tests.unit.test_renaming import RENAMED, assert_whole, filled, tree


async def test_qemu_that_ends_while_the_journal_is_read(tmp_path: Path) -> None:
    """Mending after a job looks at the journal first; QEMU may be gone when it has."""
    mended: list[AttachedVm] = []
    vm = cast("AttachedVm", object())

    class Ending(Mender):
        async def _journal_stands(self) -> bool:
            self._vm.attached = None
            return True

        async def mend(self, vm: AttachedVm) -> None:
            mended.append(vm)
            raise SessionLost("the monitor was closed")

    with Store(tmp_path) as store:
        supervisor = Supervisor(
            *("vm1", tmp_path / "qmp", store.vm("vm1"), print),
            qemu_img="qemu-img",
            launcher=Spawn(),
        )
        supervisor.attached = vm
        await Ending(supervisor, print, qemu_img="qemu-img").mend_after_job()
    assert mended == [vm]


async def test_a_rename_that_a_killed_daemon_had_begun_is_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Store(tmp_path) as store:
        vm = filled(store.vm("vm1"))
        copy_snapshot(vm, "old", "new")  # as far as that daemon came
        record = Renaming(old="old", new="new").model_dump_json()
        await trio.Path(vm.directory / RENAMING_NAME).write_text(record)
        supervisor = Supervisor(
            *("vm1", tmp_path / "qmp", vm, print), qemu_img="qemu-img", launcher=Spawn()
        )
        await trio.to_thread.run_sync(supervisor._look_through_store)
        assert tree(vm) == RENAMED
        assert_whole(vm)
    assert "finished renaming snapshot old to new" in caplog.text
