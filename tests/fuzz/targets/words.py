"""Command lines: what a process says it was started with, and what an imported manifest says.

An input is the words as /proc/PID/cmdline has them, each ended by a NUL.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from random import Random

from qsnapd.errors import Blocked, VmError
from qsnapd.image.mapped_ram import Layout, MappedBlock
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import Process
from qsnapd.snapshot.restoring.revert_plan import read_manifest_line
from qsnapd.vm import identity
from qsnapd.vm.apart import set_apart
from qsnapd.vm.apart_seen import renew_generation_id
from qsnapd.vm.argv import Fields, Option, parse_options, words_of
from qsnapd.vm.identity import key_of, plain_name
from qsnapd.vm.isolate import isolate
from qsnapd.vm.kept_ram import kept_ram_files, require_emptiable
from qsnapd.vm.launch import CommandLine, Parent, Start, launch_of
from qsnapd.vm.named_files import named_files
from qsnapd.vm.probe import shaping_options
from qsnapd.vm.proc import ARGV_VARIABLE
from qsnapd.vm.ram_options import map_ram
from tests.fuzz import seeds
from tests.fuzz.mutating import spoil_bytes, spoil_json
from tests.fuzz.targets.target import Target, plain

_MANIFEST = seeds.whole_manifest()
_LAYOUT = Layout(
    machine="pc",
    ram_section_id=2,
    blocks=(
        MappedBlock("pc.ram", 1 << 30, 4096, 4096, 1 << 20),
        MappedBlock("/objects/ram", 1 << 30, 4096, 1 << 31, 1 << 32),
    ),
)
_PARENT = Parent(instead={"netdev=net1": "user,id=net1", "add-fd=1": ""})


def feed_words(data: bytes) -> None:
    try:
        words = identity._words(data)
    except VmError:
        return
    identity._plain_argv(words, data)
    for name, value in identity._worth_keeping(data):
        assert "\0" not in name + value
    options = parse_options(words[1:])
    if not {"-", "--"} & set(words):  # QEMU does not start with these
        assert words_of(options) == words[1:]
    for option in options:
        _feed_value(option.value or "")
    try:
        process = Process(exe="/bin/sh", argv=words, cwd="/", uid=1, gid=1)
    except ValueError:
        return  # "read_process" takes it for one that cannot be looked into
    for use in (_start_again, _set_apart, _isolate, _map, _look_at):
        with suppress(Blocked, VmError):
            use(process, options)


def _feed_value(value: str) -> None:
    for first_key in (None, "driver"):
        with suppress(Blocked):
            fields = Fields.parse(value, first_key=first_key)
            again = Fields.parse(str(fields), first_key=first_key)
            assert again == fields or not fields.is_json
    with suppress(VmError):
        assert isinstance(plain_name(value), str)


def _line(process: Process) -> CommandLine:
    machine = _MANIFEST.machine.model_copy(update={"process": process})
    manifest = _MANIFEST.model_copy(update={"machine": machine})
    return read_manifest_line(manifest, [f"/d/new.{d.target}" for d in manifest.disks], _PARENT)


def _start_again(process: Process, options: list[Option]) -> None:
    line = _line(process)
    line = line.changed(renew_generation_id(line.options))
    launch = launch_of(process, line, start=Start.LOAD, token="t", identify=key_of, plain=line)
    _require_executable(launch)
    assert not {"/d/base.qcow2", "/d/root.raw"} & set(words_of(line.options))


def _require_executable(launch: Launch) -> None:
    for word in (launch.executable, *launch.argv, *sum(launch.environment, ())):
        assert "\0" not in word
        os.fsencode(word)


def _set_apart(process: Process, options: list[Option]) -> None:
    line = _line(process)
    apart = set_apart(
        line.options,
        clone="vm2",
        cwd=line.cwd,
        seed="0" * 32,
        qmp_from="/q",
        images=[f"/d/new.{disk.target}" for disk in _MANIFEST.disks],
    )
    for path in (apart.qmp, *apart.made, *apart.pipes):
        assert os.path.isabs(path)
        assert "\0" not in path
    assert all("\0" not in word for word in words_of(apart.options))


def _isolate(process: Process, options: list[Option]) -> None:
    isolated = isolate(options, "/folder")
    assert all("\0" not in word for word in words_of(isolated.options))
    names = {option.name for option in isolated.options}
    assert not names & {"qmp", "chroot", "daemonize", "runas", "pidfile", "D"}


def _map(process: Process, options: list[Option]) -> None:
    found = map_ram(options, "/s/memory.img", _LAYOUT, _MANIFEST.machine)
    assert set(found.blocks) <= {block.id for block in _LAYOUT.blocks}
    assert all("\0" not in word for word in words_of(found.options))


def _look_at(process: Process, options: list[Option]) -> None:
    for file in named_files(options, "/"):
        assert file.path.startswith("/")
    words_of(list(shaping_options(options, "pc-10.0")))
    for path in kept_ram_files(options, "/nowhere"):
        require_emptiable(path, 1)


def _seeds() -> list[bytes]:
    json_words = {
        "driver": "qcow2",
        "node-name": "disk0",
        "file": {"driver": "file", "filename": "/d/base.qcow2", "aio": "threads"},
        "backing": None,
    }
    backend = {"qom-type": "memory-backend-file", "id": "ram", "size": 1 << 30, "mem-path": "/m"}
    lines = (
        _MANIFEST.machine.process.argv,
        (
            *("qemu", "-blockdev", json.dumps(json_words), "-object", json.dumps(backend)),
            *("-machine", "q35,memory-backend=ram", "-m", "size=1G,slots=2,maxmem=4G", "-S"),
            *("-device", "virtio-blk-pci,drive=disk0", "-global", "kvm-pit.lost_tick_policy=delay"),
            *("-netdev", "tap,id=net0,fd=3", "-netdev", "user,id=net1,hostfwd=tcp::2222-:22"),
            *("-device", "virtio-net-pci,netdev=net1,mac=52:54:00:12:34:56", "-incoming", "defer"),
            *("-add-fd", "set=1,fd=5,opaque=/d/x", "-uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
        ),
        (
            *("qemu", "-hda", "/d/base.qcow2", "-drive", "file=/d/a,,b.raw,format=raw,if=virtio"),
            *("-chardev", "socket,id=q,path=/q,server=on,wait=off", "-mon", "chardev=q"),
            *("-serial", "unix:/run/s.sock,server,nowait", "-serial", "file:/var/log/s.log"),
            *("-monitor", "telnet:127.0.0.1:5555,server=on", "-vnc", ":1", "-daemonize"),
            *("-object", "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/m,share=on"),
            *("-numa", "node,memdev=m", "-run-with", "user=nobody", "-device", "vhost-vsock-pci"),
            *("-spice", "port=5900,addr=127.0.0.1", "-pidfile", "qemu.pid", "-D", "qemu-%d.log"),
        ),
        ("qemu", "-nic", "tap,ifname=t0", "-snapshot", f"{ARGV_VARIABLE}=[]", "HOME=/x", "a.img"),
    )
    return ["".join(f"{word}\0" for word in line).encode() for line in lines]


_WORDS = (
    *(b"-blockdev\0", b"-drive\0", b"-object\0", b"-chardev\0", b"-device\0", b"-netdev\0"),
    *(b"-machine\0", b"-m\0", b"file=", b"id=", b",", b",,", b"=", b"server=on", b"fd=3", b"\xff"),
    *(b"-readconfig\0x\0", b"-vnc\0unix:/v\0", b"-serial\0mon:pipe:/p\0", b"-udp", b"@", b":"),
    *(b"." * 5000, b"9" * 5000, b"{", b"memory-backend-memfd", b"mem-path", b"-m\0" + b"1" * 9),
    *(b"-fw_cfg\0name=opt/x,file=/x\0", b"-device\0vmgenid,guid=x\0", b"driver=", b"filename="),
    *(b"\0", b"share=on"),
)


def _spoil(data: bytes, random: Random) -> bytes:
    words = data.split(b"\0")
    spellings: list[tuple[int, Callable[[bytes, Random], bytes]]] = [
        (number, spoil_json) for number, word in enumerate(words) if word.startswith(b"{")
    ]
    if not spellings or random.randrange(2) == 0:
        return spoil_bytes(data, random, _WORDS)
    number, spoil = random.choice(spellings)
    words[number] = spoil(words[number], random)
    return b"\0".join(words)


TARGETS = (
    Target(
        *("command-line", plain(feed_words), _seeds, _spoil),
        runs_long=60_000,
        runs_short=300,
        max_bytes=1 << 13,
    ),
)
