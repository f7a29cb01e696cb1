"""What is not deleted, and deletions that are broken off: everybody is told what is true."""

from pathlib import Path

import pytest
import trio

from qsnapd.errors import Effect, ImageInvalid, JobCancelled, VmError, WrongState
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    DeleteRequest,
    Memory,
    RevertRequest,
)
from qsnapd.model.snapshot import ImageFormat
from qsnapd.qmp.block import BlockCommit, JobComplete, JobFinalize
from qsnapd.qmp.commands import Command
from tests.hardware import Disk
from tests.parts import SYSTEM_QEMU, Qemu
from tests.real.cases import NEWEST, VM, each_qemu, open_lazy
from tests.real.disk_contents import content, contents, write
from tests.real.steering import Gate, steered
from tests.real.test_delete import delete, overlays, present, unseen
from tests.rig import Rig

END_LIMIT_S = 60.0
SMALL = (Disk("qcow2", "virtio", "-blockdev", 4), Disk("raw", "scsi", "-drive", 4))


async def cancelled_at(rig: Rig, name: str, command: type[Command[object]]) -> JobCancelled:
    """Delete a snapshot, and cancel that when it is about to send *command*."""
    gate = Gate(command)
    with steered(rig.supervisors[VM], before=gate):
        job = await rig.host.delete(VM, DeleteRequest(name=name))
        await gate.reached()
        rig.host.abort(VM)
        gate.open()
        with pytest.raises(JobCancelled) as caught:
            await job.wait()
    return caught.value


@each_qemu
async def test_cancelled(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        await write(vm, 1, 0, blocks=8)
        for number, name in enumerate("ab"):
            await rig.create(VM, CreateRequest(name=name, disk_only=True))
            await write(vm, 2 + number, number, blocks=2)
        async with unseen(qemu, rig):
            assert (await cancelled_at(rig, "b", BlockCommit)).effect is Effect.ROLLED_BACK
            assert not rig.host.snapshot(VM, "b").deleting
        before = await contents(qemu, [rig.host.snapshot(VM, "a")])
        shows = await present(qemu, rig)
        late = await cancelled_at(rig, "b", JobComplete)
        assert late.effect is Effect.PARTIAL
        assert "snapshot-delete vm1 b finishes it" in str(late)
        assert rig.host.snapshot(VM, "b").deleting
        assert await present(qemu, rig) == shows
        assert await vm.execute("query-jobs") == []
        with pytest.raises((ImageInvalid, WrongState), match="delet"):
            await rig.revert(VM, RevertRequest(name="b", state="running"))
        await delete(rig, "b")
        assert await contents(qemu, rig.host.snapshots(VM)) == before
        assert await present(qemu, rig) == shows


@each_qemu
async def test_failed(qemu: Qemu, tmp_path: Path) -> None:
    """QEMU refuses one disk: the other is not switched either."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        for number, name in enumerate("ab"):
            await rig.create(VM, CreateRequest(name=name, disk_only=True))
            await write(vm, 2 + number, number, blocks=2)
        seen: list[object] = []

        async def fail_second(command: Command[object], step: int) -> None:
            await trio.lowlevel.checkpoint()
            seen.extend([command] if isinstance(command, BlockCommit) else [])
            if len(seen) == 2:
                seen.append(None)
                raise VmError("no")

        shows = await present(qemu, rig)
        with (
            steered(rig.supervisors[VM], before=fail_second),
            pytest.raises(VmError) as caught,
        ):
            await delete(rig, "b")
        assert caught.value.effect is Effect.PARTIAL
        assert await present(qemu, rig) == shows
        assert await vm.execute("query-jobs") == []
        await delete(rig, "b")
        assert await present(qemu, rig) == shows


@each_qemu
async def test_switching_fails_once(qemu: Qemu, tmp_path: Path) -> None:
    """What was held back goes on; the next look finds the job, and ends it."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        await rig.create(VM, CreateRequest(name="a", disk_only=True))
        await write(vm, 2, 0)
        shows = await present(qemu, rig)
        failures = [VmError("a hiccup")]

        async def fail_once(command: Command[object], step: int) -> None:
            await trio.lowlevel.checkpoint()
            if isinstance(command, JobFinalize) and failures:
                raise failures.pop()

        with (
            steered(rig.supervisors[VM], before=fail_once),
            pytest.raises(VmError) as caught,
        ):
            await delete(rig, "a")
        assert caught.value.effect is Effect.UNKNOWN
        with trio.fail_after(END_LIMIT_S):
            while rig.host.job(VM) is not None:  # noqa: ASYNC110 -- it is being mended
                await trio.sleep(0.05)
        assert rig.host.snapshots(VM) == ()
        await rig.create(VM, CreateRequest(name="b", disk_only=True))
        images = [disk.frozen for disk in rig.host.snapshot(VM, "b").disks]
        assert set(images) == set(map(str, vm.disks))
        assert {content(qemu, i, i.rpartition(".")[2]) for i in images} == set(shows)


@each_qemu
async def test_paused(qemu: Qemu, tmp_path: Path) -> None:
    """After a save, QEMU < 10.0 does not write to the disks of a VM that stays paused."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        await write(vm, 2, 0)
        await rig.create(VM, CreateRequest(name="a", disk_only=True))
        await write(vm, 3, 0)
        await rig.host.suspend(VM)
        await rig.create(VM, CreateRequest(name="b"))
        if qemu.version == SYSTEM_QEMU:
            with pytest.raises(WrongState, match="resume it first"):
                await delete(rig, "b")
            assert not rig.host.snapshot(VM, "b").deleting
            await rig.host.resume(VM)
            await rig.host.suspend(VM)
        for name in "ba":
            await delete(rig, name)
        assert rig.host.vm(VM).state == "paused"
        assert not overlays(vm)


async def test_in_use(tmp_path: Path) -> None:
    """By a VM whose memory is mapped, and by a clone's disks."""
    async with open_lazy(NEWEST, tmp_path, disks=SMALL) as (vm, rig):
        for name in "ab":
            request = CreateRequest(name=name, image_format=ImageFormat.MAPPED_RAM)
            await rig.create(VM, request)
        await rig.revert(VM, RevertRequest(name="a", memory=Memory.LAZY, discard=True))
        with pytest.raises(WrongState, match="runs on its memory image"):
            await delete(rig, "a")
        await rig.revert(VM, RevertRequest(name="b", memory=Memory.EAGER, discard=True))
        await rig.clone(VM, CloneRequest(name="a", clone="other", memory=Memory.EAGER))
        with pytest.raises(WrongState, match="other"):
            await delete(rig, "a")
        await vm.kill()  # the clone as well: it lies in the same folder
        await rig.supervisors["other"].wait_detached()
        await rig.supervisors[VM].wait_detached()
        with pytest.raises(WrongState, match=r"clones were made of it \(other\)"):
            await delete(rig, "a")


async def test_foreign_files_stay(tmp_path: Path) -> None:
    """Whatever was put in the place of a file of ours is somebody's."""
    async with open_lazy(NEWEST, tmp_path, disks=SMALL) as (vm, rig):
        for name in "ab":
            await rig.create(VM, CreateRequest(name=name))
        mine = tmp_path / VM / "b" / "notes.txt"
        mine.write_text("mine")
        await delete(rig, "b")
        assert texts(tmp_path) == ["mine"]
        assert all(disk.exists() for disk in vm.disks)


def texts(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.rglob("notes.txt")]
