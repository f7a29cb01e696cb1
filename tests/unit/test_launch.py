"""The command line that starts a VM again."""

import json
import time
from collections.abc import Callable

import pytest

from qsnapd.errors import Blocked
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import FileIdentity, Machine, Process
from qsnapd.vm.launch import MovedDisk, Start, launch_of, read_command_line

QEMU = "/usr/bin/qemu-system-x86_64"
TYPE = "pc-i440fx-7.2"
M = f"-machine type={TYPE} "
END = "-incoming defer -S"
FILES = {
    QEMU: (1, 1),
    "/img/base.raw": (7, 10),
    "/img/a.qcow2": (7, 11),
    "/img/link.qcow2": (7, 11),
    "/img/b.raw": (7, 12),
    "/img/x,y.raw": (7, 13),
    "/dev/vg/lv": (5, 14),
}


def link(path: str) -> FileIdentity:
    device, inode = FILES[path]
    return FileIdentity(path=path, device=device, inode=inode)


A = MovedDisk("vda", (link("/img/a.qcow2"), link("/img/base.raw")), "/new/a.qcow2")
B = MovedDisk("vdb", (link("/img/b.raw"),), "/new/b,1.qcow2")
COMMA = MovedDisk("vda", (link("/img/x,y.raw"),), "/new/x,y.qcow2")
LV = MovedDisk("vda", (link("/dev/vg/lv"),), "/new/lv.qcow2")


def plan(
    words: str | list[str],
    *disks: MovedDisk,
    cwd: str = "/img",
    exe: str = QEMU,
    identify: Callable[[str], tuple[int, int] | None] = FILES.get,
) -> Launch:
    argv = ("qemu", *(words.split() if isinstance(words, str) else words))
    process = Process(exe=exe, argv=argv, cwd=cwd, uid=0, gid=0)
    machine = Machine(type=TYPE, ram_bytes=1 << 26, process=process)
    line = read_command_line(process, machine, disks, identify=identify)
    return launch_of(process, line, start=Start.LOAD, token="0", identify=identify)


@pytest.mark.parametrize(
    ("before", "disks", "after"),
    [
        # -drive
        (
            "-drive file=/img/a.qcow2,format=qcow2,if=virtio,cache=none,aio=native",
            [A],
            "-drive file=/new/a.qcow2,format=qcow2,if=virtio,cache=none,aio=native",
        ),
        (
            "-drive file=a.qcow2,if=none,id=d0,file.locking=off",
            [A],
            "-drive file=/new/a.qcow2,if=none,id=d0,file.locking=off,format=qcow2",
        ),
        ("--drive file=file:/img/b.raw,format=raw", [B],
         "--drive file=/new/b,,1.qcow2,format=qcow2"),
        ("-drive file=/img/x,,y.raw,driver=raw", [COMMA],
         "-drive file=/new/x,,y.qcow2,driver=qcow2"),
        (
            "-drive driver=raw,file.driver=file,file.filename=/img/b.raw,if=none,id=d",
            [B],
            "-drive driver=qcow2,file.driver=file,file.filename=/new/b,,1.qcow2,if=none,id=d",
        ),
        (
            "-drive driver=qcow2,file.filename=/img/link.qcow2,backing.file.filename=/img/base.raw",
            [A],
            "-drive driver=qcow2,file.filename=/new/a.qcow2,file.driver=file",
        ),
        # the short forms
        ("-hda /img/a.qcow2 -hdb /img/b.raw", [A, B],
         "-drive file=/new/a.qcow2,format=qcow2,index=0,media=disk "
         "-drive file=/new/b,,1.qcow2,format=qcow2,index=1,media=disk"),
        ("-m 64 /img/a.qcow2", [A],
         "-m 64 -drive file=/new/a.qcow2,format=qcow2,index=0,media=disk"),
        ("-nodefaults a.qcow2 -usb", [A],
         "-nodefaults -drive file=/new/a.qcow2,format=qcow2,index=0,media=disk -usb"),
        ("-pflash /img/b.raw", [B], "-drive file=/new/b,,1.qcow2,format=qcow2,if=pflash"),
        # -blockdev: nested, apart, bare protocol, device
        (
            "-blockdev qcow2,node-name=d0,file.driver=file,file.filename=/img/a.qcow2,"
            "discard=unmap",
            [A],
            "-blockdev driver=qcow2,node-name=d0,file.driver=file,file.filename=/new/a.qcow2,"
            "discard=unmap",
        ),
        (
            "-blockdev driver=file,node-name=f0,filename=/img/b.raw,auto-read-only=on "
            "-blockdev driver=raw,node-name=d0,file=f0,cache.direct=on",
            [B],
            "-blockdev driver=file,node-name=f0,filename=/new/b,,1.qcow2,auto-read-only=on "
            "-blockdev driver=qcow2,node-name=d0,file=f0,cache.direct=on",
        ),
        (
            "-blockdev driver=file,node-name=d0,filename=/img/b.raw,aio=native,cache.direct=on",
            [B],
            "-blockdev driver=qcow2,node-name=d0,cache.direct=on,"
            "file.filename=/new/b,,1.qcow2,file.aio=native,file.driver=file",
        ),
        (
            "-blockdev driver=host_device,node-name=f0,filename=/dev/vg/lv "
            "-blockdev driver=raw,node-name=d0,file=f0",
            [LV],
            "-blockdev driver=file,node-name=f0,filename=/new/lv.qcow2 "
            "-blockdev driver=qcow2,node-name=d0,file=f0",
        ),
        # the newest image of a chain spelled out is the one that is replaced
        (
            "-blockdev driver=file,node-name=bf,filename=/img/base.raw,read-only=on "
            "-blockdev driver=raw,node-name=base,file=bf,read-only=on "
            "-blockdev driver=file,node-name=f0,filename=/img/a.qcow2 "
            "-blockdev driver=qcow2,node-name=d0,file=f0,backing=base",
            [A],
            "-blockdev driver=file,node-name=bf,filename=/img/base.raw,read-only=on "
            "-blockdev driver=raw,node-name=base,file=bf,read-only=on "
            "-blockdev driver=file,node-name=f0,filename=/new/a.qcow2 "
            "-blockdev driver=qcow2,node-name=d0,file=f0",
        ),
        # a VM started before earlier snapshots names an older image of the chain
        ("-drive file=/img/base.raw,format=raw,if=virtio", [A],
         "-drive file=/new/a.qcow2,format=qcow2,if=virtio"),
        # CD-ROMs and read-only uses of the same file are no disks
        ("-drive file=/img/b.raw,media=cdrom -drive file=/img/b.raw,format=raw -cdrom /c.iso",
         [B],
         "-drive file=/img/b.raw,media=cdrom -drive file=/new/b,,1.qcow2,format=qcow2 "
         "-cdrom /c.iso"),
        ("-drive file=/img/b.raw,read-only=on -hda /img/b.raw", [B],
         "-drive file=/img/b.raw,read-only=on "
         "-drive file=/new/b,,1.qcow2,format=qcow2,index=0,media=disk"),
        # everything else stays
        (
            "-name vm -daemonize -pidfile /p -qmp unix:/q,server=on,wait=off -append fd=3,x=y",
            [],
            "-name vm -daemonize -pidfile /p -qmp unix:/q,server=on,wait=off -append fd=3,x=y",
        ),
    ],
)  # fmt: skip
def test_disks_move_to_their_overlays(before: str, disks: list[MovedDisk], after: str) -> None:
    assert plan(before, *disks).argv == ("qemu", *f"{after} {M}{END}".split())


def test_json_stays_json() -> None:
    disk = {
        "driver": "raw",
        "node-name": "d0",
        "read-only": False,
        "file": {"driver": "host_device", "filename": "/dev/vg/lv", "aio": "native"},
        "backing": None,
    }
    option = plan(["-blockdev", json.dumps(disk)], LV).argv[2]
    assert json.loads(option) == {
        "driver": "qcow2",
        "node-name": "d0",
        "read-only": False,
        "file": {"driver": "file", "filename": "/new/lv.qcow2", "aio": "native"},
    }


def test_a_bare_json_protocol_node_becomes_the_file_of_a_qcow2_node() -> None:
    disk = {"driver": "file", "node-name": "d0", "filename": "/img/b.raw", "locking": "off"}
    option = plan(["-blockdev", json.dumps(disk)], B).argv[2]
    assert json.loads(option) == {
        "driver": "qcow2",
        "node-name": "d0",
        "file": {"driver": "file", "filename": "/new/b,1.qcow2", "locking": "off"},
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"-machine type={TYPE}"),
        ("-machine q35,accel=kvm", f"-machine type={TYPE},accel=kvm"),
        ("-M accel=kvm,type=pc", f"-M accel=kvm,type={TYPE}"),
        ("-machine accel=kvm", f"-machine accel=kvm -machine type={TYPE}"),
        ("--M pc -machine usb=on", f"--M type={TYPE} -machine usb=on"),
    ],
)
def test_the_machine_type_is_pinned(before: str, after: str) -> None:
    assert plan(before).argv[1:] == (*after.split(), *END.split())


@pytest.mark.parametrize(
    "before",
    ["-S", "-incoming tcp:0:4444", "--incoming fd:7 -S", "-loadvm x", "-incoming defer -S"],
)
def test_it_waits_once_for_its_memory(before: str) -> None:
    assert plan(before).argv[1:] == (*M.split(), *END.split())


@pytest.mark.parametrize(
    ("words", "disks", "because"),
    [
        ("-snapshot", [], "thrown away"),
        ("--preconfig", [], "over QMP"),
        ("-set drive.d0.format=raw", [], "-set drive.d0.format=raw"),
        ("-drive file=/img/a.qcow2,snapshot=on", [A], "thrown away"),
        ("-drive file=/img/b.raw,format=raw,offset=512", [B], "a part of its file"),
        ("-drive file=/img/a.qcow2,encrypt.format=luks", [A], "encrypted"),
        ("-drive file=/img/b.raw,format=vmdk", [B], "'vmdk'"),
        ("-blockdev driver=throttle,node-name=d,file.driver=file,file.filename=/img/b.raw", [B],
         "'throttle'"),
        ("-blockdev driver=quorum,children.0.driver=file,children.0.filename=/img/b.raw", [B],
         "children.0"),
        ("-m 64", [A], "disk vda: QEMU's command line names none.*/img/base.raw.*plugged"),
        ("-readconfig vm.cfg", [A], "-readconfig"),
        ("-hda /img/a.qcow2 -hdb /img/link.qcow2", [A], "more than once"),
        ("-hda /img/b.raw", [B, MovedDisk("vdc", B.chain, "/new/c.qcow2")], "vdb and vdc both"),
        ("-blockdev driver=raw,node-name=base,file.driver=file,file.filename=/img/base.raw "
         "-blockdev driver=qcow2,node-name=d0,file.driver=file,file.filename=/gone,backing=base",
         [A], "'base' as their backing"),
        ("-blockdev driver=file,node-name=f,filename=/img/b.raw "
         "-blockdev driver=raw,node-name=x,file=f -blockdev driver=raw,node-name=y,file=f",
         [B], "several nodes use 'f'"),
        ("-blockdev {'driver':'raw'}", [], "cannot read this JSON"),
        # descriptors
        ("-add-fd fd=3,set=1", [], "-add-fd fd=3,set=1: the descriptor"),
        ("-chardev socket,id=q,fd=5,server=on", [], "-chardev"),
        ("-netdev tap,id=n,fds=4:5,vhostfds=6:7", [], "-netdev"),
        ("-netdev tap,id=n,vhostfd=9", [], "-netdev"),
        ("-netdev stream,id=n,addr.type=fd,addr.str=4", [], "-netdev"),
        ("-blockdev driver=file,node-name=f,filename=/dev/fdset/2", [], "/dev/fdset/2"),
        ("-drive file=/dev/fdset/2", [], "/dev/fdset/2"),
        ("-device vhost-vsock-pci,vhostfd=4,guest-cid=3", [], "-device"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_again_is_refused(
    words: str, disks: list[MovedDisk], because: str
) -> None:
    with pytest.raises(Blocked, match=because):
        plan(words, *disks)


def test_device_numbers_may_change_with_a_reboot() -> None:
    # Both files traded device numbers, and inode numbers are equal across file systems.
    one = MovedDisk("vda", (FileIdentity(path="/m/1", device=8, inode=12),), "/new/1")
    two = MovedDisk("vdb", (FileIdentity(path="/m/2", device=9, inode=12),), "/new/2")
    now = {QEMU: (1, 1), "/m/1": (9, 12), "/m/2": (8, 12), "/link": (9, 12)}
    words = plan("-hda /link -hdb /m/2", one, two, identify=now.get).argv
    assert words[1:5] == (
        *("-drive", "file=/new/1,format=qcow2,index=0,media=disk"),
        *("-drive", "file=/new/2,format=qcow2,index=1,media=disk"),
    )


def test_a_relative_name_tells_where_a_daemonized_qemu_was_started() -> None:
    launch = plan("-daemonize -hda a.qcow2", A, cwd="/")
    assert launch.cwd == "/img"
    assert "file=/new/a.qcow2,format=qcow2,index=0,media=disk" in launch.argv


def test_the_working_directory_stays() -> None:
    assert plan("-hda a.qcow2", A).cwd == "/img"


def test_after_an_upgrade_the_new_program_in_its_place_is_used() -> None:
    assert plan("", exe=f"{QEMU} (deleted)").executable == QEMU


def test_a_program_that_is_gone_is_refused() -> None:
    with pytest.raises(Blocked, match="/opt/qemu, is no longer there"):
        plan("", exe="/opt/qemu")


def test_the_command_line_is_quoted_for_people() -> None:
    launch = plan(["-name", "my vm"])
    assert launch.command_line == f"{QEMU} -name 'my vm' -machine type={TYPE} {END}"


def test_many_images_take_time_in_proportion() -> None:
    words = ["-drive", "file=other.raw"] * 5_000
    began_s = time.process_time()
    with pytest.raises(Blocked, match="names none of its images"):
        plan(words, A)
    assert time.process_time() - began_s < 10  # it was minutes
