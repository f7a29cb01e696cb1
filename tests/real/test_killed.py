"""The daemon or QEMU is killed in the middle of a job: the guest goes on, nothing is left."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.errors import QsnapError
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.qmp.commands import AddFd, Cont, GetFd
from qsnapd.qmp.migration import Migrate, MigrateContinue
from tests.harness import Vm, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.real.cases import BUSY, LAZY, TWO_DISKS, VM, Case, each_strategy, open_busy
from tests.real.footprint import files, look_through
from tests.real.steering import Gate, steered
from tests.system.processes import Daemon, open_daemon, reconcile

END_LIMIT_S = 60.0

MOMENTS = {
    Strategy.STOPPED: ("STOP", "active", "completed"),
    Strategy.PRECOPY: ("active", "pre-switchover", "device", "completed"),
    Strategy.BACKGROUND: ("STOP", "active", "completed"),
}
"""When to kill: at a STOP event, or when the migration has this status."""


async def moment_comes(monitor: Monitor, moment: str) -> None:
    """Wait for it, as QEMU itself tells it."""
    if moment == "STOP":
        await monitor.wait_event("STOP")
        return
    while (await monitor.wait_event("MIGRATION"))["data"]["status"] != moment:
        pass


async def until_attached(daemon: Daemon) -> None:
    with trio.fail_after(END_LIMIT_S):
        while not (await daemon.json(f"dominfo {VM}"))["connected"]:  # noqa: ASYNC110
            await trio.sleep(0.1)


@asynccontextmanager
async def open_attached(folder: Path, vm: Vm, qemu: Qemu) -> AsyncIterator[Daemon]:
    """Run a daemon that has found its VM, and has tidied up behind the one before."""
    async with open_daemon(folder, {VM: vm}, qemu.img) as daemon:
        await until_attached(daemon)
        yield daemon


async def kill_at(daemon: Daemon, monitor: Monitor, case: Case, moment: str) -> None:
    """Take a checkpoint, and kill the daemon in the middle of it."""
    what = f"snapshot-create-as {VM} s --strategy {case.strategy}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon.ctl, what, 1)
        await moment_comes(monitor, moment)
        daemon.process.kill()
        with trio.fail_after(END_LIMIT_S):
            await daemon.process.wait()


@each_strategy
async def test_daemon_killed(case: Case, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    async with open_vm(case.qemu, BUSY, disks=TWO_DISKS) as vm, vm.monitor() as monitor:
        await vm.wait_line(lambda line: line.startswith("OK"))
        for moment in MOMENTS[case.strategy]:
            async with open_attached(tmp_path, vm, case.qemu) as daemon:
                before = await look_through(monitor, vm, state_dir)
                monitor.events.clear()
                await kill_at(daemon, monitor, case, moment)
            async with open_attached(tmp_path, vm, case.qemu) as daemon:
                assert await daemon.ctl(f"domstate {VM}") == "running\n"
                assert await daemon.json(f"snapshot-list {VM}") == []
                assert await look_through(monitor, vm, state_dir) == before, moment
        async with open_attached(tmp_path, vm, case.qemu) as daemon:
            await daemon.ctl(f"snapshot-create-as {VM} afterwards --strategy {case.strategy}")
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_strategy
async def test_guest_is_resumed_behind_a_killed_daemon(case: Case, tmp_path: Path) -> None:
    """By what systemd runs then; the rest is left to the next daemon."""
    moment = "pre-switchover" if case.strategy is Strategy.PRECOPY else "STOP"
    async with (
        open_vm(case.qemu, LAZY, disks=TWO_DISKS, memory_mib=64) as vm,
        vm.monitor() as monitor,
    ):
        async with open_attached(tmp_path, vm, case.qemu) as daemon:
            before = await look_through(monitor, vm, tmp_path / "state")
            await kill_at(daemon, monitor, case, moment)
            await reconcile(daemon)
            assert (await monitor.execute("query-status"))["running"]
            assert files(vm, tmp_path / "state") > before.files
        async with open_attached(tmp_path, vm, case.qemu):
            assert await look_through(monitor, vm, tmp_path / "state") == before


@each_strategy
async def test_qemu_killed(case: Case, tmp_path: Path) -> None:
    """While a checkpoint is prepared, while it is begun, and when memory is saved."""
    later = MigrateContinue if case.strategy is Strategy.PRECOPY else Migrate
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        supervisor = rig.supervisors[VM]
        memory_sent = AddFd if case.image_format is ImageFormat.MAPPED_RAM else GetFd
        moments = (memory_sent, later) if case.resumed_by_qemu else (memory_sent, later, Cont)
        for command in moments:
            await supervisor.wait_attached()
            before = files(vm, tmp_path)
            gate = Gate(command)
            with steered(supervisor, before=gate), rig.host.subscribe() as events:
                job = await rig.host.create(VM, case.request("lost"))
                await gate.reached()
                await vm.kill()
                gate.open()
                with trio.fail_after(END_LIMIT_S):
                    with pytest.raises(QsnapError):
                        await job.wait()
                    while (await events.receive()).event != "recovered":
                        pass
            assert rig.host.vm(VM).state == "shut off"
            assert rig.host.snapshots(VM) == ()
            assert files(vm, tmp_path) == before
            await trio.run_process(list(vm.argv))  # the images hold all that the guest wrote
        await supervisor.wait_attached()
        assert {disk.path for disk in await rig.host.disks(VM)} == set(map(str, vm.disks))
        await rig.create(VM, case.request("afterwards"))
