"""Killed in the windows that only some kinds of snapshots have: holding, halting, committing."""

from pathlib import Path

import pytest
import trio

from qsnapd.errors import QsnapError, StoreError
from qsnapd.model.job import Phase
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.block import Transaction
from qsnapd.qmp.commands import Command, Quit
from tests.harness import open_vm
from tests.parts import Qemu
from tests.real.cases import BUSY, LAZY, TWO_DISKS, VM, each_qemu
from tests.real.disk_content import read_disk
from tests.real.disk_contents import BLOCK_BYTES, write_by
from tests.real.footprint import files, look, look_through
from tests.real.steering import steered
from tests.real.test_killed import open_attached
from tests.rig import open_rig
from tests.system.processes import open_daemon, reconcile

END_LIMIT_S = 60.0
HELD = (
    "--disk-only --diskspec sda,snapshot=manual",
    "--strategy stopped --diskspec sda,snapshot=manual",
    "--live --strategy precopy --diskspec sda,snapshot=manual",
)


@each_qemu
async def test_daemon_killed_while_the_guest_is_held(qemu: Qemu, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    async with open_vm(qemu, BUSY, disks=TWO_DISKS) as vm, vm.monitor() as monitor:
        await vm.wait_line(lambda line: line.startswith("OK"))
        for flags in HELD:
            async with open_attached(tmp_path, vm, qemu) as daemon:
                before = await look_through(monitor, vm, state_dir)
                monitor.events.clear()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(daemon.ctl, f"snapshot-create-as {VM} s {flags}", 1)
                    await monitor.wait_event("STOP")
                    state = await daemon.ctl(f"domstate {VM} --reason")
                    assert state.strip() == "paused (creating snapshot)"
                    daemon.process.kill()
                    await daemon.process.wait()
                if flags is HELD[0]:
                    await reconcile(daemon)
                    assert (await monitor.execute("query-status"))["running"]
            async with open_attached(tmp_path, vm, qemu) as daemon:
                assert (await daemon.ctl(f"domstate {VM}")).strip() == "running"
                assert await daemon.json(f"snapshot-list {VM}") == []
                assert await look_through(monitor, vm, state_dir) == before, flags
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
@pytest.mark.parametrize("moment", ["ready", "pending", "concluded"])
async def test_daemon_killed_while_disks_are_merged_back(
    qemu: Qemu, moment: str, tmp_path: Path
) -> None:
    """The guest's requests are not held back for long, and what it wrote is where it goes on."""
    state_dir = tmp_path / "state"
    async with (
        open_vm(qemu, LAZY, disks=TWO_DISKS, memory_mib=64) as vm,
        vm.monitor() as monitor,
    ):
        async with open_attached(tmp_path, vm, qemu) as daemon:
            before = await look_through(monitor, vm, state_dir)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.ctl, f"snapshot-create-as {VM} s {HELD[0]}", 1)
                while ((await daemon.json(f"domjobinfo {VM}")) or {}).get("phase") != Phase.HOLDING:
                    pass  # each question takes a moment
                await write_by(monitor, 7, 1)
                monitor.events.clear()
                nursery.start_soon(daemon.ctl, f"domjobabort {VM}")
                while (await monitor.wait_event("JOB_STATUS_CHANGE"))["data"]["status"] != moment:
                    pass
                daemon.process.kill()
                await daemon.process.wait()
                nursery.cancel_scope.cancel()
            await reconcile(daemon)
            await write_by(monitor, 8, 2)  # nobody holds it back
            assert (await monitor.execute("query-status"))["running"]
        async with open_attached(tmp_path, vm, qemu) as daemon:
            assert await daemon.json(f"snapshot-list {VM}") == []
            assert await look_through(monitor, vm, state_dir) == before
        await vm.kill()
        for disk in vm.disks:
            shown = read_disk(disk)
            assert (shown[BLOCK_BYTES], shown[2 * BLOCK_BYTES]) == (7, 8)


@each_qemu
@pytest.mark.parametrize("is_let_go", [False, True])
async def test_killed_between_commit_and_end(qemu: Qemu, is_let_go: bool, tmp_path: Path) -> None:
    """The guest is ended, as was asked for; unless somebody has let it work on."""

    async def die(command: Command[object], step: int) -> None:
        await trio.lowlevel.checkpoint()
        if isinstance(command, Quit):
            raise StoreError("the test ends the daemon here")

    state_dir = tmp_path / "state"
    journal = state_dir / VM / ".journal.json"
    async with open_vm(qemu, LAZY, disks=TWO_DISKS, memory_mib=64) as vm:
        async with open_rig(qemu, state_dir, **{VM: vm}) as rig:
            request = CreateRequest(name="s1", strategy=Strategy.STOPPED, halt=True)
            with steered(rig.supervisors[VM], before=die):
                job = await rig.host.create(VM, request)
                await job.wait()
            assert "was taken, but: the test ends" in " ".join(job.info().notes)
            assert journal.exists()
            if is_let_go:
                await vm.execute("cont")
        if is_let_go:
            async with open_rig(qemu, state_dir, **{VM: vm}) as rig:
                assert rig.host.vm(VM).state == "running"
                assert vm.pids()
                assert rig.host.current(VM) == "s1"
        else:
            async with open_daemon(tmp_path, {VM: vm}, qemu.img) as daemon:
                with trio.fail_after(END_LIMIT_S):
                    while vm.pids() or journal.exists():  # noqa: ASYNC110
                        await trio.sleep(0.1)
                assert "shut off" in await daemon.ctl(f"domstate {VM}")
        assert not journal.exists()
        assert (state_dir / VM / "s1" / "snapshot.json").exists()


@each_qemu
async def test_killed_after_a_commit_without_metadata(qemu: Qemu, tmp_path: Path) -> None:
    memory, state_dir = tmp_path / "memory", tmp_path / "state"
    request = CreateRequest(
        name="s1", strategy=Strategy.STOPPED, keep_metadata=False, memory_file=str(memory)
    )
    async with open_vm(qemu, BUSY, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(qemu, state_dir, **{VM: vm}) as rig:
            before = await look(vm, state_dir)

            async def die(command: Command[object], step: int) -> None:
                await trio.lowlevel.checkpoint()
                if (info := rig.host.job(VM)) and info.phase is Phase.FINISHING:
                    raise StoreError("the test ends the daemon here")

            with steered(rig.supervisors[VM], before=die):
                await rig.create(VM, request)
            assert (state_dir / VM / ".journal.json").exists()
        async with open_rig(qemu, state_dir, **{VM: vm}) as rig:
            assert not (state_dir / VM / ".journal.json").exists()
            assert rig.host.snapshots(VM) == ()
            now = await look(vm, state_dir)
            assert (now.capabilities, now.parameters) == (before.capabilities, before.parameters)
            assert len(now.nodes) > len(before.nodes)
            assert memory.exists()
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_qemu_killed_on_a_file_of_somebody(qemu: Qemu, tmp_path: Path) -> None:
    """What the guest wrote there goes where the VM is started from again, the file is emptied."""
    empty = tmp_path / "empty"
    empty.touch()
    disks = (DiskRequest(target="vda", file=str(empty)), DiskRequest(target="sda", snapshot="no"))
    async with open_vm(qemu, BUSY, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(qemu, tmp_path / "state", **{VM: vm}) as rig:
            before = files(vm, tmp_path)

            async def kill(command: Command[object], step: int) -> None:
                if isinstance(command, Transaction):
                    await vm.kill()

            with steered(rig.supervisors[VM], after=kill):
                job = await rig.host.create(
                    VM, CreateRequest(name="s1", strategy=Strategy.STOPPED, disks=disks)
                )
                with pytest.raises(QsnapError):
                    await job.wait()
            with trio.fail_after(END_LIMIT_S):
                while (tmp_path / "state" / VM / ".journal.json").exists():  # noqa: ASYNC110
                    await trio.sleep(0.1)
            assert empty.stat().st_size == 0
            now = {path for path in files(vm, tmp_path) if path.name != "qmp"}
            assert now <= set(before) | {tmp_path / "state" / VM}
