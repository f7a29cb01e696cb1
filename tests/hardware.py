"""What a test's VM is made of, spelled as QEMU's users spell it: machine, RAM, disks.

Not everything runs everywhere: the slots guest has no driver for the disks that are "ide" on
q35 (they are on AHCI there), and microvm has neither ide nor PCI.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MachineType = Literal["pc", "q35", "microvm"]
Ram = Literal["default", "memfd", "memory-backend-ram", "memory-backend-file", "shared-file"]
"""Where the guest's RAM is: left to QEMU, or an object that `-machine` names.

QEMU shares a memfd with whom it hands it to, but a file only if told so; what the guest wrote
then stays in the file when QEMU has ended.
"""

RAM_ID = "ram"


@dataclass(frozen=True)
class Disk:
    """One disk to give to the VM."""

    format: Literal["qcow2", "raw"] = "qcow2"
    interface: Literal["virtio", "scsi", "ide"] = "virtio"
    spelling: Literal["-blockdev", "-drive", "-hda"] = "-blockdev"
    """-hda and its like are always ide."""
    size_mib: int = 64
    read_only: bool = False


def machine_arguments(
    machine: MachineType, ram: Ram, *, memory_mib: int, folder: Path, firmware: Path | None = None
) -> list[str]:
    """Spell machine and RAM; a file that holds the RAM is "ram" in *folder*."""
    backend = {
        "default": None,
        "memfd": "memory-backend-memfd",
        "memory-backend-ram": "memory-backend-ram",
        "memory-backend-file": f"memory-backend-file,mem-path={folder}/ram",
        "shared-file": f"memory-backend-file,mem-path={folder}/ram,share=on",
    }[ram]
    words = ["-m", str(memory_mib)]
    if backend is not None:
        words += ["-object", f"{backend},id={RAM_ID},size={memory_mib}M"]
        machine_options = f"{machine},memory-backend={RAM_ID}"
    else:
        machine_options = machine
    if firmware is not None:
        words += ["-bios", str(firmware)]
    return ["-machine", machine_options, *words]


def boot_disk_arguments(machine: MachineType, image: Path) -> list[str]:
    """Spell a read-only disk that the firmware boots from."""
    return [
        *("-blockdev", f"driver=file,node-name=boot,filename={image},read-only=on"),
        *("-device", f"{_virtio('blk', machine)},drive=boot,bootindex=0"),
    ]


def disks_arguments(
    machine: MachineType, disks: Sequence[Disk], images: Sequence[Path]
) -> list[str]:
    """Spell *disks*, with *images* in the same order."""
    letters = iter("abcd")
    fixed: list[str] = []  # first: these take the places that others may fill as they are free
    others: list[str] = []
    for number, (disk, image) in enumerate(zip(disks, images, strict=True)):
        if disk.spelling == "-hda":
            fixed += [f"-hd{next(letters)}", str(image)]
        else:
            others += _disk_arguments(machine, number, disk, image)
    return fixed + others


def _disk_arguments(machine: MachineType, number: int, disk: Disk, image: Path) -> list[str]:
    """Spell one disk: its node is "disk0" or its drive "drive0", its device "device0"."""
    read_only = "on" if disk.read_only else "off"
    if disk.spelling == "-drive":
        name = f"drive{number}"
        source = f"file={image},format={disk.format},readonly={read_only},id={name}"
        # QEMU adds the device by itself, but for virtio always a PCI one
        if disk.interface != "scsi" and machine != "microvm":
            return ["-drive", f"{source},if={disk.interface}"]
        backend = ["-drive", f"{source},if=none"]
    else:
        name = f"disk{number}"
        file = f"file.driver=file,file.filename={image}"
        backend = [
            "-blockdev",
            f"driver={disk.format},node-name={name},read-only={read_only},{file}",
        ]
    common = f"drive={name},id=device{number}"
    match disk.interface:
        case "virtio":
            return [*backend, "-device", f"{_virtio('blk', machine)},{common}"]
        case "ide":
            return [*backend, "-device", f"ide-hd,{common}"]
        case "scsi":
            controller = f"{_virtio('scsi', machine)},id=scsi{number}"
            device = f"scsi-hd,bus=scsi{number}.0,{common}"
            return ["-device", controller, *backend, "-device", device]


def _virtio(kind: str, machine: MachineType) -> str:
    """Name a virtio device on the bus that *machine* has for it."""
    return f"virtio-{kind}-{'device' if machine == 'microvm' else 'pci'}"
