"""RAM as a private mapping of a memory image: the guest notices nothing, and the image neither."""

import json
import os
from pathlib import Path

import pytest

from qsnapd.errors import ImageInvalid
from qsnapd.image import mapped_ram
from qsnapd.image.mapped_ram import Writes
from qsnapd.image.punch import punch
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, Machine, Manifest, Process, Strategy
from tests.guests.pages import check_ram
from tests.harness import Pages, Slots, Vm, open_vm
from tests.real.cases import NEWEST, TWO_DISKS, VM
from tests.real.mapping import resident_bytes, sha256, start_mapped
from tests.rig import open_rig

MEMORY_MIB = 128
RAM_BYTES = MEMORY_MIB << 20
HALF_BYTES = RAM_BYTES // 2

SPELLINGS = {
    "default": (),
    "q35": ("-machine", "q35"),
    "dimm": (  # whose memory is loaded with the rest
        *("-m", f"{MEMORY_MIB},slots=2,maxmem=1G"),
        *("-object", "memory-backend-ram,id=m0,size=64M", "-device", "pc-dimm,memdev=m0"),
    ),
    "balloon": ("-device", "virtio-balloon-pci"),
    "ram": (
        *("-object", f"memory-backend-ram,id=m0,size={MEMORY_MIB}M,merge=off"),
        *("-machine", "q35,memory-backend=m0"),
    ),
    "ram-json": (
        "-object",
        json.dumps({"qom-type": "memory-backend-ram", "id": "m0", "size": RAM_BYTES}),
        *("-machine", "memory-backend=m0"),
    ),
    "memfd": (
        *("-object", f"memory-backend-memfd,id=m0,size={MEMORY_MIB}M"),
        *("-machine", "memory-backend=m0"),
    ),
    "file": (
        *("-object", f"memory-backend-file,id=m0,size={MEMORY_MIB}M,mem-path={{folder}}/ram"),
        *("-machine", "memory-backend=m0"),
    ),
    "numa": (
        *("-object", f"memory-backend-ram,id=m0,size={HALF_BYTES}"),
        *("-object", f"memory-backend-memfd,id=m1,size={HALF_BYTES},share=off"),
        *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
    ),
    "before-4.0-memfd": (
        *("-object", f"memory-backend-memfd,id=m0,size={MEMORY_MIB}M"),
        *("-machine", "pc-i440fx-3.1,memory-backend=m0"),
    ),
    "before-4.0": ("-machine", "pc-i440fx-3.1"),
    "before-4.0-ram": (
        *("-object", f"memory-backend-ram,id=m0,size={MEMORY_MIB}M"),
        *("-machine", "pc-i440fx-3.1,memory-backend=m0"),
    ),
}


async def test_pages_that_became_zero_while_memory_was_saved(tmp_path: Path) -> None:
    """A precopy leaves in the file what such a page was before; nothing of it must be mapped."""
    image = tmp_path / "memory.img"
    guest = Slots(memory_mib=16, dirty_mib_s=50)
    async with open_vm(NEWEST, guest, memory_mib=MEMORY_MIB) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        await save(vm, image)
        machine = await machine_of(vm)
        await vm.kill()
        with image.open("r+b") as file:
            fd = file.fileno()
            os.fsync(fd)
            leave_stale_pages(fd)
            with pytest.raises(ImageInvalid, match="that its bitmap leaves out"):
                mapped_ram.verify(fd, None, Writes.ONCE)
            assert punch(fd)
            mapped_ram.verify(fd, None, Writes.ONCE)
        before, mark = sha256(image), len(vm.log_lines())
        await start_mapped(vm, image, machine)
        await vm.execute("cont")
        await vm.wait_checked(since=mark)
        assert vm.slots_report(mark).fine
        assert sha256(image) == before


async def save(vm: Vm, image: Path) -> None:
    """Save by precopy."""
    async with vm.monitor() as monitor:
        capabilities = [{"capability": c, "state": True} for c in ("events", "mapped-ram")]
        await monitor.execute("migrate-set-capabilities", capabilities=capabilities)
        await monitor.execute("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=5000)
        await monitor.execute("migrate", uri=f"file:{image}")
        status = ""
        while status != "completed":
            status = (await monitor.wait_event("MIGRATION"))["data"]["status"]
            assert status != "failed"


def leave_stale_pages(fd: int) -> None:
    """Do to some pages of zeros what QEMU does if they were not zero when first saved.

    A guest that clears what it frees does it too, but not when a test wants it to.
    """
    block = max(mapped_ram.read_layout(fd).blocks, key=lambda block: block.size_bytes)
    bitmap = os.pread(fd, block.bitmap_size_bytes, block.bitmap_offset_bytes)
    bits = int.from_bytes(bitmap, "little")
    zero = [page for page in range(block.page_count) if not bits >> page & 1]
    assert len(zero) > 1000
    for page in zero[::100]:
        stale = b"was here".ljust(block.page_size_bytes, b".")
        os.pwrite(fd, stale, block.pages_offset_bytes + page * block.page_size_bytes)


async def machine_of(vm: Vm) -> Machine:
    type_ = await vm.execute("qom-get", path="/machine", property="type")
    process = Process(exe=vm.argv[0], argv=vm.argv, cwd="/", uid=0, gid=0)
    return Machine(type=type_.removesuffix("-machine"), ram_bytes=RAM_BYTES, process=process)


async def checkpoint(vm: Vm, state_dir: Path, strategy: Strategy) -> Manifest:
    """Take a checkpoint and end the VM, whose disks then are as they were at that instant."""
    request = CreateRequest(name="s", strategy=strategy, image_format=ImageFormat.MAPPED_RAM)
    async with open_rig(NEWEST, state_dir, **{VM: vm}) as rig:
        manifest = await rig.create(VM, request)
    await vm.kill()
    return manifest


@pytest.mark.parametrize("strategy", Strategy)
async def test_disks_and_memory_of_one_instant(strategy: Strategy, tmp_path: Path) -> None:
    guest = Slots(memory_mib=16, dirty_mib_s=50, disk_pause_us=50)
    async with open_vm(NEWEST, guest, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        manifest = await checkpoint(vm, tmp_path, strategy)
        assert manifest.is_mappable
        assert manifest.memory is not None
        image = Path(manifest.memory.path)
        before, mark = sha256(image), len(vm.log_lines())

        mapped = await start_mapped(vm, image, manifest.machine)
        assert resident_bytes(vm.pid) < RAM_BYTES / 2
        await vm.execute("cont")
        await vm.wait_checked(since=mark)
        assert vm.slots_report(mark).fine
        assert mapped.blocks == ("pc.ram",)
        assert mapped.view_allocated_bytes < 4 << 20
        assert sha256(image) == before


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_every_page(spelling: str, tmp_path: Path) -> None:
    """All RAM is of one instant, and can be written to, however the command line makes it."""
    extra = [word.replace("{folder}", str(tmp_path)) for word in SPELLINGS[spelling]]
    async with open_vm(NEWEST, Pages(), memory_mib=MEMORY_MIB, extra=extra) as vm:
        await vm.wait_line(lambda line: "PASS" in line)
        manifest = await checkpoint(vm, tmp_path, Strategy.STOPPED)
        assert manifest.memory is not None
        image = Path(manifest.memory.path)
        before, mark = sha256(image), len(vm.log_lines())

        await start_mapped(vm, image, manifest.machine)
        dump = tmp_path / "dump"
        await vm.execute("pmemsave", val=0, size=RAM_BYTES, filename=str(dump))
        report = check_ram(dump.read_bytes())
        assert report.one_instant, report
        await vm.execute("cont")
        passes = iter(range(3))
        await vm.wait_line(lambda line: "PASS" in line and next(passes) == 2, since=mark)
        assert vm.pages_report(mark).fine
        assert sha256(image) == before
