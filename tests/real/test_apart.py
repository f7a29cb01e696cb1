"""Real QEMUs beside each other: what `vm.apart` and `vm.isolate` make of a command line."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from qsnapd.vm.apart import Apart, set_apart
from qsnapd.vm.apart_seen import renew_generation_id
from qsnapd.vm.argv import Option, parse_options, words_of
from qsnapd.vm.isolate import isolate
from tests.monitor import Monitor
from tests.parts import Qemu, pages_boot_image, qemu_versions

each_qemu = pytest.mark.parametrize("qemu", qemu_versions(), ids=str)

START_LIMIT_S = 30.0
RAM_BYTES = 64 << 20
GUID = uuid.UUID("11111111-aaaa-4bbb-8ccc-dddddddddddd")
UUID = uuid.UUID("22222222-aaaa-4bbb-8ccc-dddddddddddd")
MACS = tuple(f"52:54:00:aa:aa:0{n}" for n in range(3))
WAITING = (Option("incoming", "defer"), Option("S"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """One with a short name, for sockets."""
    path = Path(tempfile.mkdtemp(prefix="q"))
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def started(
    qemu: Qemu, options: Sequence[Option], qmp: str, cwd: Path, *before: str
) -> AsyncIterator[Monitor]:
    """Hold a QEMU with its monitor; it is gone at the end."""
    words = [*before, str(qemu.system), *words_of(options)]
    process = await trio.lowlevel.open_process(
        words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        with trio.fail_after(START_LIMIT_S):
            while True:
                assert process.poll() is None, f"QEMU ended: {process.returncode}"
                with contextlib.suppress(OSError):
                    stream = await trio.open_unix_socket(qmp)
                    break
                await trio.sleep(0.02)
        async with stream:
            monitor = Monitor(stream)
            await monitor.greet()
            yield monitor
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def move(source: Monitor, target: Monitor, image: Path) -> None:
    """Save into a file and load from it."""
    for monitor, command, uri in (
        (source, "migrate", f"exec:cat > {image}"),
        (target, "migrate-incoming", f"exec:cat {image}"),
    ):
        capability = {"capability": "events", "state": True}
        await monitor.execute("migrate-set-capabilities", capabilities=[capability])
        await monitor.execute(command, uri=uri)
        while (event := await monitor.wait_event("MIGRATION"))["data"]["status"] != "completed":
            assert event["data"]["status"] != "failed"


def everything(folder: Path) -> list[Option]:
    """A VM with as much on its command line as QEMU allows without anything of the host's."""
    named = folder / "na,me.sock"
    words = [
        *("-nodefaults", "-no-user-config", "-machine", "pc-i440fx-7.2", "-accel", "tcg"),
        *("-m", "64", "-uuid", str(UUID), "-smbios", f"type=1,uuid={UUID},serial=s"),
        *("-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-name", "one,debug-threads=on"),
        *("-monitor", "unix:hmp,server,nowait", "-pidfile", "pid", "-D", f"{folder}/qemu.log"),
        *("-chardev", f"socket,id=c0,path={str(named).replace(',', ',,')},server=on,wait=off"),
        *("-chardev", f"file,id=c1,path={folder}/c1.log,logfile={folder}/c1-too.log"),
        *("-chardev", "socket,id=c2,host=127.0.0.1,port=0,server=on,wait=off,telnet=on"),
        *("-chardev", f"pipe,id=c3,path={folder}/pipe"),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=c2,name=org.x"),
        *("-device", "virtserialport,chardev=c3,name=org.y"),
        *("-serial", "chardev:c0", "-serial", "mon:unix:serial,server=on,wait=off"),
        *("-parallel", "file:parallel", "-vnc", "127.0.0.1:70,websocket=5799"),
        *("-debugcon", "file:debugcon", "-gdb", "tcp:127.0.0.1:0"),
        *("-netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-:53"),
        *("-device", f"virtio-net-pci,netdev=n0,mac={MACS[0]},id=virtio"),
        *("-netdev", json.dumps({"type": "user", "id": "n1"})),
        *("-device", json.dumps({"driver": "e1000", "netdev": "n1", "mac": MACS[1]})),
        *("-nic", f"socket,listen=127.0.0.1:0,model=rtl8139,mac={MACS[2]}"),
        *("-device", f"vmgenid,guid={GUID},id=gen", "-device", "vmcoreinfo"),
        *("-object", "memory-backend-file,id=shared,size=4M,share=on,mem-path=shared"),
        *("-device", "ivshmem-plain,memdev=shared,master=on"),
        *("-audiodev", "wav,id=a0,path=a.wav", "-device", "AC97,audiodev=a0"),
        *("-object", f"filter-dump,id=f0,netdev=n0,file={folder}/n0.pcap"),
        *("-trace", "file=trace"),
        *("-blockdev", f"driver=file,node-name=boot,filename={pages_boot_image()},read-only=on"),
        *("-device", "virtio-blk-pci,drive=boot,bootindex=0"),
    ]
    for end in ("pipe.in", "pipe.out"):
        os.mkfifo(folder / end)
    return parse_options(words)


def apart(options: Sequence[Option], folder: Path) -> Apart:
    result = set_apart(
        options, clone="two", cwd=str(folder), seed="seed", qmp_from=f"{folder}/qmp"
    )
    for pipe in result.pipes:
        os.mkfifo(pipe)
    return result


async def cards(monitor: Monitor) -> list[str]:
    """What addresses the cards have, as their guest would find: virtio's, e1000's, rtl8139's."""
    [virtio] = await monitor.execute("query-rx-filter", name="virtio")
    pci = await monitor.execute("human-monitor-command", command_line="info pci")
    e1000 = re.search(r"8086:100e.*?BAR0: 32 bit memory at (0x[0-9a-f]+)", pci, re.DOTALL)
    rtl8139 = re.search(r"10ec:8139.*?BAR0: I/O at (0x[0-9a-f]+)", pci, re.DOTALL)
    assert e1000 is not None
    assert rtl8139 is not None
    address_register = int(e1000[1], 16) + 0x5400
    line = f"xp /6bx {address_register:#x}"
    words = await monitor.execute("human-monitor-command", command_line=line)
    first = ":".join(word[2:] for word in words.split()[1:])
    bytes_read = []
    for offset in range(6):
        line = f"i /bx {int(rtl8139[1], 16) + offset:#x}"
        words = await monitor.execute("human-monitor-command", command_line=line)
        bytes_read.append(words.split()[-1][2:])
    return [virtio["main-mac"], first, ":".join(bytes_read)]


async def memory_of(monitor: Monitor, file: Path) -> bytes:
    await monitor.execute("pmemsave", val=0, size=RAM_BYTES, filename=str(file))
    return await trio.Path(file).read_bytes()


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def missing(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not os.path.lexists(path)]


async def wait_booted(monitor: Monitor, folder: Path, *what: uuid.UUID) -> None:
    """Wait until the firmware has put *what* into the guest's memory."""
    with trio.fail_after(START_LIMIT_S):
        while True:
            memory = await memory_of(monitor, folder / "memory")
            if all(value.bytes_le in memory for value in what):
                return
            await trio.sleep(0.1)


def macs_of(result: Apart) -> list[str]:
    return re.findall(r"5[2](?::[0-9a-f]{2}){5}", " ".join(words_of(result.options)))


@each_qemu
async def test_a_second_qemu_runs_beside_the_first(qemu: Qemu, folder: Path) -> None:
    options = everything(folder)
    async with started(qemu, [*options, WAITING[1]], f"{folder}/qmp", folder) as one:
        before = inodes(folder)
        result = apart(options, folder)
        async with started(qemu, [*result.options, WAITING[1]], result.qmp, folder) as two:
            names = [*result.renamed, *result.renamed.values()]
            assert {os.path.basename(name) for name in missing(names)} == {"pipe", "pipe.two"}
            assert before.items() <= inodes(folder).items()
            assert (await two.execute("query-name"))["name"] == "two"
            listening = [await vm.execute("query-vnc") for vm in (one, two)]
            assert [vnc["service"] for vnc in listening] == ["5970", "5971"]
        assert (await one.execute("query-name"))["name"] == "one"


@each_qemu
async def test_when_a_guest_finds_out_that_it_is_another(qemu: Qemu, folder: Path) -> None:
    """The measure of what the docstrings of `vm.apart` and the notes say."""
    options = everything(folder)
    async with started(qemu, options, f"{folder}/qmp", folder) as one:
        await wait_booted(one, folder, UUID, GUID)
        await one.execute("stop")
        assert await cards(one) == list(MACS)
        result = apart(options, folder)
        changed = renew_generation_id(result.options)
        async with started(qemu, [*changed, *WAITING], result.qmp, folder) as two:
            await move(one, two, folder / "image")
            own = uuid.UUID((await two.execute("query-uuid"))["UUID"])
            guid = uuid.UUID((await two.execute("query-vm-generation-id"))["guid"])
            assert own != UUID
            assert guid != GUID
            memory = await memory_of(two, folder / "memory")
            assert UUID.bytes_le in memory
            assert own.bytes_le not in memory
            assert GUID.bytes_le not in memory
            assert guid.bytes_le in memory
            assert await cards(two) == list(MACS)

            await two.execute("cont")
            await two.execute("system_reset")
            await wait_booted(two, folder, own, guid)
            await two.execute("stop")
            memory = await memory_of(two, folder / "memory")
            assert UUID.bytes_le not in memory
            new = macs_of(result)
            assert await cards(two) == [*new[:2], MACS[2]], "rtl8139 keeps what was loaded"


NETWORK = (
    *("-netdev", "tap,id=tap,ifname=t0,script=no,downscript=no,queues=2"),
    *("-device", "virtio-net-pci,netdev=tap,mq=on,vectors=6"),
    *("-object", "memory-backend-memfd,id=ram,size=64M,share=on", "-machine", "memory-backend=ram"),
)


@each_qemu
@pytest.mark.parametrize("tap", [False, True], ids=["plain", "tap"])
async def test_an_isolated_qemu_loads(qemu: Qemu, tap: bool, folder: Path) -> None:
    options = [*everything(folder), *parse_options(NETWORK if tap else ())]
    own_network = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "-rn")
    before = own_network if tap else ()
    async with started(qemu, options, f"{folder}/qmp", folder, *before) as one:
        await wait_booted(one, folder, UUID)
        await one.execute("stop")
        files = inodes(folder)
        (folder / "x").mkdir()
        result = isolate(options, f"{folder}/x")
        assert result.needs_own_network == tap
        qmp = f"{folder}/x/qmp"
        changed = [*result.options, *WAITING, Option("qmp", f"unix:{qmp},server=on,wait=off")]
        async with started(qemu, changed, qmp, folder, *before) as two:
            await move(one, two, folder / "image")
            assert (await two.execute("query-status"))["status"] in ("paused", "inmigrate")
            blocks: list[Any] = await two.execute("query-block")
            assert len(blocks) == 1
            assert inodes(folder).keys() - files.keys() == {"x", "image"}
            assert list(inodes(folder / "x")) == ["qmp"]
