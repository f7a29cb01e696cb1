"""The daemon is killed while it has the guest's file systems frozen: somebody thaws them."""

import signal
from functools import partial
from pathlib import Path

import trio

from tests.harness import Disk, Vm
from tests.parts import Qemu
from tests.real.cases import NEWEST, VM, each_qemu
from tests.real.footprint import look_through
from tests.real.quiescing import open_agent_vm, wait_writing
from tests.real.test_killed import open_attached
from tests.system.processes import Daemon, reconcile

END_LIMIT_S = 60.0
CREATE = f"snapshot-create-as {VM} q --disk-only --quiesce"
HOOK_FREEZE = "HOOK freeze"


async def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    with trio.fail_after(END_LIMIT_S):
        await daemon.process.wait()


async def kill_while_it_freezes(daemon: Daemon, vm: Vm) -> None:
    """The agent goes on, and has frozen when nobody is there any more."""
    await vm.tell("echo 2 >/run/slow-freeze")
    since = len(vm.log_lines())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon.ctl, CREATE, 1)
        await vm.wait_line(lambda line: line == HOOK_FREEZE, since=since)
        await kill(daemon)


@each_qemu
async def test_the_next_daemon_thaws(qemu: Qemu, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    async with open_agent_vm(qemu) as vm, vm.monitor() as monitor:
        async with open_attached(tmp_path, vm, qemu) as daemon:
            before = await look_through(monitor, vm, state_dir)
            await kill_while_it_freezes(daemon, vm)
        async with open_attached(tmp_path, vm, qemu) as daemon:
            await wait_writing(vm)
            assert await daemon.json(f"snapshot-list {VM}") == []
            assert await look_through(monitor, vm, state_dir) == before
            assert await daemon.ctl(CREATE) == "Domain snapshot q created\n"
            await wait_writing(vm)
            assert await daemon.ctl(f"domfsthaw {VM}") == "Thawed 0 filesystem(s)\n"


async def test_what_systemd_runs_thaws(tmp_path: Path) -> None:
    async with open_agent_vm(NEWEST) as vm:
        async with open_attached(tmp_path, vm, NEWEST) as daemon:
            await kill_while_it_freezes(daemon, vm)
            await reconcile(daemon)
        await wait_writing(vm)
        assert "HOOK thaw" in vm.log_lines()


@each_qemu
async def test_killed_while_the_guest_is_frozen_and_held(qemu: Qemu, tmp_path: Path) -> None:
    """For the storage's own snapshot of another disk; it has to run to be thawed."""
    state_dir = tmp_path / "state"
    async with open_agent_vm(qemu, [Disk("raw")]) as vm, vm.monitor() as monitor:
        async with open_attached(tmp_path, vm, qemu) as daemon:
            before = await look_through(monitor, vm, state_dir)
            monitor.events.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.ctl, f"{CREATE} --diskspec vdb,snapshot=manual", 1)
                await monitor.wait_event("STOP")
                await kill(daemon)
        assert HOOK_FREEZE in vm.log_lines()
        assert "HOOK thaw" not in vm.log_lines()
        async with open_attached(tmp_path, vm, qemu) as daemon:
            await wait_writing(vm)
            assert await daemon.ctl(f"domstate {VM}") == "running\n"
            assert await look_through(monitor, vm, state_dir) == before


async def test_by_hand(tmp_path: Path) -> None:
    """What the user froze is the user's, also for the next daemon."""
    async with open_agent_vm(NEWEST) as vm:
        async with open_attached(tmp_path, vm, NEWEST) as daemon:
            [found] = await daemon.json(f"domfsinfo {VM}")
            assert found["devices"] == ["/dev/vda"]
            assert await daemon.ctl(f"domfsfreeze {VM}") == "Froze 1 filesystem(s)\n"
            await kill(daemon)
        async with open_attached(tmp_path, vm, NEWEST) as daemon:
            assert "frozen already" in await daemon.ctl(CREATE, 1)
            assert "HOOK thaw" not in vm.log_lines()
            assert await daemon.ctl(f"domfsthaw {VM}") == "Thawed 1 filesystem(s)\n"
            await wait_writing(vm)


async def test_leaving_takes_a_freeze_back(tmp_path: Path) -> None:
    """qsnapctl is interrupted before it could say that it froze."""
    async with (
        open_agent_vm(NEWEST) as vm,
        open_attached(tmp_path, vm, NEWEST) as daemon,
    ):
        await vm.tell("echo 2 >/run/slow-freeze")
        async with trio.open_nursery() as nursery:
            start = partial(trio.run_process, daemon.command(f"domfsfreeze {VM}"), check=False)
            process: trio.Process = await nursery.start(start)
            await vm.wait_line(lambda line: line == HOOK_FREEZE)
            process.send_signal(signal.SIGINT)
        assert process.returncode == 1
        await vm.wait_line(lambda line: line == "HOOK thaw")
        await wait_writing(vm)
