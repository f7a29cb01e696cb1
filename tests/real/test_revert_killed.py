"""The daemon is killed in the middle of a revert: the next one finishes it, or it never was."""

from pathlib import Path

import pytest
import trio

from tests.harness import Vm, open_vm
from tests.parts import Qemu
from tests.real.cases import BUSY, LAZY, TWO_DISKS, VM, each_qemu
from tests.real.test_killed import END_LIMIT_S, open_attached
from tests.system.processes import Daemon, reconcile


async def kill_while_reverting(vm: Vm, daemon: Daemon, event: str) -> None:
    """Revert, and kill the daemon when the old QEMU says *event*."""

    async def revert() -> None:
        await daemon.ctl(f"snapshot-revert {VM} s", 1)

    async with vm.monitor() as monitor, trio.open_nursery() as nursery:
        nursery.start_soon(revert)
        await monitor.wait_event(event)
        daemon.process.kill()
        with trio.fail_after(END_LIMIT_S):
            await daemon.process.wait()


async def until_running_again(daemon: Daemon) -> None:
    with trio.fail_after(END_LIMIT_S):
        while (await daemon.ctl(f"domstate {VM}")) != "running\n":
            pass  # each question takes a moment


@each_qemu
@pytest.mark.parametrize("event", ["STOP", "SHUTDOWN"])
async def test_daemon_killed(qemu: Qemu, event: str, tmp_path: Path) -> None:
    """While the present state is kept, or when its QEMU has just been told to end."""
    async with open_vm(qemu, BUSY, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_attached(tmp_path, vm, qemu) as daemon:
            await daemon.ctl(f"snapshot-create-as {VM} s")
            await vm.wait_checked()
            pid = vm.pid
            await kill_while_reverting(vm, daemon, event)
        mark = len(vm.log_lines())
        async with open_attached(tmp_path, vm, qemu) as daemon:
            await until_running_again(daemon)
            await vm.wait_checked(since=mark)
            assert vm.slots_report(mark).bad_lines == ()
            assert (vm.pid != pid) == (event == "SHUTDOWN")
            current = (await daemon.ctl(f"snapshot-current {VM} --name")).strip()
            assert current == "s"
            left = {path.name for path in (tmp_path / "state" / VM).iterdir()}
            assert not {name for name in left if "ing.json" in name or "partial" in name}
            await daemon.ctl(f"snapshot-revert {VM} s")


@each_qemu
async def test_guest_is_resumed_behind_a_killed_daemon(qemu: Qemu, tmp_path: Path) -> None:
    """By what systemd runs then; the rest is left to the next daemon."""
    async with (
        open_vm(qemu, LAZY, disks=TWO_DISKS, memory_mib=64) as vm,
        open_attached(tmp_path, vm, qemu) as daemon,
    ):
        await daemon.ctl(f"snapshot-create-as {VM} s")
        await kill_while_reverting(vm, daemon, "STOP")
        await reconcile(daemon)
        assert (await vm.execute("query-status"))["running"]
