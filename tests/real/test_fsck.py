"""Real VMs are in order after whatever was done to them, and what others do to them is noticed."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from qsnapd.errors import SnapshotExists, VmBusy
from qsnapd.model.findings import Severity, StoreCheck
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    DeleteRequest,
    RevertRequest,
)
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import (
    ExportRequest,
    ImportRequest,
    ScanOutcome,
    TransferProgress,
)
from qsnapd.model.vm import DiskInfo
from tests.harness import Disk, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.real.cases import (
    BUSY,
    LAZY,
    NEWEST,
    TWO_DISKS,
    VM,
    each_qemu,
    open_busy,
    open_lazy,
)
from tests.real.footprint import look
from tests.rig import Rig, open_rig


def tell(progress: TransferProgress) -> None:
    pass


async def check(rig: Rig, *, repair: bool = False, vm: str = VM) -> StoreCheck:
    with trio.fail_after(60):
        return await rig.host.fsck(vm, repair=repair)


async def codes(rig: Rig, vm: str = VM) -> set[str]:
    """What is found, but for notes."""
    found = await check(rig, vm=vm)
    wrong = {f.code for f in found.findings if f.severity is not Severity.NOTE}
    assert found.clean is not bool(wrong)
    return wrong


async def notes(rig: Rig) -> set[str]:
    return {f.code for f in (await check(rig)).findings if f.severity is Severity.NOTE}


async def only_disk(rig: Rig) -> DiskInfo:
    [disk] = [disk for disk in await rig.host.disks(VM) if disk.left_out is None]
    return disk


async def commit(monitor: Monitor, device: str, **words: object) -> None:
    """Merge images as somebody else would, and wait for the end."""
    await monitor.execute("block-commit", **{"job-id": "mine", "device": device}, **words)
    with trio.fail_after(30):
        while jobs := [j for j in await monitor.execute("query-jobs") if j["id"] == "mine"]:
            if jobs[0]["status"] == "ready":
                await monitor.execute("job-complete", id="mine")
            await trio.sleep(0.02)


@each_qemu
async def test_in_order_after_everything(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        found = await check(rig)
        assert (found.findings, found.skipped) == ((), ())
        await rig.create(VM, CreateRequest(name="root"))
        await rig.create(VM, CreateRequest(name="live", live=True))
        assert (await check(rig)).findings == ()
        await rig.revert(VM, RevertRequest(name="root"))
        await rig.create(VM, CreateRequest(name="branch"))
        assert (await check(rig)).findings == ()
        await rig.create(VM, CreateRequest(name="disks", disk_only=True))
        assert (await check(rig)).findings == ()
        await rig.host.suspend(VM)
        await rig.revert(VM, RevertRequest(name="live", discard=True))
        assert await codes(rig) == set()
        await rig.revert(VM, RevertRequest(name="disks"))
        found = await check(rig)
        assert found.clean
        assert found.skipped != ()
        await (await rig.host.start(VM)).wait()
        with trio.fail_after(20):
            await rig.supervisors[VM].wait_attached()
        assert await codes(rig) == set()
        await vm.kill()
        await rig.supervisors[VM].wait_detached()
        assert await codes(rig) == set()
        assert (await check(rig, repair=True)).clean


@each_qemu
async def test_clones_are_in_order(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=[Disk()]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        try:
            await rig.clone(VM, CloneRequest(name="s", clone="web2"))
            assert await codes(rig) == await codes(rig, "web2") == set()
            await rig.create("web2", CreateRequest(name="of-clone"))
            assert await codes(rig) == await codes(rig, "web2") == set()
            assert await notes(rig) == set()
        finally:
            with trio.fail_after(20, shield=True):
                await vm.kill()
                if (clone := rig.supervisors.get("web2")) and clone.attached:
                    os.kill(clone.attached.identity.pid, 9)
                    await clone.wait_detached()
        found = await check(rig, vm="web2")
        assert (found.clean, len(found.skipped)) == (True, 1)


async def test_imported_is_in_order(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path / "state", disks=[Disk()]) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        request = ExportRequest(name="s", directory=str(tmp_path / "e"), chained=True)
        await rig.host.export(VM, request, None, tell)
        back = ImportRequest(directory=str(tmp_path / "e"), name="t")
        await rig.host.take_in(VM, back, None, tell)
        assert (await check(rig)).findings == ()
        await rig.revert(VM, RevertRequest(name="t"))
        assert (await check(rig)).findings == ()


@each_qemu
async def test_somebodys_own_snapshot(qemu: Qemu, tmp_path: Path) -> None:
    """It is told of, and what qsnapd takes afterwards is whole again."""
    async with open_lazy(qemu, tmp_path, disks=[Disk()]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        disk = await only_disk(rig)
        await vm.execute(
            "blockdev-snapshot-sync",
            **{"node-name": disk.node, "snapshot-node-name": "mine"},
            **{"snapshot-file": str(vm.folder / "mine.qcow2"), "format": "qcow2"},
        )
        [finding] = (await check(rig)).findings
        assert finding.code == "live-foreign-layer"
        assert "mine.qcow2" in finding.what
        await rig.create(VM, CreateRequest(name="t"))
        assert await codes(rig) == set()


@each_qemu
async def test_somebodys_own_commit_into_the_frozen_image(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=[Disk()]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        disk = await only_disk(rig)
        async with vm.monitor() as monitor:
            await commit(monitor, disk.node)
        assert await codes(rig) == {"frozen-in-use"}


@each_qemu
async def test_somebodys_own_commit_further_down(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=[Disk()]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        second = await rig.create(VM, CreateRequest(name="t"))
        disk = await only_disk(rig)
        async with vm.monitor() as monitor:
            top = second.disks[0].node
            base = rig.host.snapshot(VM, "s").disks[0].node
            await commit(monitor, disk.node, **{"top-node": top, "base-node": base})
        assert "live-chain-cut" in await codes(rig)


@each_qemu
async def test_vm_started_on_a_frozen_image(qemu: Qemu, tmp_path: Path) -> None:
    """What people do wrong first: the old command line."""
    async with open_lazy(qemu, tmp_path, disks=[Disk()]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await vm.kill()
        await rig.supervisors[VM].wait_detached()
        await trio.run_process(list(vm.argv))
        with trio.fail_after(20):
            await rig.supervisors[VM].wait_attached()
        [finding] = (await check(rig)).findings
        assert finding.code == "frozen-in-use"
        assert str(vm.disks[0]) in finding.what
        assert "after-s.qcow2" in finding.mend


@each_qemu
async def test_current_that_is_wrong(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await rig.create(VM, CreateRequest(name="t"))
        store = rig.supervisors[VM].store
        store.set_current("s")
        [finding] = (await check(rig)).findings
        assert finding.code == "current-differs"
        assert finding.mend == f"qsnapctl snapshot-current {VM} t"
        store.set_current("gone")
        assert await codes(rig) == {"current-unknown"}
        assert (await check(rig, repair=True)).clean
        assert store.current_as_written() == ""


async def test_what_qsnapd_has_left_in_qemu(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path, disks=[Disk()]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        options = {"driver": "null-co", "node-name": "qsnapd-0123abcd-0", "read-zeroes": True}
        await vm.execute("blockdev-add", **options)
        assert await notes(rig) == {"node-unused"}
        assert await codes(rig) == set()


async def test_beside_a_job_less_is_looked_at(tmp_path: Path) -> None:
    """And nothing is repaired."""
    async with open_busy(NEWEST, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        job = await rig.host.create(VM, CreateRequest(name="t", live=True))
        found = await check(rig)
        assert found.clean
        assert any("job" in words for words in found.skipped)
        with pytest.raises(VmBusy):
            await check(rig, repair=True)
        await job.wait()
        found = await check(rig)
        assert (found.findings, found.skipped) == ((), ())


async def test_nothing_is_changed_by_looking(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before = await look(vm, tmp_path)
        await check(rig)
        await check(rig, repair=True)
        assert await look(vm, tmp_path) == before


@each_qemu
async def test_lost_state_directory(qemu: Qemu, tmp_path: Path) -> None:
    """The images are in place: a scan of the old directory brings all back, and it restores."""
    old, new = tmp_path / "old", tmp_path / "new"
    async with open_vm(qemu, BUSY, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(qemu, tmp_path / "state", **{VM: vm}) as rig:
            await rig.create(VM, CreateRequest(name="root"))
            await rig.create(VM, CreateRequest(name="left", live=True))
            await rig.revert(VM, RevertRequest(name="root", discard=True))
            await rig.create(VM, CreateRequest(name="right"))
            before = rig.host.snapshots(VM)
        (tmp_path / "state").rename(old)
        async with open_rig(qemu, new, **{VM: vm}) as rig:
            assert rig.host.snapshots(VM) == ()
            result = await rig.host.scan(VM, str(old), tell)
            assert [(f.name, f.outcome, f.notes) for f in result.found] == [
                ("root", ScanOutcome.IMPORTED, ()),
                ("left", ScanOutcome.IMPORTED, ()),
                ("right", ScanOutcome.IMPORTED, ()),
            ]
            assert result.current == rig.host.current(VM) == "right"
            assert parents(rig.host.snapshots(VM)) == parents(before)
            assert await codes(rig) == set()
            again = await rig.host.scan(VM, str(old), tell)
            assert {f.outcome for f in again.found} == {ScanOutcome.PRESENT}
            await trio.to_thread.run_sync(shutil.rmtree, old)  # nothing leans on it any more
            for name in ("left", "right", "root"):
                assert (await rig.host.verify(VM, name)).sound
                mark = len(vm.log_lines())
                await rig.revert(VM, RevertRequest(name=name, discard=True))
                await vm.wait_checked()
                assert vm.slots_report(mark).bad_lines == ()
            assert await codes(rig) == set()


def parents(manifests: Sequence[Manifest]) -> dict[str, str | None]:
    return {manifest.name: manifest.parent for manifest in manifests}


async def test_lost_state_of_a_vm_that_is_off(tmp_path: Path) -> None:
    """Then the old directory says which snapshot was current."""
    old, new = tmp_path / "old", tmp_path / "new"
    async with open_vm(NEWEST, LAZY, disks=[Disk()], memory_mib=64) as vm:
        async with open_rig(NEWEST, tmp_path / "state", **{VM: vm}) as rig:
            await rig.create(VM, CreateRequest(name="s"))
            await rig.create(VM, CreateRequest(name="t"))
        (tmp_path / "state").rename(old)
        async with open_rig(NEWEST, new, **{VM: vm}) as rig:
            await vm.kill()
            await rig.supervisors[VM].wait_detached()
            result = await rig.host.scan(VM, str(old / VM), tell)
            assert result.current == "t"
            await rig.revert(VM, RevertRequest(name="t"))
            assert rig.host.vm(VM).state == "running"
            assert await codes(rig) == set()


@each_qemu
async def test_metadata_alone_comes_back(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        request = CreateRequest(name="s", memory_file=str(vm.folder / "s.img"))
        before = await rig.create(VM, request)
        await rig.create(VM, CreateRequest(name="t", disk_only=True))
        disk_only = rig.host.snapshot(VM, "t")
        store = rig.supervisors[VM].store
        for name in ("t", "s"):
            store.forget(name, "0123abcd")
        assert rig.host.snapshots(VM) == ()
        text = before.model_dump_json()
        assert (await rig.host.take_in_metadata(VM, text, None, tell))[0] == "s"
        with pytest.raises(SnapshotExists):
            await rig.host.take_in_metadata(VM, text, None, tell)
        text = disk_only.model_dump_json()
        assert (await rig.host.take_in_metadata(VM, text, "u", tell))[0] == "u"
        assert parents(rig.host.snapshots(VM)) == {"s": None, "u": "s"}
        assert rig.host.current(VM) == "u"
        assert await codes(rig) == set()
        await rig.revert(VM, RevertRequest(name="s"))
        assert await codes(rig) == set()


@each_qemu
async def test_copies_of_files_are_recorded_anew(qemu: Qemu, tmp_path: Path) -> None:
    """What snapshot-fsck says to do with a restored backup does it."""
    state = tmp_path / "state"
    async with open_lazy(qemu, state) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        second = await rig.create(VM, CreateRequest(name="t", disk_only=True))
        await vm.kill()
        await rig.supervisors[VM].wait_detached()
        assert manifest.memory is not None
        for path in (manifest.memory.path, *(disk.frozen for disk in second.disks)):
            await trio.to_thread.run_sync(shutil.copy, path, f"{path}.copy")
            await trio.to_thread.run_sync(os.replace, f"{path}.copy", path)
        assert await codes(rig) == {"memory-replaced", "image-replaced"}
        for name in ("s", "t"):
            request = DeleteRequest(name=name, metadata_only=True)
            await (await rig.host.delete(VM, request)).wait()
        result = await rig.host.scan(VM, str(state / VM / ".forgotten"), tell)
        assert {f.outcome for f in result.found} == {ScanOutcome.IMPORTED}
        assert await codes(rig) == set()
        assert os.listdir(state / VM / ".forgotten") == []
        assert parents(rig.host.snapshots(VM)) == {"s": None, "t": "s"}
        assert (await rig.host.verify(VM, "s")).sound
        await rig.revert(VM, RevertRequest(name="s"))
        assert await codes(rig) == set()


async def test_exports_that_a_scan_finds_are_copied(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path / "state", disks=[Disk()]) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        exports = tmp_path / "exports"
        exports.mkdir()
        request = ExportRequest(name="s", directory=str(exports / "one"))
        await rig.host.export(VM, request, None, tell)
        rig.supervisors[VM].store.forget("s", "0123abcd")
        [found] = (await rig.host.scan(VM, str(exports), tell)).found
        assert (found.name, found.outcome) == ("s", ScanOutcome.IMPORTED)
        await trio.to_thread.run_sync(shutil.rmtree, exports)
        await rig.revert(VM, RevertRequest(name="s"))
        assert rig.host.vm(VM).state == "running"
