"""Snapshots are deleted while the guest runs: nobody sees another disk than before."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from qsnapd.model.request import CreateRequest, DeleteRequest, Memory, RevertRequest
from tests.hardware import Disk
from tests.harness import Vm
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_busy, open_lazy
from tests.real.disk_contents import content, contents, write
from tests.rig import Rig

SMALL = (Disk("qcow2", "virtio", "-blockdev", 4), Disk("raw", "scsi", "-drive", 4))


async def present(qemu: Qemu, rig: Rig) -> tuple[str, ...]:
    """What the VM's disks show now."""
    return tuple(
        content(qemu, disk.path or "", "raw" if disk.format == "raw" else "qcow2")
        for disk in await rig.host.disks(VM)
        if disk.left_out is None
    )


async def delete(rig: Rig, name: str, **more: object) -> None:
    request = DeleteRequest.model_validate({"name": name, **more})
    await (await rig.host.delete(VM, request)).wait()


@asynccontextmanager
async def unseen(qemu: Qemu, rig: Rig, *gone: str) -> AsyncIterator[None]:
    """Check that a deletion in the block changes what nobody but the deleted could show."""
    kept = sorted(m.name for m in rig.host.snapshots(VM) if m.name not in gone)
    before = await contents(qemu, [rig.host.snapshot(VM, name) for name in kept])
    now = await present(qemu, rig)
    yield
    assert sorted(m.name for m in rig.host.snapshots(VM)) == kept
    assert await contents(qemu, rig.host.snapshots(VM)) == before
    assert await present(qemu, rig) == now
    check = await rig.host.fsck(VM, repair=False)
    assert check.clean, check


@each_qemu
async def test_each_of_a_chain(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        await write(vm, 1, 0, blocks=8)
        for number, name in enumerate("abcd"):
            await rig.create(VM, CreateRequest(name=name, disk_only=True))
            await write(vm, 2 + number, number, blocks=2)
        for gone in "bdac":
            async with unseen(qemu, rig, gone):
                await delete(rig, gone)
        assert {disk.path for disk in await rig.host.disks(VM) if disk.left_out is None} == set(
            map(str, vm.disks)
        )
        assert not overlays(vm)
        await rig.create(VM, CreateRequest(name="afterwards"))
        await rig.revert(VM, RevertRequest(name="afterwards"))


@each_qemu
async def test_branches(qemu: Qemu, tmp_path: Path) -> None:
    """a - b - c, and from b another branch with d; the VM goes on from there."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        await write(vm, 1, 0, blocks=8)
        for number, name in enumerate("abc"):
            await rig.create(VM, CreateRequest(name=name))
            await write(vm, 2 + number, number, blocks=2)
        await rig.revert(VM, RevertRequest(name="b", memory=Memory.EAGER))
        await write(vm, 9, 5)
        await rig.create(VM, CreateRequest(name="d"))
        await write(vm, 10, 6)
        for gone in "badc":
            async with unseen(qemu, rig, gone):
                await delete(rig, gone)
        [kept] = [m.name for m in rig.host.snapshots(VM)]
        assert kept.startswith("before-")
        await rig.revert(VM, RevertRequest(name=kept))


@each_qemu
async def test_a_guest_at_work_notices_nothing(qemu: Qemu, tmp_path: Path) -> None:
    """It looks at all it has ever written; so it does when a snapshot that stays is restored."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        for name in "abcd":
            await rig.create(VM, CreateRequest(name=name))
        for gone in "cd":
            await delete(rig, gone)
        await vm.wait_checked()
        assert vm.slots_report().fine
        mark = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="b", memory=Memory.EAGER))
        await vm.wait_checked(since=mark)
        await delete(rig, "b")
        await vm.wait_checked()
        assert vm.slots_report(mark).bad_lines == ()


@each_qemu
async def test_children(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        for number, name in enumerate("abc"):
            await rig.create(VM, CreateRequest(name=name))
            await write(vm, 2 + number, number, blocks=2)
        await rig.revert(VM, RevertRequest(name="b", memory=Memory.EAGER))
        await write(vm, 9, 5)
        await rig.create(VM, CreateRequest(name="d"))
        [kept] = [m.name for m in rig.host.snapshots(VM) if m.name.startswith("before")]
        async with unseen(qemu, rig, "c", "d", kept):
            await delete(rig, "b", descendants="only")
        assert rig.host.current(VM) == "b"
        async with unseen(qemu, rig, "a", "b"):
            await delete(rig, "a", descendants="too")
        assert rig.host.current(VM) is None
        assert not overlays(vm)


@each_qemu
async def test_shut_off(qemu: Qemu, tmp_path: Path) -> None:
    """Without a guest, and none is started for it."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        await write(vm, 1, 0, blocks=8)
        for number, name in enumerate("abc"):
            await rig.create(VM, CreateRequest(name=name))
            await write(vm, 2 + number, number, blocks=2)
        await rig.revert(VM, RevertRequest(name="b", memory=Memory.EAGER))
        await write(vm, 9, 5)
        await rig.create(VM, CreateRequest(name="d"))
        await write(vm, 10, 6)
        newest = [disk.path for disk in await rig.host.disks(VM) if disk.left_out is None]
        shows = [content(qemu, path or "", "qcow2") for path in newest]
        await vm.kill()
        await rig.supervisors[VM].wait_detached()
        for gone in "bda":
            kept = [m for m in rig.host.snapshots(VM) if m.name != gone]
            before = await contents(qemu, kept)
            await delete(rig, gone)
            assert await contents(qemu, rig.host.snapshots(VM)) == before
            assert [content(qemu, path or "", "qcow2") for path in newest] == shows
            assert vm.pids() == []
        await rig.revert(VM, RevertRequest(name="c"))


@each_qemu
async def test_forgotten(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        for name in "abc":
            await rig.create(VM, CreateRequest(name=name))
        paths = overlays(vm)
        await delete(rig, "b", metadata_only=True)
        assert overlays(vm) == paths
        assert {m.name: m.parent for m in rig.host.snapshots(VM)} == {"a": None, "c": "a"}
        [folder] = (tmp_path / VM / ".forgotten").iterdir()
        assert {path.name for path in folder.iterdir()} == {"snapshot.json", "memory.img"}


def overlays(vm: Vm) -> set[Path]:
    return set(vm.folder.glob("*.after-*"))
