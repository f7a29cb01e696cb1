"""Something goes wrong when all is copied: there is no way back then, and the guest goes on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.errors import Effect, QsnapError, StoreError, VmError
from qsnapd.model.deletion import DeletePlan
from qsnapd.model.request import CreateRequest
from qsnapd.qmp.block import BlockCommit, JobFinalize
from qsnapd.qmp.commands import Command
from tests.harness import Vm
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_lazy
from tests.real.disk_contents import content, write
from tests.real.steering import steered
from tests.real.test_delete import SMALL, delete, overlays, present
from tests.rig import Rig

END_LIMIT_S = 60.0


@asynccontextmanager
async def with_two(qemu: Qemu, folder: Path) -> AsyncIterator[tuple[Vm, Rig]]:
    """A VM whose second snapshot is to be deleted; shows the same afterwards, and is free."""
    async with open_lazy(qemu, folder, disks=SMALL) as (vm, rig):
        for number, name in enumerate("ab"):
            await rig.create(VM, CreateRequest(name=name, disk_only=True))
            await write(vm, 2 + number, number, blocks=2)
        images = [disk.frozen for disk in rig.host.snapshot(VM, "b").disks]
        shows = await present(qemu, rig)
        yield vm, rig
        with trio.fail_after(END_LIMIT_S):
            while rig.host.job(VM) is not None or len(rig.host.snapshots(VM)) > 1:  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert await vm.execute("query-jobs") == []
        assert await present(qemu, rig) == shows
        assert {content(qemu, image, "qcow2") for image in images} == set(shows)
        assert len(overlays(vm)) == len(images)
        assert (await rig.host.fsck(VM, repair=False)).clean
        await write(vm, 7, 1)  # its requests are not held back


@each_qemu
async def test_one_disk_has_switched_and_the_other_has_not(qemu: Qemu, tmp_path: Path) -> None:
    """QEMU ends a job at the last moment, and what is tried again fails, too."""
    async with with_two(qemu, tmp_path) as (vm, rig):
        done: list[Command[object]] = []

        async def spoil(command: Command[object], step: int) -> None:
            await trio.lowlevel.checkpoint()
            if isinstance(command, JobFinalize) and command.id.endswith("-1") and not done:
                done.append(command)
                await vm.execute("job-cancel", id=command.id)
            elif isinstance(command, BlockCommit) and len(done) == 1:
                done.append(command)
                raise VmError("a hiccup")

        with (
            steered(rig.supervisors[VM], before=spoil),
            pytest.raises(VmError, match="a hiccup") as caught,
        ):
            await delete(rig, "b")
        assert caught.value.effect is Effect.UNKNOWN
        assert len(done) == 2


@each_qemu
async def test_it_is_noted_and_nobody_is_sure_of_that(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note stands, but not on stable storage, as far as is known."""
    async with with_two(qemu, tmp_path) as (_, rig):
        journal = rig.supervisors[VM].store.deletion
        write_it = journal.write
        failures = [StoreError("the disk is odd")]

        def write_and_fail(plan: DeletePlan) -> None:
            write_it(plan)
            if plan.done and failures:
                raise failures.pop()

        monkeypatch.setattr(journal, "write", write_and_fail)
        with pytest.raises(StoreError, match="odd") as caught:
            await delete(rig, "b")
        assert caught.value.effect is Effect.UNKNOWN


@each_qemu
async def test_what_a_former_daemon_began_is_mended_too(qemu: Qemu, tmp_path: Path) -> None:
    async with with_two(qemu, tmp_path) as (_, rig):
        failures: list[QsnapError] = [VmError("a hiccup")]

        async def fail_once(command: Command[object], step: int) -> None:
            await trio.lowlevel.checkpoint()
            if isinstance(command, JobFinalize) and failures:
                raise failures.pop()

        supervisor = rig.supervisors[VM]
        with steered(supervisor, before=fail_once):
            supervisor.mender._delete_again("b")
            with trio.fail_after(END_LIMIT_S):
                while failures:  # noqa: ASYNC110
                    await trio.sleep(0.05)
