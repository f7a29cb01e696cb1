"""What a preflight compares, and what it reads from a command line: pure parts."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.errors import SnapshotDiffers
from qsnapd.model.snapshot import Machine, Manifest, MemoryImage, Process, RamBlock, Strategy
from qsnapd.qmp.commands import VersionInfo, VersionTriple
from qsnapd.snapshot.restoring.differences import (
    Difference,
    compare_cpu,
    compare_qemu,
    compare_ram,
    ram_bytes_of,
)
from qsnapd.snapshot.restoring.preflight import check_host_memory, free_memory_bytes
from qsnapd.snapshot.restoring.reach import needs_kvm
from qsnapd.vm.argv import parse_options, words_of
from qsnapd.vm.named_files import Use, named_files
from qsnapd.vm.probe import Probe, shaping_options

MIB, GIB = 1 << 20, 1 << 30


def machine(*words: str, ram_bytes: int = GIB, **more: object) -> Machine:
    process = Process(exe="/usr/bin/qemu", argv=("qemu", *words), cwd="/vms", uid=0, gid=0)
    block = RamBlock(id="pc.ram", size_bytes=ram_bytes)
    fields = {"type": "pc-q35-10.0", "ram_bytes": ram_bytes, "ram_blocks": (block,), **more}
    return Machine.model_validate({**fields, "process": process})


def manifest(**more: object) -> Manifest:
    fields: dict[str, object] = {
        "name": "s",
        "vm": "vm1",
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
        "state": "running",
        "reason": "RUNNING_BOOTED",
        "strategy": Strategy.BACKGROUND,
        "image_format": "mapped-ram",
        "paused_ms": 1.0,
        "total_ms": 2.0,
        "memory": MemoryImage(path="/m", size_bytes=GIB, allocated_bytes=GIB // 2),
        "disks": (),
        "qemu_version": "10.0.2",
        "qemu_package": "Debian",
        "machine": machine(),
        **more,
    }
    return Manifest.model_validate(fields)


def probed(version: str = "10.0.2", **more: object) -> Probe:
    major, minor, micro = map(int, version.split("."))
    triple = VersionTriple(major=major, minor=minor, micro=micro)
    fields: dict[str, object] = {
        "version": VersionInfo(qemu=triple, package="Debian"),
        "machine_type": "pc-q35-10.0",
        "cpu": "qemu64-x86_64-cpu",
        "cpu_features": ("sse", "sse2"),
        "capabilities": frozenset({"mapped-ram"}),
        "loads_lazily": False,
    }
    return Probe(**{**fields, **more})  # type: ignore[arg-type]


def test_a_newer_qemu_or_another_package_is_a_note() -> None:
    assert list(compare_qemu(manifest(), probed())) == []
    assert list(compare_qemu(manifest(), probed("10.1.0"))) == ["QEMU is 10.1.0 now, it was 10.0.2"]
    [note] = compare_qemu(manifest(qemu_package="built here"), probed())
    assert note == "QEMU 10.0.2 is of package Debian now, it was of built here"


def test_an_older_qemu_is_a_difference_that_can_be_forced() -> None:
    [difference] = compare_qemu(manifest(), probed("9.2.4"))
    assert isinstance(difference, Difference)
    assert difference.can_be_forced
    assert str(difference).endswith("; it was 10.0.2")


def test_a_format_that_is_not_known_cannot_be_forced() -> None:
    [difference] = compare_qemu(manifest(), probed(capabilities=frozenset()))
    assert isinstance(difference, Difference)
    assert not difference.can_be_forced


def test_cpus() -> None:
    assert list(compare_cpu(machine(), probed())) == []  # of format 1: nothing is known
    assert list(compare_cpu(machine(cpu_features=("sse",)), probed())) == []
    [difference] = compare_cpu(machine(cpu_features=("sse", "avx")), probed())
    assert "would lose avx" in difference.now
    many = tuple(f"f{number}" for number in range(20))
    [difference] = compare_cpu(machine(cpu_features=many), probed())
    assert difference.now.endswith("and 8 more")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "128"], 128 * MIB),
        (["-m", "2G"], 2 * GIB),
        (["-m", "1.5G"], 3 * GIB // 2),
        (["-m", "size=512m,slots=2,maxmem=4G"], 512 * MIB),
        (["-m", "1G,slots=2,maxmem=4G"], GIB),
        (["-m", "1048577K"], GIB + 8192),
        (["-m", "64", "-m", "96"], 96 * MIB),
        (["-m", "much"], None),
        (["-m", "9" * 5000], None),
        (["-m", f"1.{'0' * 5000}G"], None),
        ([], None),
    ],
)
def test_size_of_ram(words: list[str], expected: int | None) -> None:
    assert ram_bytes_of(parse_options(words)) == expected


def test_ram_that_was_plugged_in_counts() -> None:
    words = ["-m", "1G,slots=2,maxmem=4G", "-object", "memory-backend-ram,id=d,size=1G"]
    dimm = ["-device", "pc-dimm,memdev=d"]
    plugged = machine(*words, *dimm, ram_bytes=2 * GIB).model_copy(
        update={
            "ram_blocks": (
                RamBlock(id="pc.ram", size_bytes=GIB),
                RamBlock(id="d", size_bytes=GIB),
            )
        }
    )
    options = parse_options(plugged.process.argv[1:])
    assert list(compare_ram(plugged, options)) == []
    [difference] = compare_ram(plugged, parse_options(words))
    assert not difference.can_be_forced


def test_ram_of_a_backend() -> None:
    words = ["-m", "1G", "-object", "memory-backend-memfd,id=ram,size=1G"]
    block = RamBlock(id="/objects/ram", size_bytes=2 * GIB)
    other = machine(*words).model_copy(update={"ram_blocks": (block,)})
    [difference] = compare_ram(other, parse_options(words))
    assert "memory image has" in difference.now


def test_memory_of_the_host() -> None:
    assert list(check_host_memory(manifest(), GIB)) == []
    # Mapped RAM needs none at once, so it is no more than worth saying.
    [note] = check_host_memory(manifest(), GIB // 4)
    assert isinstance(note, str)
    [difference] = check_host_memory(manifest(image_format="stream"), GIB // 4)
    assert isinstance(difference, Difference)
    assert difference.can_be_forced
    assert free_memory_bytes() > MIB


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-enable-kvm", True),
        ("-accel kvm", True),
        ("-accel kvm,kernel-irqchip=split", True),
        ("-machine q35,accel=kvm", True),
        ("-machine accel=kvm:tcg", False),
        ("-accel kvm -accel tcg", False),
        ("-accel tcg", False),
        ("-m 64", False),
    ],
)
def test_whether_kvm_is_needed(line: str, *, expected: bool) -> None:
    assert needs_kvm(parse_options(line.split())) is expected


def test_what_shapes_machine_and_cpu() -> None:
    line = (
        "-name x -machine q35,accel=kvm,memory-backend=ram,pflash0=code -M smm=off -cpu host,-avx "
        "-m 4G -smp 64 -object memory-backend-ram,id=ram,size=4G -global host-x86_64-cpu.foo=1 "
        "-global driver=max-x86_64-cpu,property=y,value=1 -global ICH9-LPC.disable_s3=1 "
        "-accel kvm -drive file=/x -daemonize -L /firmware"
    )
    words = words_of(list(shaping_options(parse_options(line.split()), "pc-q35-9.0")))
    assert " ".join(words) == (
        "-cpu host,-avx -global host-x86_64-cpu.foo=1 "
        "-global driver=max-x86_64-cpu,property=y,value=1 -accel kvm -L /firmware "
        "-machine type=pc-q35-9.0,accel=kvm,smm=off"
    )


def test_files_that_a_command_line_names() -> None:
    line = (
        "-kernel vmlinuz -initrd /boot/initrd -bios bios.bin -pidfile /run/q/pid -D log "
        "-qmp unix:/run/q/qmp,server=on,wait=off -monitor unix:mon,server -serial file:/var/s "
        "-chardev socket,id=a,path=/run/q/a,server=on -chardev socket,id=b,path=/run/tpm "
        "-chardev socket,id=c,path=hidden,abstract=on,server=on "
        "-chardev file,id=d,path=/l,logfile=m "
        "-vnc unix:/run/q/vnc -serial stdio -qmp tcp:localhost:4444,server -smbios file=/smbios "
        "-fw_cfg name=opt/x,file=/fw -object secret,id=s,file=/secret -device nic,romfile=rom.bin "
        "-object memory-backend-file,id=r,mem-path=/ram -drive file=/cd,media=cdrom "
        "-drive file=nbd:host:1 -blockdev driver=raw,node-name=n,file.driver=file,"
        "file.filename=disk -blockdev nvme,node-name=m,device=0000:01:00.0"
    )
    found = {(f.path, f.use) for f in named_files(parse_options(line.split()), "/vms")}
    assert found == {
        ("/vms/vmlinuz", Use.READ),
        ("/boot/initrd", Use.READ),
        ("/run/q/pid", Use.WRITE),
        ("/vms/log", Use.WRITE),
        ("/run/q/qmp", Use.LISTEN),
        ("/vms/mon", Use.LISTEN),
        ("/var/s", Use.WRITE),
        ("/run/q/a", Use.LISTEN),
        ("/run/tpm", Use.CONNECT),
        ("/l", Use.WRITE),
        ("/vms/m", Use.WRITE),
        ("/run/q/vnc", Use.LISTEN),
        ("/smbios", Use.READ),
        ("/fw", Use.READ),
        ("/secret", Use.READ),
        ("/ram", Use.KEEP_RAM),
        ("/cd", Use.READ),
        ("/vms/disk", Use.READ),
    }
    absolute = {f.path for f in named_files(parse_options(line.split()), None)}
    assert absolute == {path for path, _ in found if not path.startswith("/vms/")}


@given(st.lists(st.text(max_size=20), max_size=8))
def test_any_command_line_can_be_looked_at(words: list[str]) -> None:
    options = parse_options(words)
    assert all(file.path.startswith("/") for file in named_files(options, "/"))
    assert isinstance(needs_kvm(options), bool)
    assert list(shaping_options(options, "pc"))[-1].name == "machine"
    ram_bytes_of(options)


def test_words_of_the_refusal() -> None:
    refusal = SnapshotDiffers("s", ("CPU: gone", "RAM: gone"), can_be_forced=False)
    assert str(refusal).splitlines() == [
        "snapshot s was taken under other conditions:",
        "CPU: gone",
        "RAM: gone",
        "--force cannot help, this must be put right first; nothing was touched",
    ]
    assert "--force goes on" in str(SnapshotDiffers("s", ("CPU: gone",), can_be_forced=True))
