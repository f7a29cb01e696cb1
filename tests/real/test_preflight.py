"""What makes a restore impossible is found and said before the running VM is touched."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from qsnapd.errors import QsnapError, SnapshotDiffers
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.snapshot.restoring.preflight import preflight
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_lazy
from tests.real.damage import mode
from tests.real.footprint import look
from tests.real.spoilt_snapshots import FILES, HOST, MANIFEST, Case, Scene

NOBODY = 65534


@each_qemu
@pytest.mark.parametrize("table", [FILES, MANIFEST, HOST], ids=["files", "manifest", "host"])
async def test_refused_before_the_vm_is_touched(
    qemu: Qemu, table: Mapping[str, Case], tmp_path: Path
) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="first"))
        second = await rig.create(VM, CreateRequest(name="second"))
        scene = Scene(qemu, vm, rig, tmp_path, first, second)
        scene.other_image()
        before, pid = await look(vm, tmp_path), vm.pid
        surprises = {}
        for name, case in table.items():
            with case.spoil(scene), pytest.raises(QsnapError) as refused:
                await rig.revert(VM, RevertRequest(name="second"))
            if type(refused.value) is not case.error or not case.is_said(str(refused.value)):
                surprises[name] = refused.value
            assert vm.pid == pid, name
            assert rig.host.vm(VM).state == "running", name
        assert surprises == {}
        assert await look(vm, tmp_path) == before
        await rig.revert(VM, RevertRequest(name="second"))
        assert vm.pid != pid


def test_there_are_enough() -> None:
    assert len(FILES) + len(MANIFEST) + len(HOST) >= 50


@each_qemu
async def test_forced(qemu: Qemu, tmp_path: Path) -> None:
    """What only may go wrong can be tried; what must go wrong cannot."""
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="first"))
        second = await rig.create(VM, CreateRequest(name="second"))
        scene = Scene(qemu, vm, rig, tmp_path, first, second)
        pid = vm.pid
        request = RevertRequest(name="second", force=True, discard=True)
        with scene.machine(type="pc-i440fx-99.9"), pytest.raises(SnapshotDiffers) as refused:
            await rig.revert(VM, request)
        assert not refused.value.can_be_forced
        assert vm.pid == pid
        with HOST["a CPU without something"].spoil(scene):
            with pytest.raises(SnapshotDiffers) as refused:
                await rig.revert(VM, RevertRequest(name="second"))
            assert refused.value.can_be_forced
            assert vm.pid == pid
            await rig.revert(VM, request)
        assert vm.pid != pid
        assert rig.host.vm(VM).state == "running"


@each_qemu
async def test_asked_as_the_user_that_qemu_runs_as(qemu: Qemu, tmp_path: Path) -> None:
    """Root may start QEMU as anybody else; everybody else only as themselves."""
    user = os.geteuid() or NOBODY
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="first"))
        second = await rig.create(VM, CreateRequest(name="second"))
        scene = Scene(qemu, vm, rig, tmp_path, first, second)
        before = await look(vm, tmp_path)
        base = scene.image("vda", 1)
        with (
            scene.process(uid=user, gid=user, groups=[]),
            mode(base, 0),
            pytest.raises(SnapshotDiffers) as refused,
        ):
            await rig.revert(VM, RevertRequest(name="second"))
        said = "\n".join(refused.value.differences)
        assert f"disk vda: {base}: Permission denied, asked as user {user}" in said
        if user == NOBODY:
            assert f"-pidfile, QEMU writes this: {vm.folder}" in said
            assert "disk vda: " in said
            assert "belongs to user 0, and so will its overlay" in said
        assert await look(vm, tmp_path) == before


@each_qemu
async def test_without_memory_only_what_a_boot_needs_counts(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        whole = await rig.create(VM, CreateRequest(name="s"))
        machine = whole.machine.model_copy(update={"cpu_features": ("teleport",), "ram_bytes": 1})
        changes = {"memory": None, "strategy": None, "image_format": None, "machine": machine}
        disk_only = whole.model_copy(update={**changes, "qemu_version": "99.0.0"})
        passed = await preflight(disk_only, qemu_img=str(qemu.img), force=False)
        assert (passed.differences, passed.notes) == ((), ())
        assert passed.probe is not None
        nowhere = machine.model_copy(update={"type": "pc-i440fx-99.9"})
        with pytest.raises(SnapshotDiffers, match="no such type"):
            await preflight(
                disk_only.model_copy(update={"machine": nowhere}),
                qemu_img=str(qemu.img),
                force=False,
            )
