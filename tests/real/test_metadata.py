"""Records that are forgotten, brought back, renamed and copied, under snapshots that restore."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from qsnapd.errors import ImageInvalid, UnknownSnapshot, WrongState
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    DeleteRequest,
    Memory,
    RevertRequest,
)
from qsnapd.model.snapshot import Manifest
from qsnapd.qmp.commands import Quit
from qsnapd.xml.schema import validate
from qsnapd.xml.snapshot import read_snapshot, write_snapshot
from tests.harness import Vm
from tests.parts import Qemu, libvirt_schema
from tests.real.cases import NEWEST, VM, each_qemu, open_busy, open_lazy
from tests.rig import Rig


def tree(rig: Rig) -> dict[str, str | None]:
    return {manifest.name: manifest.parent for manifest in rig.host.snapshots(VM)}


async def delete(rig: Rig, name: str, *, metadata_only: bool = False) -> None:
    request = DeleteRequest(name=name, metadata_only=metadata_only)
    await (await rig.host.delete(VM, request)).wait()


async def assert_reverts(rig: Rig, vm: Vm, name: str) -> None:
    """Put the VM back, and let its guest look at all of its disks and memory."""
    mark = len(vm.log_lines())
    await rig.revert(VM, RevertRequest(name=name, discard=True))
    await vm.wait_checked()
    assert vm.slots_report(mark).bad_lines == ()


async def assert_in_order(rig: Rig) -> None:
    check = await rig.host.fsck(VM, repair=False)
    assert check.clean, check.findings


@each_qemu
async def test_from_xml_back_to_a_snapshot_that_restores(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        for name in ("s1", "s2", "s3"):
            await rig.create(VM, CreateRequest(name=name, live=True))
        before = {manifest.name: manifest for manifest in rig.host.snapshots(VM)}
        dumped = {name: write_snapshot(manifest) for name, manifest in before.items()}
        for xml in dumped.values():
            assert validate(xml.encode(), libvirt_schema())
        await delete(rig, "s2", metadata_only=True)
        assert tree(rig) == {"s1": None, "s3": "s1"}
        edited = dumped["s2"].replace("<state>", "<description>words</description><state>", 1)
        brought = read_snapshot(edited.encode())
        name = await rig.host.redefine(VM, brought.model_dump_json(), current=True)
        assert (name, rig.host.current(VM)) == ("s2", "s2")
        assert tree(rig) == {"s1": None, "s2": "s1", "s3": "s1"}
        back = rig.host.snapshot(VM, "s2")
        assert back == before["s2"].model_copy(
            update={"description": "words", "memory": back.memory}
        )
        assert before["s2"].memory is not None
        assert back.memory is not None
        assert back.memory.path == before["s2"].memory.path
        await rig.host.set_current(VM, "s3")  # which its disks do go on from
        await assert_in_order(rig)
        await assert_reverts(rig, vm, "s2")
        await assert_reverts(rig, vm, "s3")


async def test_a_vm_runs_on_under_a_renamed_snapshot(tmp_path: Path) -> None:
    async with open_busy(NEWEST, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s1", live=True))
        await rig.create(VM, CreateRequest(name="s2", live=True))
        request = RevertRequest(name="s1", discard=True, memory=Memory.LAZY)
        await rig.revert(VM, request)
        await rig.host.rename_snapshot(VM, "s1", "r1")
        assert tree(rig) == {"r1": None, "s2": "r1"}
        assert rig.host.current(VM) == "r1"
        assert rig.host.users(VM) == {"r1": (VM,)}
        mark = len(vm.log_lines())
        await vm.wait_checked()
        assert vm.slots_report(mark).bad_lines == ()
        await assert_in_order(rig)
        await assert_reverts(rig, vm, "r1")
        await rig.create(VM, CreateRequest(name="s3", live=True))
        assert rig.host.snapshot(VM, "s3").parent == "r1"
        await assert_reverts(rig, vm, "s2")
        await assert_reverts(rig, vm, "s3")  # its QEMU had mapped what is called r1 now


async def test_a_copy_outlives_what_it_was_made_of(tmp_path: Path) -> None:
    async with open_busy(NEWEST, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s1", live=True))
        await rig.create(VM, CreateRequest(name="s2", live=True))
        await rig.host.copy_snapshot(VM, "s1", "copy")
        assert tree(rig) == {"s1": None, "s2": "s1", "copy": None}
        await assert_in_order(rig)
        await delete(rig, "s1")
        assert tree(rig) == {"s2": None, "copy": None}
        await assert_in_order(rig)
        await assert_reverts(rig, vm, "copy")
        await assert_reverts(rig, vm, "s2")
        await delete(rig, "copy")
        assert tree(rig) == {"s2": None}
        await assert_in_order(rig)
        await assert_reverts(rig, vm, "s2")


async def test_what_was_merged_cannot_be_defined_again(tmp_path: Path) -> None:
    """Neither with its memory, which is gone, nor without it: its disks are others now."""
    async with open_lazy(NEWEST, tmp_path) as (_, rig):
        stale = [await rig.create(VM, CreateRequest(name=name)) for name in ("s1", "s2", "s3")]
        leaf, inner = stale[2], stale[0]
        await delete(rig, "s1")
        await delete(rig, "s3")
        for manifest in (inner, leaf):
            with pytest.raises(ImageInvalid):
                await rig.host.redefine(VM, manifest.model_dump_json(), current=False)
            parent = "s2" if manifest is leaf else None
            bare = {"memory": None, "strategy": None, "image_format": None, "parent": parent}
            disk_only = manifest.model_copy(update=bare)
            with pytest.raises(ImageInvalid):
                await rig.host.redefine(VM, disk_only.model_dump_json(), current=False)
        assert tree(rig) == {"s2": None}
        await assert_in_order(rig)


async def test_refusals(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path) as (_, rig):
        manifest = await rig.create(VM, CreateRequest(name="s1"))
        await rig.clone(VM, CloneRequest(name="s1", clone="vm2"))
        try:
            with pytest.raises(WrongState, match=r"clones were made of it \(vm2\)"):
                await rig.host.rename_snapshot(VM, "s1", "r1")
        finally:
            with trio.fail_after(30, shield=True):
                await end_clone(rig)
        with pytest.raises(UnknownSnapshot):
            await rig.host.set_current(VM, "none")
        with rig.supervisors[VM].store.leases.reading("s1", "an export"):
            with pytest.raises(WrongState, match="an export reads its files"):
                await rig.host.rename_snapshot(VM, "s1", "r1")
            await rig.host.copy_snapshot(VM, "s1", "copy")
        assert tree(rig) == {"s1": None, "copy": None}
        second = manifest.model_copy(update={"name": "second"}).model_dump_json()
        assert await rig.host.redefine(VM, second, current=False) == "second"
        folder = rig.supervisors[VM].store.directory
        images = [folder / name / "memory.img" for name in ("s1", "copy", "second")]
        assert len({image.stat().st_ino for image in images}) == 1
        await rig.revert(VM, RevertRequest(name="second", discard=True))
        await rig.host.redefine(VM, moved(manifest).model_dump_json(), current=False)
        assert rig.host.snapshot(VM, "s1").created_at == moved(manifest).created_at
        await assert_in_order(rig)


async def end_clone(rig: Rig) -> None:
    await rig.supervisors["vm2"].require_attached().session.execute(Quit())
    await rig.supervisors["vm2"].wait_detached()
    await rig.supervisors["vm2"].wait_settled()  # it answers no more, and is about to end
    await rig.host.undefine("vm2", remove_storage=True)


def moved(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"created_at": datetime(2026, 1, 2, tzinfo=UTC)})
