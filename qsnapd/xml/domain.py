"""The `<domain>` of a snapshot: the VM as far as a manifest tells, and the manifest itself.

For people and tools that know libvirt; qsnapd reads nothing of it back but the manifest.
"""

import json
import os
import re

from lxml import etree

from qsnapd.model.snapshot import DiskLayer, Manifest
from qsnapd.xml.reading import Element
from qsnapd.xml.writing import add, add_source, is_device, is_target

NAMESPACE = "urn:qsnapd:snapshot"
MANIFEST_TAG = f"{{{NAMESPACE}}}manifest"

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MACHINE = re.compile(r"[a-zA-Z0-9_.\-]+")
_PROGRAM = re.compile(r"qemu-system-(x86_64|i386|aarch64|riscv64|ppc64|s390x)")
_ARCHITECTURES = {"i386": "i686"}
_FORMATS = ("raw", "qcow2", "qed", "vmdk", "vpc", "vdi", "luks", "qcow")
_BUSES = {"vd": "virtio", "sd": "scsi", "hd": "ide", "fd": "fdc"}


def add_domain(parent: Element, manifest: Manifest) -> None:
    """Append the VM in its inactive form, its disks being the frozen images."""
    machine = manifest.machine
    domain = add(parent, "domain", type="kvm" if _uses_kvm(machine.process.argv) else "qemu")
    add(domain, "name", manifest.vm)
    if machine.uuid is not None and _UUID.fullmatch(machine.uuid):
        add(domain, "uuid", machine.uuid)
    _add_manifest(domain, manifest)
    add(domain, "memory", str(machine.ram_bytes), unit="b")
    known = _PROGRAM.match(os.path.basename(machine.process.exe))
    kind = machine.type if _MACHINE.fullmatch(machine.type) else None
    arch = _ARCHITECTURES.get(known[1], known[1]) if known else None
    add(add(domain, "os"), "type", "hvm", arch=arch, machine=kind if arch else None)
    devices = add(domain, "devices")
    add(devices, "emulator", machine.process.exe)
    for disk in (*manifest.disks, *manifest.left_out):
        if is_target(disk.target):
            _add_disk(devices, disk)


def _add_manifest(domain: Element, manifest: Manifest) -> None:
    metadata = add(domain, "metadata")
    held = etree.SubElement(metadata, MANIFEST_TAG, nsmap={"qsnapd": NAMESPACE})
    # ASCII: JSON can escape what XML can not even escape
    held.text = json.dumps(manifest.model_dump(mode="json"), indent=1)


def _add_disk(devices: Element, disk: DiskLayer) -> None:
    kind = "block" if is_device(disk.frozen) else "file"
    element = add(devices, "disk", type=kind, device="disk")
    known = disk.frozen_format if disk.frozen_format in _FORMATS else None
    add(element, "driver", name="qemu", type=known)
    add_source(element, disk.frozen)
    add(element, "target", dev=disk.target, bus=_BUSES.get(disk.target[:2]))


def _uses_kvm(argv: tuple[str, ...]) -> bool:
    words = " ".join(argv[1:])
    return re.search(r"(^| )--?enable-kvm( |$)|(-accel |accel=)(kvm|\S*:kvm)", words) is not None
