"""Every way to take a checkpoint that exists: strategy, image format, QEMU."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, Strategy
from tests.harness import Disk, Pages, Slots, Vm, open_vm
from tests.parts import SYSTEM_QEMU, Qemu, qemu_versions
from tests.rig import Rig, open_rig

TWO_DISKS = (Disk("qcow2", "virtio", "-blockdev"), Disk("raw", "scsi", "-drive"))
BUSY = Slots(memory_mib=8, dirty_mib_s=20, disk_pause_us=50)
"""Dirties memory and writes its disks; looks at all of both about twice a second."""
LAZY = Pages(spin=20000)
"""Up at once; dirties a page now and then, and leaves the disks alone."""
VM = "vm1"


@dataclass(frozen=True)
class Case:
    """One of the ways."""

    qemu: Qemu
    strategy: Strategy
    image_format: ImageFormat

    def __str__(self) -> str:
        return f"{self.qemu}-{self.strategy}-{self.image_format}"

    @property
    def resumed_by_qemu(self) -> bool:
        """QEMU <= 8.2 ends the pause of a background snapshot by itself."""
        return self.strategy is Strategy.BACKGROUND and self.qemu.version == SYSTEM_QEMU

    def request(self, name: str, **more: object) -> CreateRequest:
        """Ask for a checkpoint made in this way."""
        return CreateRequest.model_validate(
            {"name": name, "strategy": self.strategy, "image_format": self.image_format, **more}
        )


def every_kind(*, ide_drive: Literal["qcow2", "raw"]) -> tuple[Disk, ...]:
    """Return a disk of each kind: there is room for three by IDE beside a medium."""
    return (
        Disk("qcow2", "virtio", "-blockdev"),
        Disk("raw", "virtio", "-drive"),
        Disk("qcow2", "scsi", "-blockdev"),
        Disk("raw", "scsi", "-drive"),
        Disk("qcow2", "ide", "-blockdev"),
        Disk(ide_drive, "ide", "-drive"),
        Disk("qcow2", "ide", "-hda"),
        Disk("raw", "virtio", "-blockdev", read_only=True),
    )


def image_formats(qemu: Qemu) -> tuple[ImageFormat, ...]:
    """Return those that *qemu* can write; mapped-ram came with 9.0."""
    newer = () if qemu.version == SYSTEM_QEMU else (ImageFormat.MAPPED_RAM,)
    return (*newer, ImageFormat.STREAM)


CASES = tuple(
    Case(qemu, strategy, image_format)
    for qemu in qemu_versions()
    for strategy in Strategy
    for image_format in image_formats(qemu)
)
STRATEGIES = tuple(case for case in CASES if case.image_format is image_formats(case.qemu)[0])
"""Each strategy on each QEMU, with the format that it takes by itself."""
NEWEST = qemu_versions()[-1]

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_strategy = pytest.mark.parametrize("case", STRATEGIES, ids=str)
each_qemu = pytest.mark.parametrize("qemu", qemu_versions(), ids=str)


@asynccontextmanager
async def open_busy(qemu: Qemu, state_dir: Path) -> AsyncIterator[tuple[Vm, Rig]]:
    """Hold a rig with one VM, whose guest works on memory and two disks."""
    async with open_vm(qemu, BUSY, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(qemu, state_dir, **{VM: vm}) as rig:
            yield vm, rig


@asynccontextmanager
async def open_lazy(
    qemu: Qemu, state_dir: Path, *, disks: Sequence[Disk] = TWO_DISKS, extra: Sequence[str] = ()
) -> AsyncIterator[tuple[Vm, Rig]]:
    """Hold a rig with one VM that is up at once, for what does not need a guest at work."""
    async with (
        open_vm(qemu, LAZY, disks=disks, memory_mib=64, extra=extra) as vm,
        open_rig(qemu, state_dir, **{VM: vm}) as rig,
    ):
        yield vm, rig
