"""The whole, from outside: a daemon, the command line, a real VM."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.harness import Disk, Pages, Slots, Vm, open_vm
from tests.parts import Qemu, qemu_versions
from tests.system.processes import open_daemon, reconcile

NEWEST = qemu_versions()[-1]


@pytest.fixture(params=qemu_versions(), ids=str)
def qemu(request: pytest.FixtureRequest) -> Qemu:
    assert isinstance(request.param, Qemu)
    return request.param


@pytest.fixture
async def vm(qemu: Qemu) -> AsyncIterator[Vm]:
    async with open_vm(qemu, Slots(dirty_mib_s=20), disks=[Disk()]) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        yield vm


async def test_a_day_in_the_life(qemu: Qemu, vm: Vm, tmp_path: Path) -> None:
    async with open_daemon(tmp_path, {"vm1": vm}, qemu.img) as daemon:
        await daemon.wait_attached("vm1")
        assert await daemon.ctl("domstate vm1") == "running\n"
        [disk] = await daemon.json("domblklist vm1")
        assert disk["path"] == str(vm.disks[0])

        said = await daemon.ctl("snapshot-create-as vm1 s1 --live")
        assert said == "Domain snapshot s1 created\n"
        assert await daemon.ctl("snapshot-create-as vm1 s2") == "Domain snapshot s2 created\n"
        assert await daemon.ctl("snapshot-list vm1 --tree") == "s1\n  |\n  +- s2\n\n"
        info = await daemon.json("snapshot-info vm1 --current")
        assert (info["name"], info["parent"], info["strategy"]) == ("s2", "s1", "stopped")
        assert info["paused_ms"] > 0
        assert info["memory"]["allocated_bytes"] > 0

        mark = len(vm.log_lines())
        said = await daemon.ctl("snapshot-revert vm1 s1")
        first, kept = said.splitlines()
        assert first == "Domain snapshot s1 reverted"
        assert kept.startswith("The state before is kept as snapshot before-s1-")
        await vm.wait_checked(since=mark)
        assert vm.slots_report(mark).fine
        assert (await daemon.json("domstate vm1"))["state"] == "running"


@pytest.mark.parametrize("live", ["", "--live"])
async def test_everybody_sees_why_the_guest_stands(
    qemu: Qemu, vm: Vm, tmp_path: Path, live: str
) -> None:
    seen: list[str] = []
    async with open_daemon(tmp_path, {"vm1": vm}, qemu.img) as daemon:
        await daemon.wait_attached("vm1")
        begun = trio.Event()

        async def watch() -> None:
            seen.extend(await daemon.watch(until="created", begun=begun))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await begun.wait()
            await daemon.ctl(f"snapshot-create-as vm1 s1 {live}")
    assert seen.index("Suspended") < seen.index("Resumed")
    assert {state for state in seen if state.startswith("paused")} == {"paused (creating snapshot)"}


async def test_errors_reach_the_person(tmp_path: Path) -> None:
    async with (
        open_vm(NEWEST, Pages()) as vm,
        open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon,
    ):
        await daemon.wait_attached("vm1")
        assert (await daemon.json("domstate vm9", status=1))["code"] == "unknown-vm"
        assert (await daemon.json("snapshot-info vm1 s9", status=1))["code"] == "unknown-snapshot"
        refused = await daemon.json("snapshot-create-as vm1 s1 --diskspec vdz,file=/x", status=1)
        assert "vdz" in refused["message"]
        assert refused["effect"] == "none"
        assert await daemon.json("snapshot-list vm1") == []


async def test_a_killed_daemon_leaves_no_guest_paused(tmp_path: Path) -> None:
    async with open_vm(NEWEST, Pages(), memory_mib=512) as vm:
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon:
            await daemon.wait_attached("vm1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.ctl, "snapshot-create-as vm1 s1", 1)
                while (await vm.execute("query-status"))["running"]:
                    pass
                daemon.process.kill()
        await reconcile(daemon)
        assert (await vm.execute("query-status"))["running"]
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon:
            await daemon.wait_attached("vm1")
            assert await daemon.json("snapshot-list vm1") == []
            assert await daemon.ctl("domstate vm1") == "running\n"
            await daemon.ctl("snapshot-create-as vm1 s1 --live")
