"""A guest that stood still when its snapshot was planned, and runs when that is taken."""

from pathlib import Path

import pytest
import trio
import trio.testing

from qsnapd.errors import CaptureFailed
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.model.snapshot import Consistency, Strategy
from qsnapd.qmp.block import BlockdevAdd
from qsnapd.qmp.migration import Migrate
from tests.parts import Qemu
from tests.real.cases import STRATEGIES, VM, Case, each_qemu, open_busy
from tests.real.steering import Gate, steered
from tests.real.test_manual import MANUAL, holding
from tests.rig import Rig


async def take_resumed(rig: Rig, request: CreateRequest) -> None:
    """Take the snapshot of a paused VM whose user resumes it while files are being made."""
    await rig.host.suspend(VM)
    gate = Gate(BlockdevAdd)
    with steered(rig.supervisors[VM], before=gate):
        job = await rig.host.create(VM, request)
        await gate.reached()
        await rig.host.resume(VM)
        gate.open()
        await job.wait()


@pytest.mark.parametrize(
    "case",
    [case for case in STRATEGIES if not case.resumed_by_qemu],  # that is not for a paused VM
    ids=str,
)
async def test_memory_and_disks_are_of_one_instant(case: Case, tmp_path: Path) -> None:
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        await take_resumed(rig, case.request("s1"))
        assert rig.host.snapshot(VM, "s1").paused_ms > 0
        assert rig.host.vm(VM).state == "running"
        await vm.wait_checked()
        begun = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s1", state="running", discard=True))
        await vm.wait_checked(since=begun)
        assert vm.slots_report(since=begun).fine


@each_qemu
async def test_its_disks_are_not_those_of_a_paused_one(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        await take_resumed(rig, CreateRequest(name="s1", disk_only=True))
        assert rig.host.snapshot(VM, "s1").consistency is Consistency.CRASH
        assert rig.host.vm(VM).state == "running"
        await vm.wait_checked()


@each_qemu
async def test_not_while_its_storage_works(qemu: Qemu, tmp_path: Path) -> None:
    """Somebody resumes it on another monitor: the storage's snapshot is worth nothing."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        request = CreateRequest(name="s1", disk_only=True, disks=MANUAL)
        job = await rig.host.create(VM, request)
        await holding(job)
        await vm.execute("cont")
        await trio.testing.wait_all_tasks_blocked(0.1)
        await rig.host.resume(VM)
        with pytest.raises(CaptureFailed, match="on another monitor"):
            await job.wait()
        assert rig.host.snapshots(VM) == ()
        assert rig.host.vm(VM).state == "running"
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_not_while_its_memory_is_saved(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        gate = Gate(Migrate)
        with steered(rig.supervisors[VM], before=gate):
            request = CreateRequest(name="s1", strategy=Strategy.STOPPED)
            job = await rig.host.create(VM, request)
            await gate.reached()
            await vm.execute("cont")
            gate.open()
            with pytest.raises(CaptureFailed, match="on another monitor"):
                await job.wait()
        assert rig.host.snapshots(VM) == ()
        assert rig.host.vm(VM).state == "running"
        await vm.wait_checked()
        assert vm.slots_report().fine
