"""A checkpoint comes back whole, whatever machine and RAM it is of, and is itself unchanged.

Neither guest finds anything wrong after the restore, and each goes over all that it has: its
memory, and every slot of its disks. The snapshot's files are then compared to the byte.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import pytest
import trio

from qsnapd.errors import Blocked
from qsnapd.model.request import CreateRequest, Memory, RevertRequest
from qsnapd.model.snapshot import ImageFormat, Manifest, Strategy
from tests.guests.pages import PAGE_BYTES
from tests.hardware import Disk, MachineType, Ram
from tests.harness import Pages, Vm, open_vm
from tests.parts import Qemu, qemu_versions
from tests.real.cases import BUSY, TWO_DISKS, VM
from tests.real.covering import covering_cases
from tests.real.test_checkpoint_instant import RAM_MIB, read_ram, two_signs_of_life
from tests.rig import Rig, open_rig

OLDEST, NEWEST = qemu_versions()
BOOT_LIMIT_S = 180.0
"""Linux without KVM, on a host that has more to do."""
THREE_DISKS = (*TWO_DISKS, Disk("qcow2", "virtio", "-drive"))
MIB = 1 << 20


@dataclass(frozen=True)
class Way:
    """One way for memory to get into a file and out again."""

    qemu: Qemu
    image_format: ImageFormat
    memory: Memory

    def __str__(self) -> str:
        return f"{self.qemu}-{self.image_format}-{self.memory}"


WAYS = (
    Way(OLDEST, ImageFormat.STREAM, Memory.EAGER),
    Way(NEWEST, ImageFormat.STREAM, Memory.EAGER),
    Way(NEWEST, ImageFormat.MAPPED_RAM, Memory.EAGER),
    Way(NEWEST, ImageFormat.MAPPED_RAM, Memory.LAZY),
)


@dataclass(frozen=True)
class Cell:
    """One case of the matrix."""

    way: Way
    machine: MachineType
    ram: Ram
    strategy: Strategy
    guest: Literal["slots", "pages"]

    def __str__(self) -> str:
        return f"{self.way}-{self.machine}-{self.ram}-{self.strategy}-{self.guest}"

    @property
    def is_possible(self) -> bool:
        # userfaultfd, which background is made of, knows no files but those of a tmpfs
        on_disk = self.ram in ("memory-backend-file", "shared-file")
        if self.strategy is Strategy.BACKGROUND and on_disk:
            return False
        # what others may look at cannot be this QEMU's private mapping
        return not (self.way.memory is Memory.LAZY and self.ram == "shared-file")


CHOICES = (WAYS, get_args(MachineType), get_args(Ram), tuple(Strategy), ("slots", "pages"))
CELLS = [Cell(*case) for case in covering_cases(CHOICES, lambda case: Cell(*case).is_possible)]


@asynccontextmanager
async def open_cell(cell: Cell, state_dir: Path) -> AsyncIterator[tuple[Vm, Rig]]:
    """Hold a rig with the VM of *cell*, its guest at work."""
    slots = cell.guest == "slots"
    async with open_vm(
        cell.way.qemu,
        BUSY if slots else Pages(),
        disks=THREE_DISKS,
        machine=cell.machine,
        ram=cell.ram,
        memory_mib=128 if slots else RAM_MIB,
    ) as vm:
        await vm.wait_line(
            lambda line: line.startswith("OK" if slots else "PASS"), limit_s=BOOT_LIMIT_S
        )
        async with open_rig(cell.way.qemu, state_dir, **{VM: vm}) as rig:
            yield vm, rig


async def take(rig: Rig, cell: Cell, name: str = "s") -> Manifest:
    manifest = await rig.create(
        VM,
        CreateRequest(name=name, strategy=cell.strategy, image_format=cell.way.image_format),
    )
    assert (manifest.strategy, manifest.image_format) == (cell.strategy, cell.way.image_format)
    assert len(manifest.disks) == len(THREE_DISKS)
    return manifest


async def put_back(
    rig: Rig, vm: Vm, manifest: Manifest, memory: Memory, state: str | None = None
) -> None:
    """Revert to the snapshot; its memory got there in the wanted way."""
    request = {"name": manifest.name, "state": state, "memory": memory, "discard": True}
    await rig.revert(VM, RevertRequest.model_validate(request))
    assert await is_mapped(vm, manifest) is (memory is Memory.LAZY)


async def is_mapped(vm: Vm, manifest: Manifest) -> bool:
    """Is guest RAM a mapping of the snapshot's image?"""
    assert manifest.memory is not None
    return manifest.memory.path in await trio.Path(f"/proc/{vm.pid}/maps").read_text()


async def digests(manifest: Manifest) -> Mapping[str, str]:
    """Hash all files of a snapshot: its memory, and the images of its disks."""
    assert manifest.memory is not None
    paths = {manifest.memory.path, *(file.path for disk in manifest.disks for file in disk.chain)}
    return {path: await trio.to_thread.run_sync(_sha256, path) for path in sorted(paths)}


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize("cell", CELLS, ids=str)
async def test_guest_finds_nothing_wrong_and_the_snapshot_is_unchanged(
    cell: Cell, tmp_path: Path
) -> None:
    await {"slots": check_slots, "pages": check_pages}[cell.guest](cell, tmp_path)


async def check_slots(cell: Cell, folder: Path) -> None:
    async with open_cell(cell, folder) as (vm, rig):
        manifest = await take(rig, cell)
        before = await digests(manifest)
        taken_before_ms = await two_signs_of_life(vm)  # what is to be undone
        assert vm.slots_report().fine

        mark = len(vm.log_lines())
        await put_back(rig, vm, manifest, cell.way.memory)
        reverted = len(vm.log_lines())  # what was said until here may be the old guest's
        await vm.wait_checked(since=reverted)
        assert vm.slots_report(mark).bad_lines == ()
        assert vm.slots_report(reverted).ok_lines[0].uptime_ms < taken_before_ms
        assert await digests(manifest) == before


async def check_pages(cell: Cell, folder: Path) -> None:
    async with open_cell(cell, folder) as (vm, rig):
        manifest = await take(rig, cell)
        taken_before = await passes(vm)
        before = await digests(manifest)
        for _ in range(2):  # the second time after a restored guest wrote all over its RAM
            await put_back(rig, vm, manifest, cell.way.memory, "paused")
            report = await read_ram(vm, folder / "dump")
            assert report.pages == (RAM_MIB - 3) * MIB // PAGE_BYTES
            assert report.one_instant
            assert report.counters[0] <= taken_before
            mark = len(vm.log_lines())
            await rig.host.resume(VM)
            await passes(vm, 2)
            assert vm.pages_report(mark).fine
            assert await digests(manifest) == before


async def passes(vm: Vm, count: int = 1) -> int:
    """Wait until the guest has gone over its RAM *count* times; return its counter."""
    for _ in range(count):
        await vm.wait_line(lambda line: line.startswith("PASS"), since=len(vm.log_lines()))
    return vm.pages_report().passes[-1]


EVERY_RAM = [
    pytest.param(way, ram, id=f"{way}-{ram}")
    for way, ram in product(WAYS, get_args(Ram))
    if not (way.memory is Memory.LAZY and ram == "shared-file")
]


@pytest.mark.parametrize(("way", "ram"), EVERY_RAM)
async def test_ram_comes_back_to_the_byte(way: Way, ram: Ram, tmp_path: Path) -> None:
    """Zeros too, on top of what a file may still hold of the state that is left."""
    async with open_vm(way.qemu, Pages(), ram=ram, memory_mib=RAM_MIB, extra=["-S"]) as vm:
        await vm.execute("cont")
        await vm.execute("stop")  # the firmware has only begun: nearly all of RAM is zeros
        async with open_rig(way.qemu, tmp_path, **{VM: vm}) as rig:
            before = await dump_ram(vm)
            assert before.count(0) > len(before) // 2
            request = CreateRequest(name="s", image_format=way.image_format)
            manifest = await rig.create(VM, request)
            await rig.host.resume(VM)
            await passes(vm)
            await put_back(rig, vm, manifest, way.memory)
            assert rig.host.vm(VM).state == "paused"
            after = await dump_ram(vm)
    assert differing_pages(before, after) == []


def differing_pages(ram: bytes, other: bytes) -> list[int]:
    """Return the addresses of pages that are not the same in both."""
    pages = [slice(at, at + PAGE_BYTES) for at in range(0, len(ram), PAGE_BYTES)]
    return [page.start for page in pages if ram[page] != other[page]]


async def dump_ram(vm: Vm) -> bytes:
    path = vm.folder / "dump"
    await vm.execute("pmemsave", val=0, size=RAM_MIB * MIB, filename=str(path))
    return path.read_bytes()


async def test_shared_ram_is_never_a_private_mapping(tmp_path: Path) -> None:
    """Asked for, it is refused while the VM runs; by itself qsnapd loads all of it."""
    async with (
        open_vm(NEWEST, Pages(), ram="shared-file", memory_mib=RAM_MIB) as vm,
        open_rig(NEWEST, tmp_path, **{VM: vm}) as rig,
    ):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        pid = vm.pid
        with pytest.raises(Blocked, match="share=on"):
            await rig.revert(VM, RevertRequest(name="s", memory=Memory.LAZY))
        assert vm.pid == pid
        await rig.revert(VM, RevertRequest(name="s", discard=True))
        assert not await is_mapped(vm, manifest)
        await passes(vm, 2)
        assert vm.pages_report().fine


async def test_snapshots_of_a_vm_whose_ram_is_a_mapping(tmp_path: Path) -> None:
    """Each is whole by itself: it holds what the guest has written and what it has not."""
    cell = Cell(WAYS[-1], "pc", "default", Strategy.PRECOPY, "slots")
    async with open_cell(cell, tmp_path) as (vm, rig):
        first = await take(rig, cell, "first")
        await put_back(rig, vm, first, Memory.LAZY)
        live = await rig.create(VM, CreateRequest(name="live", live=True))
        before = [await digests(manifest) for manifest in (first, live)]
        for manifest in (live, first, live):
            mark = len(vm.log_lines())
            await put_back(rig, vm, manifest, Memory.LAZY)
            await vm.wait_checked(since=len(vm.log_lines()))
            assert vm.slots_report(mark).bad_lines == ()
        assert [await digests(manifest) for manifest in (first, live)] == before
