"""The guests are the proof of everything else, so first: do they notice what they should?"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.guests import pages, slots
from tests.harness import Disk, Pages, Slots, Vm, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu, qemu_versions
from tests.real.cases import every_kind

each_qemu = pytest.mark.parametrize("qemu", qemu_versions(), ids=str)
any_qemu = pytest.mark.parametrize("qemu", qemu_versions()[-1:], ids=str)

MIB = 1 << 20
RAM_MIB = 64
SLOT_BYTES = 4096
SLOT_STRIDE_BYTES = 64 * MIB // 256
"""slots.c spreads its 256 slots over the disk."""


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        yield view


def ram_in(path: Path, size_mib: int) -> list[str]:
    """Arguments that put the guest's RAM in a file, where the test can change it."""
    backend = f"memory-backend-file,id=ram,size={size_mib}M,mem-path={path},share=on"
    return ["-object", backend, "-machine", "memory-backend=ram"]


@each_qemu
async def test_ram_of_a_stopped_pages_guest_is_of_one_instant(qemu: Qemu, tmp_path: Path) -> None:
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB) as vm:
        await vm.wait_line(lambda line: line.startswith("PASS 00000010"))
        await vm.execute("stop")
        dump = tmp_path / "ram"
        await vm.execute("pmemsave", val=0, size=RAM_MIB * MIB, filename=str(dump))
        assert vm.pages_report().fine
    with mapped(dump) as raw:
        report = pages.check_ram(raw)
    assert report.one_instant
    assert report.pages == (RAM_MIB - 3) * MIB // pages.PAGE_BYTES
    assert report.counters[0] >= 0x10


@any_qemu
async def test_pages_guest_finds_a_page_of_another_time(qemu: Qemu, tmp_path: Path) -> None:
    address = 33 * MIB
    extra = ram_in(tmp_path / "ram", RAM_MIB)
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB, extra=extra) as vm:
        await vm.wait_line(lambda line: line.startswith("PASS"))
        await vm.execute("stop")
        assert vm.pages_report().fine
        with mapped(tmp_path / "ram") as ram:
            tag, counter = struct.unpack_from("<II", ram, address)
            struct.pack_into("<II", ram, address, tag, counter - 1)
            assert not pages.check_ram(ram).one_instant
        await vm.execute("cont")
        assert await vm.wait_line(lambda line: "TORN" in line) == f"TORN {address:08x}"
        assert not vm.pages_report().fine


@any_qemu
async def test_pages_guest_can_be_slowed_down(qemu: Qemu) -> None:
    async with open_vm(qemu, Pages(spin=100_000), memory_mib=RAM_MIB) as vm:
        await vm.wait_line(lambda line: line.startswith("PASS 00000001"))
        assert len(vm.pages_report().passes) == 1


def dump_of(*counters: int) -> bytearray:
    """RAM with one page for each of *counters*; nothing of it was written if negative."""
    ram = bytearray(pages.BASE)
    for counter in counters:
        tag = 0 if counter < 0 else len(ram) ^ pages.TAG
        ram += struct.pack("<II", tag, abs(counter)).ljust(pages.PAGE_BYTES, b"\0")
    return ram + bytes(pages.LEFT_AT_THE_TOP_BYTES)


@pytest.mark.parametrize(
    ("counters", "one_instant"),
    [
        ((7, 7, 7), True),
        ((8, 8, 7), True),
        ((8, 7, 7), True),
        ((7, 8, 8), False),
        ((8, 7, 8), False),
        ((9, 7, 7), False),
        ((9, 8, 7), False),
        ((8, -8, 7), False),
        ((), False),
    ],
)
def test_check_ram_knows_one_instant(counters: tuple[int, ...], one_instant: bool) -> None:
    assert pages.check_ram(dump_of(*counters)).one_instant is one_instant


EVERY_KIND = every_kind(ide_drive="qcow2")


@each_qemu
async def test_slots_guest_writes_every_kind_of_disk_and_is_content(qemu: Qemu) -> None:
    async with open_vm(qemu, Slots(dirty_mib_s=20), disks=EVERY_KIND) as vm:
        await vm.wait_checked()
        report = vm.slots_report()
        pids = vm.pids()
    assert report.fine
    assert report.ready is not None
    assert report.ready.disks == len(EVERY_KIND) - 1  # it leaves out the read-only one
    assert len(pids) == 1
    assert vm.pids() == []
    assert not vm.folder.exists()


@any_qemu
async def test_slots_guest_finds_what_is_wrong(qemu: Qemu, tmp_path: Path) -> None:
    ram_file = tmp_path / "ram"
    guest = Slots(memory_mib=4, dirty_mib_s=20, disk_pause_us=100)
    extra = ram_in(ram_file, 128)
    async with open_vm(qemu, guest, disks=[Disk("raw")], extra=extra) as vm:

        async def complaint(word: str) -> list[str]:
            """Let the guest run until it complains; return the complaint's words."""
            since = len(vm.log_lines())
            await vm.execute("cont")
            line = await vm.wait_line(slots.is_complaint, since=since)
            assert line.startswith(word)
            await vm.wait_checked(since=len(vm.log_lines()))
            await vm.execute("stop")
            return line.split()

        [image] = vm.disks
        await vm.wait_checked()
        await vm.execute("stop")
        older = image.read_bytes()
        await vm.execute("cont")
        await vm.wait_checked()
        assert vm.slots_report().fine
        await vm.execute("stop")

        image_now = image.read_bytes()
        assert older != image_now
        with mapped(image) as disk:
            disk[:] = older
        _, name, slot, on_disk, in_memory = await complaint("LOST")
        assert name == "vda"
        assert int(on_disk) < int(in_memory)
        assert 0 <= int(slot) < 256

        with mapped(image) as disk:
            plant_future_slot(disk, 77)
        _, _, slot, on_disk, in_memory = await complaint("FUTURE")
        assert (slot, int(on_disk)) == ("77", int(in_memory) + 5)

        with mapped(image) as disk:
            disk[78 * SLOT_STRIDE_BYTES + 2000] ^= 1
        assert await complaint("TORN vda") == ["TORN", "vda", "78"]

        with mapped(ram_file) as ram:
            generation = plant_old_page(ram, 9)
        _, where, page, found, _ = await complaint("TORN mem")
        assert (where, page, found) == ("mem", "9", f"{generation}/{generation}")


@any_qemu
@pytest.mark.parametrize("one_instant", [True, False], ids=["one-instant", "disk-before-memory"])
async def test_slots_guest_tells_a_checkpoint_from_a_torn_one(
    qemu: Qemu, one_instant: bool
) -> None:
    disks = [Disk("qcow2", "virtio"), Disk("raw", "scsi")]
    async with open_vm(qemu, Slots(dirty_mib_s=20), disks=disks) as vm:
        await vm.wait_checked()
        async with vm.monitor() as monitor:
            if not one_instant:
                await pivot(vm, monitor)
                await vm.wait_checked()  # writes that memory knows of and the frozen disk lacks
            await monitor.execute("stop")
            if one_instant:
                await pivot(vm, monitor)
            await enable_migration_events(monitor)
            await monitor.execute("migrate", uri=f"file:{vm.folder}/memory")
            await migrated(monitor)
        assert vm.slots_report().fine

        await vm.kill()
        said = len(vm.log_lines())
        await trio.run_process([*vm.argv, "-incoming", "defer"])  # the images are the frozen ones
        async with vm.monitor() as monitor:
            await enable_migration_events(monitor)
            await monitor.execute("migrate-incoming", uri=f"file:{vm.folder}/memory")
            await migrated(monitor)
            await monitor.execute("cont")
        await vm.wait_checked(since=said)
        report = vm.slots_report(since=said)
    assert report.fine is one_instant
    assert all(line.startswith("LOST ") for line in report.bad_lines)


async def pivot(vm: Vm, monitor: Monitor) -> None:
    """Put a new overlay over every disk, in one transaction."""
    actions = [
        {
            "type": "blockdev-snapshot-sync",
            "data": {
                "node-name": f"disk{n}",
                "snapshot-file": f"{image}.overlay",
                "snapshot-node-name": f"overlay{n}",
                "format": "qcow2",
            },
        }
        for n, image in enumerate(vm.disks)
    ]
    await monitor.execute("transaction", actions=actions)


async def enable_migration_events(monitor: Monitor) -> None:
    capability = {"capability": "events", "state": True}
    await monitor.execute("migrate-set-capabilities", capabilities=[capability])


async def migrated(monitor: Monitor) -> None:
    """Wait until memory has been saved or loaded."""
    while (status := (await monitor.wait_event("MIGRATION"))["data"]["status"]) != "completed":
        assert status != "failed"


def plant_future_slot(disk: mmap.mmap, number: int) -> None:
    """Give slot *number* a sequence number that has not been written yet."""
    at = number * SLOT_STRIDE_BYTES
    words = list(struct.unpack_from("<512Q", disk, at))
    words[3] += 5
    checksum = 0xCBF29CE484222325
    for word in words[:-1]:
        checksum = (checksum ^ word) * 0x100000001B3 % 2**64
    disk[at : at + SLOT_BYTES] = struct.pack("<512Q", *words[:-1], checksum)


def plant_old_page(ram: mmap.mmap, index: int) -> int:
    """Put page *index* of the dirtied memory back by two generations; return its new one."""
    for at in range(0, len(ram), 4096):
        head, tail = struct.unpack_from("<QQ", ram, at), struct.unpack_from("<QQ", ram, at + 4080)
        if head == tail and head[0] == index and head[1] > 2:
            generation: int = head[1] - 2
            for end in (at, at + 4080):
                struct.pack_into("<QQ", ram, end, index, generation)
            return generation
    raise AssertionError(f"page {index} is not in RAM")
