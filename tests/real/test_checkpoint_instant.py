"""Memory and disks of a checkpoint are of one instant: the guests themselves say so."""

import mmap
from pathlib import Path

from qsnapd.model.request import RevertRequest
from tests.guests import pages, slots
from tests.harness import Pages, Vm, open_vm
from tests.real.cases import VM, Case, each_case, open_busy
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
    """The guest dirties it as fast as it can: precopy does not converge by itself."""
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
