"""Mending when QEMU goes away in the middle of it."""

from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from qsnapd.daemon.editing import claimed
from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.host import LocalHost
from qsnapd.daemon.mending import Mender
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import SessionLost, WrongState
from qsnapd.model.job import JobKind
from qsnapd.qmp.commands import QueryStatus, StatusInfo
from qsnapd.qmp.transport import QmpEvent
from qsnapd.snapshot.job import Job
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
        job = Job(1, "vm1", JobKind.CREATE, "s1", print)
        await Ending(supervisor, print, qemu_img="qemu-img").mend_after_job(job)
    assert mended == [vm]


async def test_whoever_attaches_while_a_job_ends_is_mended(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """It was left to the job, which must not take it for gone: nobody else would come back."""
    mended, vm = list[AttachedVm](), cast("AttachedVm", object())

    class Standing(Mender):
        async def _journal_stands(self) -> bool:
            return True

        async def mend(self, vm: AttachedVm) -> None:
            mended.append(vm)

    with Store(tmp_path) as store:
        supervisor = Supervisor(
            *("vm1", tmp_path / "qmp", store.vm("vm1"), print),
            qemu_img="qemu-img",
            launcher=Spawn(),
        )

        async def enter() -> None:
            supervisor.is_entering = True
            await trio.sleep(3)
            supervisor.attached, supervisor.is_entering = vm, False

        job = Job(1, "vm1", JobKind.CREATE, "s1", print)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(enter)
            await trio.testing.wait_all_tasks_blocked()
            await Standing(supervisor, print, qemu_img="qemu-img").mend_after_job(job)
    assert mended == [vm]


@pytest.mark.parametrize("newer", [False, True])
async def test_an_event_that_was_lost_is_made_up_for(tmp_path: Path, newer: bool) -> None:
    """By asking QEMU when a job has ended; but not with an answer older than the last event."""
    with Store(tmp_path) as store:
        supervisor = Supervisor(
            *("vm1", tmp_path / "qmp", store.vm("vm1"), print),
            qemu_img="qemu-img",
            launcher=Spawn(),
        )

        class Answering:
            session: "Answering"

            async def execute(self, _command: QueryStatus) -> StatusInfo:
                await trio.lowlevel.checkpoint()
                if newer:
                    supervisor.tracker.on_event(QmpEvent("STOP", {}, 0.0))
                return StatusInfo(status="running", running=True)

        vm = Answering()
        vm.session = vm
        supervisor.attached = cast("AttachedVm", vm)
        supervisor.tracker.on_attached("paused", None)
        await supervisor._confirm_condition(supervisor.attached)
    assert supervisor.tracker.running is not newer


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


@pytest.mark.parametrize("attaches", ["meanwhile", "as it ends", "not"])
async def test_whoever_attaches_while_a_record_is_edited_is_looked_after(
    tmp_path: Path, attaches: str, autojump_clock: trio.testing.MockClock
) -> None:
    """A guest that a killed daemon has left paused would stand still until the next job."""
    vm, looked_after = cast("AttachedVm", object()), list[AttachedVm]()

    class Watching(Supervisor):
        async def look_after(self, vm: AttachedVm) -> None:
            assert self.job is None
            looked_after.append(vm)

    with Store(tmp_path) as store:
        supervisor = Watching(
            *("vm1", tmp_path / "qmp", store.vm("vm1"), print),
            qemu_img="qemu-img",
            launcher=Spawn(),
        )

        async def enter() -> None:
            await trio.sleep(3)
            supervisor.attached, supervisor.is_entering = vm, False
            supervisor._announce()

        async with trio.open_nursery() as nursery, claimed(supervisor, JobKind.EDIT, "s1"):
            assert supervisor.job is not None
            if attaches == "meanwhile":
                supervisor.attached = vm
            if attaches == "as it ends":
                supervisor.is_entering = True
                nursery.start_soon(enter)
    assert looked_after == [vm] * (attaches != "not")


@pytest.mark.parametrize("kind", [JobKind.EDIT, JobKind.REPAIR])
async def test_what_cannot_be_aborted_says_so(tmp_path: Path, kind: JobKind) -> None:
    with Store(tmp_path) as store:
        supervisor = Supervisor(
            *("vm1", tmp_path / "qmp", store.vm("vm1"), print),
            qemu_img="qemu-img",
            launcher=Spawn(),
        )

        class OnlyOne(Fleet):
            def __init__(self) -> None:
                pass

            def find(self, word: str) -> Supervisor:
                return supervisor

        async with trio.open_nursery() as jobs:
            host = LocalHost(OnlyOne(), EventHub(), jobs, qemu_img="qemu-img")
            async with claimed(supervisor, kind):
                with pytest.raises(WrongState, match=r"with the command that asked for it"):
                    host.abort("vm1")
            with pytest.raises(WrongState, match="no job is running"):
                host.abort("vm1")
