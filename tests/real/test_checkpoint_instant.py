"""Memory and disks of a checkpoint are of one instant: the guests themselves say so."""

import mmap
from pathlib import Path

import pytest
import trio

from qsnapd.errors import CaptureFailed, Effect
from qsnapd.model.request import CreateRequest, OnLimit, RevertRequest
from qsnapd.model.snapshot import Strategy
from tests.guests import pages, slots
from tests.harness import Disk, Pages, Vm, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.real.cases import BUSY, NEWEST, TWO_DISKS, VM, Case, each_case, each_qemu, open_busy
from tests.real.footprint import look_through
from tests.real.test_guests import migrated, pivot
from tests.rig import open_rig

ROUNDS = 3
SIGN_EVERY_MS = 500
RAM_MIB = 64
MIB = 1 << 20


async def two_signs_of_life(vm: Vm) -> int:
    """Wait until the guest has worked for a while; return how long it has been up, in ms."""
    for _ in range(2):
        line = await vm.wait_line(lambda line: line.startswith("OK"), since=len(vm.log_lines()))
    okay = slots.parse_okay(line)
    assert okay is not None
    return okay.uptime_ms


@each_case
async def test_three_in_a_row_all_restore(case: Case, tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(ROUNDS)]
    taken_after_ms: dict[str, int] = {}
    taken_before_ms: dict[str, int] = {}
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        up_ms = await two_signs_of_life(vm)
        for name in names:
            taken_after_ms[name] = up_ms
            manifest = await rig.create(VM, case.request(name))
            taken_before_ms[name] = up_ms = await two_signs_of_life(vm)
            assert (manifest.strategy, manifest.image_format) == (case.strategy, case.image_format)
            assert manifest.paused_ms > 0
            assert {disk.target for disk in manifest.disks} == {"vda", "sda"}
        assert vm.slots_report().fine
        assert [m.parent for m in rig.host.snapshots(VM)] == [None, *names[:-1]]

        for name in names:
            mark = len(vm.log_lines())
            await rig.revert(VM, RevertRequest(name=name))
            reverted = len(vm.log_lines())  # what was said until here may be the old guest's
            await vm.wait_checked(since=reverted)
            assert vm.slots_report(mark).bad_lines == ()
            up_ms = vm.slots_report(reverted).ok_lines[0].uptime_ms
            assert taken_after_ms[name] < up_ms < taken_before_ms[name] + SIGN_EVERY_MS
            assert rig.host.current(VM) == name
            assert rig.host.vm(VM).reason == "from snapshot"


@each_case
async def test_all_of_ram_is_of_one_instant(case: Case, tmp_path: Path) -> None:
    """The guest dirties it as fast as it can."""
    async with open_vm(case.qemu, Pages(), memory_mib=RAM_MIB) as vm:
        await vm.wait_line(lambda line: line.startswith("PASS 00000004"))
        async with open_rig(case.qemu, tmp_path / "state", **{VM: vm}) as rig:
            manifest = await rig.create(VM, case.request("s"))
            assert manifest.memory is not None
            assert manifest.paused_ms > 0
            await rig.revert(VM, RevertRequest(name="s", state="paused"))
            report = await read_ram(vm, tmp_path / "ram")
            assert report.pages == (RAM_MIB - 3) * MIB // pages.PAGE_BYTES
            assert report.one_instant
            mark = len(vm.log_lines())
            await rig.host.resume(VM)
            await vm.wait_line(lambda line: line.startswith("PASS"), since=mark)
            await vm.wait_line(lambda line: line.startswith("PASS"), since=len(vm.log_lines()))
            assert vm.pages_report(mark).fine


async def read_ram(vm: Vm, dump: Path) -> pages.PagesReport:
    await vm.execute("pmemsave", val=0, size=RAM_MIB * MIB, filename=str(dump))
    with dump.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as raw:
        return pages.check_ram(raw)


def give_precopy_no_time(on_limit: OnLimit) -> CreateRequest:
    """Return a request that reaches its limit at the first look."""
    return CreateRequest(
        name="s", strategy=Strategy.PRECOPY, precopy_limit_s=0.001, on_limit=on_limit
    )


@each_qemu
async def test_precopy_at_its_limit_gives_up(qemu: Qemu, tmp_path: Path) -> None:
    async with open_vm(qemu, Pages(), disks=TWO_DISKS, memory_mib=RAM_MIB) as vm:
        await vm.wait_line(lambda line: line.startswith("PASS 00000004"))
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig, vm.monitor() as monitor:
            before = await look_through(monitor, vm, tmp_path)
            with pytest.raises(CaptureFailed, match="did not converge") as failed:
                await rig.create(VM, give_precopy_no_time(OnLimit.ABORT))
            assert failed.value.effect is Effect.ROLLED_BACK
            assert await look_through(monitor, vm, tmp_path) == before
            assert "STOP" not in {event["event"] for event in monitor.events}


@each_qemu
async def test_precopy_at_its_limit_stops_the_guest(qemu: Qemu, tmp_path: Path) -> None:
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB) as vm:
        await vm.wait_line(lambda line: line.startswith("PASS 00000004"))
        async with open_rig(qemu, tmp_path / "state", **{VM: vm}) as rig:
            manifest = await rig.create(VM, give_precopy_no_time(OnLimit.STOP))
            assert manifest.paused_ms > 0
            assert rig.host.vm(VM).state == "running"
            await rig.revert(VM, RevertRequest(name="s", state="paused"))
            assert (await read_ram(vm, tmp_path / "ram")).one_instant


async def save(monitor: Monitor, vm: Vm, *capabilities: str) -> None:
    """Save memory by hand, and let the guest go on."""
    states = [{"capability": name, "state": True} for name in ("events", *capabilities)]
    await monitor.execute("migrate-set-capabilities", capabilities=states)
    await monitor.execute("migrate", uri=f"file:{vm.folder}/memory")
    await migrated(monitor)
    # "completed" comes a moment before QEMU has let go of the run state; no event says so
    while (await monitor.execute("query-status"))["status"] == "finish-migrate":
        pass
    await monitor.execute("cont")


@pytest.mark.parametrize(
    "capabilities", [(), ("background-snapshot",)], ids=["precopy", "background"]
)
@pytest.mark.parametrize("complaint", ["LOST", "FUTURE"])
async def test_guest_notices_what_a_wrong_order_does(
    capabilities: tuple[str, ...], complaint: str
) -> None:
    """Live, by hand, and the guest at work between the pivot and the saving of memory."""
    async with open_vm(NEWEST, BUSY, disks=[Disk("qcow2"), Disk("raw", "scsi")]) as vm:
        await vm.wait_checked()
        async with vm.monitor() as monitor:
            if complaint == "LOST":
                await pivot(vm, monitor)
                await vm.wait_checked()
                await save(monitor, vm, *capabilities)
            else:
                await save(monitor, vm, *capabilities)
                await vm.wait_checked()
                await pivot(vm, monitor)
        assert vm.slots_report().fine

        await vm.kill()
        mark = len(vm.log_lines())
        await trio.run_process([*vm.argv, "-incoming", f"file:{vm.folder}/memory"])
        await vm.wait_checked(since=mark)
        complaints = vm.slots_report(mark).bad_lines
    assert complaints
    assert all(line.startswith(complaint) for line in complaints)
