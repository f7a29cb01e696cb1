"""Valid inputs to begin with, made from the documents and images of the other tests."""

import json
from pathlib import Path

from qsnapd.model.registration import LastSeen, Registration, SeenDisk
from qsnapd.model.snapshot import FileIdentity, Manifest, RamBlock
from qsnapd.model.transfer import Export, ExportedDisk, ExportedFile, ExportedImage
from qsnapd.xml.snapshot import write_snapshot
from tests.unit.control_host import NOW, manifest

SAMPLE = Path(__file__).parents[2] / "configs" / "qsnapd.toml"

TOML_WORDS = (
    *(b"[daemon]\n", b"[vm.b]\n", b"qmp = '/q'\n", b"agent = '/q'\n", b"[[", b"]]", b"nan", b"inf"),
    *(b'socket = "', b"'''", b'"""', b"\\u0000", b"\\ud800", b"hook = [", b"instead", b"\xff"),
    *(b"[" * 20_000, b"a." * 2_000, b"1e400", b"9" * 5_000, b"2026-02-30", b"=", b"'", b"#", b"\n"),
    *(b"operator_group = 'a\\u0000'", b"launcher = 'unit'\n", b"unit = 'x.service'\n", b"0x", b"-"),
)
XML_WORDS = (
    *(b"<!DOCTYPE domainsnapshot [<!ENTITY a 'aaaa'>]>", b"&a;", b"&amp;", b"&#0;", b"&#x110000;"),
    *(b"<!DOCTYPE d SYSTEM 'file:///etc/passwd'>", b"<![CDATA[", b"]]>", b"<?xml version='1.0'?>"),
    *(b"<disk name='x'/>", b"<disk name='vda' snapshot='no'/>", b"<disks>", b"</disks>", b"<a>"),
    *(b"<a>" * 5_000, b" x='" + b"y" * 5_000 + b"'", b"<memory file='/m'/>"),
    *(b"<!--", b"-->", b"xmlns:q='urn:qsnapd:snapshot'", b"<q:manifest>", b"\xff\xfe", b"\0"),
    *(b"<creationTime>99999999999</creationTime>", b"<source file='/../x'/>", b"name='", b"'"),
    *(b"snapshot='internal'", b">", b"{}"),
)


def configs() -> list[bytes]:
    vms = """
    [vm.a]
    qmp = "/a"
    agent = "/agent"
    hook = ["/usr/local/sbin/hook", "--fast"]
    launcher = "unit"
    unit = "qemu@a.service"
    [vm.a.instead]
    "netdev=net0" = "user,id=net0"
    [vm.b]
    qmp = "/b"
    launcher = "systemd-run"
    properties = ["Slice=machine.slice"]
    start_limit_s = 5
    """
    return [SAMPLE.read_bytes(), vms.encode(), b"[daemon]\nstate_dir = '/a/'\nruntime_dir = '/b'\n"]


def whole_manifest() -> Manifest:
    """One with something in every field."""
    plain = manifest("s1", "s0")
    chain = (
        FileIdentity(path="/d/base.qcow2", device=1, inode=2),
        FileIdentity(path="/d/root.raw", device=1, inode=3),
    )
    disks = tuple(disk.model_copy(update={"chain": chain}) for disk in plain.disks)
    left_out = disks[0].model_copy(
        update={"target": "vdb", "frozen": "/d/other.raw", "frozen_format": "raw", "overlay": None}
    )
    argv = (
        *("qemu-system-x86_64", "-m", "1G", "-machine", "pc,accel=kvm", "-name", "guest=vm1"),
        *("-drive", "file=/d/base.qcow2,if=virtio,id=disk0", "-qmp", "unix:/q,server=on,wait=off"),
    )
    process = plain.machine.process.model_copy(
        update={"argv": argv, "groups": (1, 2), "environment": (("LANG", "C"),)}
    )
    blocks = (RamBlock(id="pc.ram", size_bytes=1 << 30),)
    machine = plain.machine.model_copy(
        update={
            "process": process,
            "ram_blocks": blocks,
            "cpu": "qemu64-x86_64-cpu",
            "cpu_features": ("sse2",),
            "uuid": "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        }
    )
    return plain.model_copy(
        update={
            "description": "before the upgrade",
            "labels": {"by": "me"},
            "disks": disks,
            "left_out": (left_out,),
            "manual_disks": ("vdb",),
            "machine": machine,
        }
    )


def manifests() -> list[bytes]:
    whole = whole_manifest()
    disk_only = whole.model_copy(
        update={"strategy": None, "image_format": None, "memory": None, "paused_ms": 0.0}
    )
    return [each.model_dump_json().encode() for each in (whole, disk_only, manifest("s1"))]


def export() -> Export:
    images = (
        ExportedImage(
            name="disk-vda.qcow2", format="qcow2", size_bytes=9, data_bytes=9, sha256="0" * 64
        ),
        ExportedImage(
            name="disk-vda.base1.raw", format="raw", size_bytes=9, data_bytes=9, sha256="1" * 64
        ),
    )
    return Export(
        exported_at=NOW,
        snapshot=whole_manifest(),
        memory=ExportedFile(size_bytes=9, data_bytes=9, sha256="2" * 64),
        disks=(ExportedDisk(target="vda", images=images),),
    )


def exports() -> list[bytes]:
    return [export().model_dump_json().encode()]


def xml_requests() -> list[bytes]:
    return [
        b"<domainsnapshot/>",
        b"""<domainsnapshot>
          <name>s1</name>
          <description>before &amp; after</description>
          <memory snapshot='external' file='/m/memory.img'/>
          <disks>
            <disk name='vda' snapshot='external' type='file'>
              <driver type='qcow2'/><source file='/d/new.qcow2'/>
            </disk>
            <disk name='vdb' snapshot='no'/>
            <disk name='vdc' type='block'><source dev='/dev/vg/new'/></disk>
            <disk name='vdd' snapshot='manual'/>
          </disks>
          <domain/>
        </domainsnapshot>""",
        b"<domainsnapshot><memory snapshot='no'/></domainsnapshot>",
    ]


def xml_snapshots() -> list[bytes]:
    return [write_snapshot(Manifest.model_validate_json(m)).encode() for m in manifests()]


def last_seen() -> LastSeen:
    whole = whole_manifest()
    disk = SeenDisk(target="vda", chain=whole.disks[0].chain)
    return LastSeen(machine=whole.machine, disks=(disk,))


def registration() -> Registration:
    files = whole_manifest().disks[0].chain
    return Registration(
        name="vm2",
        qmp="/q2",
        source="vm1",
        snapshot="s1",
        created_at=NOW,
        overlays=files,
        files=files,
    )


def as_json(*documents: object) -> list[bytes]:
    return [json.dumps(document).encode() for document in documents]
