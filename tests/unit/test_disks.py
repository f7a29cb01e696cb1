"""How disks are named and found in what QEMU says of its block graph."""

import os
from pathlib import Path

import pytest
import trio

from qsnapd.errors import CommandRefused
from qsnapd.model.snapshot import FileIdentity
from qsnapd.qmp.block import BlockdevAdd, BlockInfo
from qsnapd.qmp.session import QmpSession
from qsnapd.qmp.transport import EventListener
from qsnapd.vm.disks import Disk, assign_targets, read_disks
from qsnapd.vm.identity import plain_name


class Answers:
    """A transport that knows a few answers by heart."""

    def __init__(self, **answers: object) -> None:
        self._answers = answers

    async def execute(
        self,
        name: str,
        arguments: object,
        *,
        timeout_s: float,
        descriptor: int | None = None,
    ) -> object:
        await trio.lowlevel.checkpoint()
        if name.replace("-", "_") not in self._answers:
            raise CommandRefused(name, "GenericError", "unknown")
        return self._answers[name.replace("-", "_")]

    def listen(self, listener: EventListener) -> None:
        raise AssertionError("nothing is listened to here")

    def unlisten(self, listener: EventListener) -> None:
        raise AssertionError("nothing is listened to here")


def targets(*types: str) -> list[str]:
    devices = [BlockInfo(device=f"d{n}") for n, _ in enumerate(types)]
    return assign_targets(devices, types)


@pytest.mark.parametrize(
    ("types", "names"),
    [
        (("virtio-blk-device", "virtio-blk-device"), ["vda", "vdb"]),
        (("scsi-hd", "ide-hd", "scsi-cd"), ["sda", "hda", "sdb"]),
        (("usb-storage",), ["sda"]),
        (("nvme", "nvme"), ["nvme0n1", "nvme1n1"]),
        (("floppy",), ["fda"]),
        (("", "strange-device"), ["d0", "d1"]),
    ],
)
def test_targets_are_libvirts(types: tuple[str, ...], names: list[str]) -> None:
    assert targets(*types) == names


def test_after_z_comes_aa() -> None:
    names = targets(*["virtio-blk-pci"] * 53)
    assert [names[n] for n in (0, 25, 26, 27, 52)] == ["vda", "vdz", "vdaa", "vdab", "vdba"]


def test_a_device_without_any_name_gets_one() -> None:
    assert assign_targets([BlockInfo(), BlockInfo(qdev="/machine/x/d")], ["", ""]) == ["disk0", "d"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("/images/a.qcow2", "/images/a.qcow2"),
        ('json:{"driver": "raw", "file": {"driver": "file", "filename": "/a"}}', "/a"),
        ('json:{"driver":"qcow2","file":{"driver":"x","file":{"filename":"/dev/fdset/3"}}}',
         "/dev/fdset/3"),
        ('json:{"driver": "null-co"}', 'json:{"driver": "null-co"}'),
    ],
)  # fmt: skip
def test_plain_names(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def node(name: str, image: dict[str, object], **more: object) -> dict[str, object]:
    return {"node-name": name, "file": "", "drv": "qcow2", "ro": False, "image": image, **more}


def image(filename: str, **more: object) -> dict[str, object]:
    return {"filename": filename, "format": "qcow2", "virtual-size": 4096, **more}


async def test_a_chain_is_followed_through_descriptor_sets(tmp_path: Path) -> None:
    """An overlay that qsnapd handed over is known by the path it noted beside it."""
    overlay, base = tmp_path / "overlay", tmp_path / "base"
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT) for path in (overlay, base)]
    try:
        backing = image(f'json:{{"driver": "qcow2", "file": {{"filename": "{base}"}}}}')
        top = image("/dev/fdset/5", **{"backing-image": backing})
        qdev = "/machine/peripheral/v/virtio-backend"
        answers = Answers(
            query_block=[{"qdev": qdev, "inserted": node("n", top)}],
            query_fdsets=[{"fdset-id": 5, "fds": [{"fd": 9, "opaque": str(overlay)}]}],
            qom_get="virtio-blk-device",
        )
        [disk] = await read_disks(QmpSession(answers), os.getpid())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert (disk.target, disk.node, disk.depth) == ("vda", "n", 2)
    assert [file.path for file in disk.chain] == [str(overlay), str(base)]
    assert disk.left_out is None
    shown = disk.info()
    sizes = (shown.size_bytes, shown.allocated_bytes)
    assert (shown.type, shown.device, *sizes) == ("file", "disk", 0, 0)


@pytest.mark.parametrize(
    ("device_type", "kind"),
    [("ide-cd", "cdrom"), ("scsi-cd", "cdrom"), ("floppy", "floppy"), ("scsi-hd", "disk")],
)
async def test_what_kind_of_device_has_the_medium(device_type: str, kind: str) -> None:
    query_block = [{"qdev": "/machine/peripheral/d", "removable": True}]
    answers = Answers(query_block=query_block, query_fdsets=[], qom_get=device_type)
    [disk] = await read_disks(QmpSession(answers), os.getpid())
    assert disk.kind == kind
    assert disk.info().size_bytes is None


def test_a_block_device_has_no_size_of_its_own_as_a_file() -> None:
    identity = FileIdentity(path="/dev/null", device=0, inode=0)  # as little a file as a disk is
    shown = Disk(
        target="vda",
        device="d",
        qdev=None,
        node="n",
        format="raw",
        filename="/dev/null",
        chain=(identity,),
        depth=1,
        virtual_size_bytes=4096,
        cluster_size_bytes=None,
        extended_l2=False,
        cache_direct=False,
        cache_no_flush=False,
        detect_zeroes="off",
        bitmaps=(),
        left_out=None,
    ).info()
    assert (shown.type, shown.size_bytes, shown.allocated_bytes) == ("block", None, None)


@pytest.mark.parametrize("device_type", ["scsi-block", "scsi-generic"])
async def test_a_device_that_is_passed_through(device_type: str) -> None:
    query_block = [{"qdev": "/machine/peripheral/d", "inserted": node("n", image("/no/such"))}]
    answers = Answers(query_block=query_block, query_fdsets=[], qom_get=device_type)
    [disk] = await read_disks(QmpSession(answers), os.getpid())
    assert disk.refusal is not None
    assert "passed through" in disk.refusal


async def test_media_that_are_left_out() -> None:
    cd = {"device": "cd", "removable": True, "inserted": node("c", image("/no/such"))}
    fixed = {"device": "ro", "inserted": node("r", image("/no/such"), ro=True)}
    answers = Answers(query_block=[{"device": "e"}, cd, fixed], query_fdsets=[])
    disks = await read_disks(QmpSession(answers), os.getpid())
    assert [(d.target, d.left_out, d.path) for d in disks] == [
        ("e", "empty", None),
        ("cd", "removable", None),
        ("ro", "read-only", None),
    ]


def test_a_node_is_added_with_the_options_as_they_are() -> None:
    options = {"driver": "qcow2", "node-name": "n", "backing": None}
    assert BlockdevAdd(options=options).arguments() == options
