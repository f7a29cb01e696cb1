"""Putting a VM back: what is found too late is found before the old QEMU is ended."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsnapd.errors import ImageInvalid, UnknownSnapshot
from qsnapd.model.request import CreateRequest, RevertRequest
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_busy, open_lazy
from tests.real.footprint import look

Damage = Callable[[bytes], bytes]


@contextmanager
def replaced(path: Path, damage: Damage | None) -> Iterator[None]:
    """During the block a damaged copy lies at *path*, or nothing."""
    aside = path.rename(path.with_name("aside"))
    try:
        if damage is not None:
            path.write_bytes(damage(aside.read_bytes()))
        yield
    finally:
        aside.replace(path)


@each_qemu
async def test_damaged_snapshot_is_refused_and_the_vm_goes_on(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        assert manifest.memory is not None
        memory, frozen = Path(manifest.memory.path), Path(manifest.disks[0].frozen)
        before, pid = await look(vm, tmp_path), vm.pid
        with pytest.raises(UnknownSnapshot, match="no snapshot 'other'"):
            await rig.revert(VM, RevertRequest(name="other"))
        damages: tuple[tuple[Path, Damage | None, str], ...] = (
            (memory, lambda image: image[:-4096], "bytes, it was saved with"),
            (memory, lambda image: bytes(4096) + image[4096:], "memory.img|memory image|QEMU"),
            (memory, None, "cannot be opened"),
            (frozen, lambda image: image, "another file"),
            (frozen, None, "missing"),
        )
        for path, damage, words in damages:
            with replaced(path, damage), pytest.raises(ImageInvalid, match=words):
                await rig.revert(VM, RevertRequest(name="s"))
            assert vm.pid == pid
            assert rig.host.vm(VM).state == "running"
        assert await look(vm, tmp_path) == before

        await rig.revert(VM, RevertRequest(name="s"))
        assert vm.pid != pid
        assert rig.host.vm(VM).reason == "from snapshot"


@each_qemu
async def test_branches(qemu: Qemu, tmp_path: Path) -> None:
    """What came after a snapshot is no part of what comes after the revert to it."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="root"))
        await rig.create(VM, CreateRequest(name="left"))
        await rig.revert(VM, RevertRequest(name="root"))
        await vm.wait_checked()
        await rig.create(VM, CreateRequest(name="right", live=True))
        parents = {m.name: m.parent for m in rig.host.snapshots(VM)}
        assert parents == {"root": None, "left": "root", "right": "root"}
        for name in ("left", "right", "root"):
            mark = len(vm.log_lines())
            await rig.revert(VM, RevertRequest(name=name))
            await vm.wait_checked()
            assert vm.slots_report(mark).bad_lines == ()


@each_qemu
async def test_running_or_paused_as_asked_for(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="ran"))
        await rig.host.suspend(VM)
        await rig.create(VM, CreateRequest(name="stood"))
        for name, state, expected in (
            ("ran", None, "running"),
            ("ran", "paused", "paused"),
            ("stood", None, "paused"),
            ("stood", "running", "running"),
        ):
            request = RevertRequest.model_validate({"name": name, "state": state})
            await rig.revert(VM, request)
            info = rig.host.vm(VM)
            assert (info.state, info.reason) == (expected, "from snapshot")


@each_qemu
async def test_vm_that_was_shut_off(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await vm.kill()
        await rig.supervisors[VM].wait_detached()
        await rig.revert(VM, RevertRequest(name="s"))
        assert rig.host.vm(VM).state == "running"
