"""Mending when QEMU goes away in the middle of it."""

from pathlib import Path
from typing import cast

from qsnapd.daemon.mending import Mender
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import SessionLost
from qsnapd.store.layout import Store
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.spawn import Spawn


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
