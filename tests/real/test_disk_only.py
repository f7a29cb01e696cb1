"""Snapshots without memory: the guest never stands still, and notices nothing."""

from pathlib import Path

import pytest

from qsnapd.errors import BadRequest, Blocked, JobCancelled, StoreFull
from qsnapd.image.files import free_bytes
from qsnapd.model.request import CreateRequest, DiskRequest, RevertRequest
from qsnapd.model.snapshot import Consistency, Strategy
from qsnapd.qmp.block import Transaction
from qsnapd.qmp.commands import Stop
from qsnapd.qmp.migration import MigrateSetCapabilities, MigrateSetParameters
from tests.harness import open_vm
from tests.parts import SYSTEM_QEMU, Qemu
from tests.real.cases import (
    BUSY,
    LAZY,
    TWO_DISKS,
    VM,
    each_qemu,
    open_busy,
    open_lazy,
)
from tests.real.footprint import look, look_through
from tests.real.steering import Gate, Hook, steered
from tests.real.test_checkpoint_undone import MOMENTS, UNTOUCHED, CancelAt, FailAt, attempt
from tests.rig import open_rig

DISK_ONLY = CreateRequest(name="s1", disk_only=True)
MIB = 1 << 20
TOUCHING_MORE = (Stop, MigrateSetCapabilities, MigrateSetParameters)


@each_qemu
async def test_the_guest_runs_on(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig), vm.monitor() as monitor:
        monitor.events.clear()
        with steered(rig.supervisors[VM]) as session:
            taken = await rig.create(VM, DISK_ONLY)
        assert Transaction in map(type, session.sent)
        assert not any(isinstance(command, TOUCHING_MORE) for command in session.sent)
        assert (taken.strategy, taken.image_format, taken.memory) == (None, None, None)
        assert (taken.paused_ms, taken.state) == (0, "running")
        assert taken.consistency is Consistency.CRASH
        assert taken.is_disk_only
        assert {disk.target for disk in taken.disks} == {"vda", "sda"}
        await monitor.execute("query-status")
        assert "STOP" not in [event["event"] for event in monitor.events]
        assert rig.host.current(VM) == "s1"
        now = await look_through(monitor, vm, tmp_path)
        assert {chain[1] for chain in now.chains.values() if len(chain) > 2} == {
            disk.overlay for disk in taken.disks
        }
        assert not [path for path in now.files if "partial" in path.name]
        again = await rig.create(VM, DISK_ONLY.model_copy(update={"name": "s2"}))
        assert again.parent == "s1"
        await rig.create(VM, CreateRequest(name="s3", strategy=Strategy.STOPPED))
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_a_paused_vm_stays_paused_and_counts_as_quiesced(
    qemu: Qemu, tmp_path: Path
) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.host.suspend(VM)
        job = await rig.host.create(VM, DISK_ONLY.model_copy(update={"quiesce": True}))
        taken = await job.wait()
        assert taken.consistency is Consistency.PAUSED
        assert (taken.state, taken.reason) == ("paused", "PAUSED_USER")
        assert "counts as quiesced" in " ".join(job.info().notes)
        assert rig.host.vm(VM).reason == "user"
        assert (await look(vm, tmp_path)).status == "paused"


@each_qemu
async def test_after_a_save_of_a_paused_vm(qemu: Qemu, tmp_path: Path) -> None:
    """QEMU < 10.0 lets go of the disks of such a VM; later ones take them back."""
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.host.suspend(VM)
        await rig.create(VM, CreateRequest(name="s0", strategy=Strategy.STOPPED))
        if qemu.version != SYSTEM_QEMU:
            assert (await rig.create(VM, DISK_ONLY)).consistency is Consistency.PAUSED
        await rig.host.resume(VM)
        await rig.create(VM, CreateRequest(name="s2", disk_only=True))
        assert (await look(vm, tmp_path)).status == "running"


@each_qemu
async def test_what_blocks_only_memory_does_not_matter(qemu: Qemu, tmp_path: Path) -> None:
    shared = [
        *("-object", "memory-backend-ram,id=shared,size=1M,share=on"),
        *("-device", "ivshmem-plain,memdev=shared,master=off"),
    ]
    async with open_lazy(qemu, tmp_path, extra=shared) as (_, rig):
        with pytest.raises(Blocked, match="A disk-only snapshot can be taken"):
            await rig.create(VM, CreateRequest())
        await rig.create(VM, DISK_ONLY)


@each_qemu
async def test_block_jobs_matter(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await vm.execute("blockdev-add", driver="null-co", node_name="nowhere", size=64 << 20)
        slowly = {"sync": "full", "speed": 4096}
        await vm.execute(
            "blockdev-backup", job_id="nightly", device="disk0", target="nowhere", **slowly
        )
        before = await look(vm, tmp_path)
        with pytest.raises(Blocked, match="nightly"):
            await rig.create(VM, DISK_ONLY)
        now = await look(vm, tmp_path)
        assert (now.chains, now.nodes, now.files) == (before.chains, before.nodes, before.files)


@each_qemu
async def test_some_disks_only(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        none = tuple(DiskRequest(target=target, snapshot="no") for target in ("vda", "sda"))
        with pytest.raises(BadRequest, match="at least one disk to be selected for snapshot"):
            await rig.create(VM, DISK_ONLY.model_copy(update={"disks": none}))
        taken = await rig.create(VM, DISK_ONLY.model_copy(update={"disks": none[:1]}))
        assert [disk.target for disk in taken.disks] == ["sda"]
        assert [disk.target for disk in taken.left_out] == ["vda"]
        assert taken.manual_disks == ()


@each_qemu
async def test_failed_or_cancelled_at_each_step(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        before = await look(vm, tmp_path)
        ended: set[str] = set()
        for kind in ("cancelled", "refused", "unanswered"):
            for step in range(1, 100):
                cancel, fail = CancelAt(rig, step), FailAt(step)
                kinds: dict[str, dict[str, Hook]] = {
                    "cancelled": {"before": cancel},
                    "refused": {"before": fail.refuse},
                    "unanswered": {"after": fail.lose_reply},
                }
                name = f"{kind}-{step}"
                with steered(rig.supervisors[VM], **kinds[kind]):
                    error = await attempt(rig, DISK_ONLY.model_copy(update={"name": name}))
                where = f"{name}: {fail.failed and fail.failed.name}: {error}"
                if error is None:
                    # It does not matter, or there is no such step: the snapshot exists.
                    assert rig.host.snapshot(VM, name).name == name
                    before = await look(vm, tmp_path)
                    if step > MOMENTS:
                        ended.add(kind)
                        break
                    continue
                assert error.effect in UNTOUCHED, where
                assert (kind == "cancelled") == isinstance(error, JobCancelled), where
                assert await look(vm, tmp_path) == before, where
        assert len(ended) == 3
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_user_suspends_meanwhile(qemu: Qemu, tmp_path: Path) -> None:
    """A disk-only snapshot is none of the guest's run state's business."""
    gate = Gate(Transaction)
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        with steered(rig.supervisors[VM], before=gate):
            job = await rig.host.create(VM, DISK_ONLY)
            await gate.reached()
            await rig.host.suspend(VM)
            rig.host.abort(VM)
            gate.open()
            with pytest.raises(JobCancelled):
                await job.wait()
        assert rig.host.vm(VM).reason == "user"
        assert (await look(vm, tmp_path)).status == "paused"


@each_qemu
async def test_reverted_to(qemu: Qemu, tmp_path: Path) -> None:
    """The guest boots from the disks of that moment, and finds them whole."""
    async with (
        open_vm(qemu, BUSY, disks=TWO_DISKS) as vm,
        open_rig(qemu, tmp_path, **{VM: vm}) as rig,
    ):
        await vm.wait_line(lambda line: line.startswith("OK"))
        await rig.create(VM, DISK_ONLY)
        await vm.wait_checked()
        begun = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s1", state="running"))
        await vm.wait_line(lambda line: line.startswith("OK"), since=begun)
        assert rig.host.vm(VM).state == "running"


@each_qemu
async def test_no_room_for_memory_is_needed(qemu: Qemu, tmp_path: Path) -> None:
    size_mib = free_bytes(tmp_path) // MIB + 1
    backend = f"memory-backend-ram,id=ram,size={size_mib}M,reserve=off"
    huge = ["-object", backend, "-machine", "memory-backend=ram", "-S"]
    async with open_vm(qemu, LAZY, disks=TWO_DISKS, memory_mib=size_mib, extra=huge) as vm:
        await vm.execute("cont")
        await vm.execute("stop")
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            with pytest.raises(StoreFull):
                await rig.create(VM, CreateRequest())
            await rig.create(VM, DISK_ONLY)
