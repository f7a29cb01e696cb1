"""Overlays in files of others: made by the caller, empty, or block devices."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from qsnapd.errors import CommandRefused, StoreError, TargetRefused
from qsnapd.model.plan import JournalEntry
from qsnapd.model.request import CreateRequest, DiskRequest, RevertRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.block import Transaction
from qsnapd.qmp.commands import Command
from tests.harness import Vm
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_busy, open_lazy
from tests.real.footprint import look
from tests.real.steering import steered

SIZE = "64M"
MIB = 1 << 20


def disk_only(name: str, path: Path, *, reuse: bool = False, **what: str) -> CreateRequest:
    """Ask for a snapshot of the first disk whose overlay is at *path*."""
    disks = (
        DiskRequest.model_validate({"target": "vda", "file": str(path), **what}),
        DiskRequest(target="sda", snapshot="no"),
    )
    return CreateRequest(name=name, disk_only=True, disks=disks, reuse_overlays=reuse)


def make(qemu: Qemu, path: Path, *words: str, size: str | None = SIZE) -> Path:
    command = [str(qemu.img), "create", "-q", "-f", "qcow2", *words, str(path)]
    subprocess.run([*command, *([size] if size else [])], check=True)
    return path


def over(vm: Vm) -> tuple[str, ...]:
    return ("-u", "-F", "qcow2", "-b", str(vm.disks[0]))


async def refuse_pivot(command: Command[object], step: int) -> None:
    await trio.lowlevel.checkpoint()
    if isinstance(command, Transaction):
        raise CommandRefused(command.name, "GenericError", "the test does not want it")


@contextmanager
def loop_device(folder: Path, size_mib: int = 256) -> Iterator[Path]:
    """Have a block device."""
    backing = folder / "device"
    backing.touch()
    os.truncate(backing, size_mib * MIB)
    done = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], check=True, capture_output=True, text=True
    )
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)


@each_qemu
async def test_the_caller_has_made_it(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path / "state") as (vm, rig):
        mine = make(qemu, tmp_path / "mine.qcow2", *over(vm))
        mine.chmod(0o640)
        before = mine.stat()
        taken = await rig.create(VM, disk_only("s1", mine, reuse=True))
        assert [disk.overlay for disk in taken.disks] == [str(mine)]
        now = mine.stat()
        for what in ("st_ino", "st_mode", "st_uid", "st_gid"):
            assert getattr(now, what) == getattr(before, what)
        await vm.wait_checked()
        after = await rig.create(VM, CreateRequest(name="s2", strategy=Strategy.STOPPED))
        assert str(mine) in {file.path for disk in after.disks for file in disk.chain}
        await vm.wait_checked()
        assert vm.slots_report().fine
        begun = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s2"))
        await vm.wait_checked(since=begun)
        assert vm.slots_report().fine


@each_qemu
async def test_it_stays_if_there_is_no_snapshot(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path / "state") as (vm, rig):
        mine = make(qemu, tmp_path / "mine.qcow2", *over(vm))
        content, before = mine.read_bytes(), await look(vm, tmp_path)
        with steered(rig.supervisors[VM], before=refuse_pivot), pytest.raises(CommandRefused):
            await rig.create(VM, disk_only("s1", mine, reuse=True))
        assert await look(vm, tmp_path) == before
        assert mine.read_bytes() == content
        await rig.create(VM, disk_only("s1", mine, reuse=True))
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_what_is_no_overlay_of_this_disk(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path / "state") as (vm, rig):
        other = make(qemu, tmp_path / "other.qcow2")
        text = tmp_path / "text"
        text.write_text("of somebody")
        link = tmp_path / "link"
        link.symlink_to(make(qemu, tmp_path / "linked.qcow2", *over(vm)))
        full = make(qemu, tmp_path / "full.qcow2", *over(vm))
        opened = {"driver": "qcow2", "file": {"driver": "file", "filename": str(full)}}
        image = f"json:{json.dumps({**opened, 'backing': None})}"
        await trio.run_process(
            [f"{qemu.img.parent}/qemu-io", "-c", "write 1M 64k", image], capture_stdout=True
        )
        wrong = {
            tmp_path / "nothing": "missing existing file for disk vda",
            text: "no qcow2 image",
            make(qemu, tmp_path / "small", *over(vm), size="1M"): "is one of 1048576 bytes",
            make(qemu, tmp_path / "alone"): "is an overlay over nothing",
            make(
                qemu, tmp_path / "others", "-u", "-F", "qcow2", "-b", str(other)
            ): "it must be one over",
            make(
                qemu, tmp_path / "raw", "-u", "-F", "raw", "-b", str(vm.disks[0])
            ): "it is qcow2",
            link: "cannot be opened",
            vm.disks[0]: "the very image",
            full: "holds data already",
        }
        before = await look(vm, tmp_path)
        for path, words in wrong.items():
            with pytest.raises(TargetRefused, match=words):
                await rig.create(VM, disk_only("s1", path, reuse=True))
            assert await look(vm, tmp_path) == before, path
        assert text.read_text() == "of somebody"


@each_qemu
async def test_an_empty_file_is_filled_and_emptied_again(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path / "state") as (vm, rig):
        empty = tmp_path / "empty"
        empty.touch(mode=0o644)
        inode, before = empty.stat().st_ino, await look(vm, tmp_path)
        with steered(rig.supervisors[VM], before=refuse_pivot), pytest.raises(CommandRefused):
            await rig.create(VM, disk_only("s1", empty))
        assert await look(vm, tmp_path) == before
        assert (empty.stat().st_ino, empty.stat().st_size) == (inode, 0)
        taken = await rig.create(VM, disk_only("s1", empty))
        assert [disk.overlay for disk in taken.disks] == [str(empty)]
        assert empty.stat().st_ino == inode
        (tmp_path / "full").write_text("of somebody")
        with pytest.raises(TargetRefused, match="already exists and is not a block device"):
            await rig.create(VM, disk_only("s2", tmp_path / "full"))
        assert (tmp_path / "full").read_text() == "of somebody"
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_on_a_block_device(qemu: Qemu, tmp_path: Path) -> None:
    with loop_device(tmp_path) as device:
        async with open_busy(qemu, tmp_path / "state") as (vm, rig):
            before = await look(vm, tmp_path)
            wrong: tuple[tuple[Path, str, dict[str, Any]], ...] = (
                (device, "mismatch between configured type", {}),
                (tmp_path / "none", "doesn't exist", {"target_type": "block"}),
                (vm.disks[0], "mismatch between configured type", {"target_type": "block"}),
            )
            for path, words, what in wrong:
                with pytest.raises(TargetRefused, match=words):
                    await rig.create(VM, disk_only("s1", path, **what))
                assert await look(vm, tmp_path) == before
            link = tmp_path / "link"
            link.symlink_to(device)
            with steered(rig.supervisors[VM], before=refuse_pivot), pytest.raises(CommandRefused):
                await rig.create(VM, disk_only("s1", device, target_type="block"))
            taken = await rig.create(VM, disk_only("s1", device, target_type="block"))
            assert [disk.overlay for disk in taken.disks] == [str(device)]
            await vm.wait_checked()
            # Over a device there is no place for the next overlay but where somebody says.
            with pytest.raises(Exception, match="refusing to generate external snapshot name"):
                await rig.create(VM, CreateRequest(name="s2"))
            beside = disk_only("s2", tmp_path / "over-device.qcow2")
            await rig.create(VM, beside)
            await vm.wait_checked()
            assert vm.slots_report().fine
            begun = len(vm.log_lines())
            await rig.revert(
                VM, RevertRequest(name="s2", state="running", discard=True, force=True)
            )
            await vm.wait_line(lambda line: line.startswith("OK"), since=begun)


@each_qemu
async def test_a_device_that_this_host_uses(qemu: Qemu, tmp_path: Path) -> None:
    with loop_device(tmp_path) as device:
        used = os.open(device, os.O_RDONLY | os.O_EXCL)  # as a mount does
        try:
            async with open_lazy(qemu, tmp_path / "state") as (_, rig):
                with pytest.raises(TargetRefused, match="in use on this host"):
                    await rig.create(VM, disk_only("s1", device, target_type="block"))
        finally:
            os.close(used)
        assert device.read_bytes().count(0) == 256 * MIB


@each_qemu
async def test_what_a_device_held_before_is_never_merged(qemu: Qemu, tmp_path: Path) -> None:
    """Nothing tells of it, until it holds an overlay."""
    with loop_device(tmp_path) as device:
        async with open_lazy(qemu, tmp_path / "state") as (vm, rig):
            store = rig.supervisors[VM].store
            make(qemu, device, *over(vm))
            broken = qemu.img.with_name("no-such-program")
            rig.host._qemu_img = str(broken)  # what fails is making the overlay
            known: list[JournalEntry] = []
            write = store.journal.write

            def spy(entry: JournalEntry) -> None:
                known.append(entry)
                write(entry)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(store.journal, "write", spy)
                with pytest.raises(StoreError, match="is missing"):
                    await rig.create(VM, disk_only("s1", device, target_type="block"))
            assert known
            assert not any(entry.given for entry in known)


@each_qemu
async def test_a_file_that_nobody_named_is_left_alone(qemu: Qemu, tmp_path: Path) -> None:
    """The name that an overlay gets by itself may be that of one which is needed still."""
    async with open_lazy(qemu, tmp_path / "state") as (vm, rig):
        theirs = vm.folder / f"{vm.disks[0].stem}.after-s1.qcow2"
        for content in ("", "of somebody"):
            theirs.write_text(content)
            taken = await rig.create(VM, CreateRequest(name="s1", disk_only=True))
            [overlay] = [Path(d.overlay or "") for d in taken.disks if d.target == "vda"]
            assert overlay != theirs
            assert overlay.name.startswith(theirs.stem)
            assert theirs.read_text() == content
            await rig.host.rename_snapshot(VM, "s1", f"s-{len(content)}")
