"""A real VM for a test, the demo or the bench: QEMU with one of our guests in it.

    async with open_vm(qemu, Slots(dirty_mib_s=50), disks=[Disk()]) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))

Independent of qsnapd on purpose: what looks at qsnapd's work must not share its mistakes.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tests.guests import pages, slots
from tests.hardware import Disk as Disk  # part of what this module offers
from tests.hardware import (
    MachineType,
    Ram,
    boot_disk_arguments,
    disks_arguments,
    machine_arguments,
)
from tests.monitor import Monitor
from tests.parts import (
    Qemu,
    agent_initrd,
    initrd,
    kernel,
    microvm_firmware,
    pages_boot_image,
)
from tests.parts.tools import command

START_LIMIT_S = 30.0
KILL_LIMIT_S = 10.0
QUICK_KERNEL = (
    "console=ttyS0 quiet panic=-1 edd=off nokaslr mitigations=off noreplace-smp "
    "no_timer_check lsm= cryptomgr.notests"
)


@dataclass(frozen=True)
class Pages:
    """The guest of pages.S."""

    spin: int = 0
    """Turns of an idle loop after each page; 0: dirties as fast as it can."""


@dataclass(frozen=True)
class Slots:
    """The guest of slots.c."""

    memory_mib: int = 16
    dirty_mib_s: int = 0
    disk_pause_us: int = 0
    sign_ms: int = 500
    """How often it says that it lives; at most every millisecond."""
    flushes: bool = False
    """Whether what it says to have written outlives QEMU, and its host."""
    kernel_options: str = ""


@dataclass(frozen=True)
class Agent:
    """The guest of init.agent; its first disk, to be raw, gets an ext4 file system."""


@dataclass(frozen=True)
class Idle:
    """No guest: the firmware has nothing to boot, and waits without using a CPU."""

    noise_mib: int = 0
    """So much of its RAM, from 1 MiB on, holds what nothing can compress."""
    is_held: bool = False
    """Not even the firmware runs."""


Guest = Pages | Slots | Agent | Idle


class Vm:
    """A VM while `open_vm` holds it; after a revert, whatever QEMU serves the same sockets."""

    def __init__(
        self, folder: Path, guest: Guest, argv: tuple[str, ...], disks: tuple[Path, ...]
    ) -> None:
        self.folder = folder
        """The VM's own; short, because the paths of sockets must be."""
        self.guest = guest
        self.argv = argv
        self.disks = disks
        """The images the VM was started with, in the order of the request."""
        self.qmp = folder / "qmp"
        """The monitor for qsnapd."""
        self.monitor_log = folder / "qmp.log"
        """If asked for: what the QEMU that runs now has said on `qmp`."""
        self.serial_log = folder / "serial"
        self.agent = folder / "agent"
        """Of an agent guest: the socket of its agent, for qsnapd."""

    @property
    def pid(self) -> int:
        """Of the QEMU that runs now."""
        [pid] = self.pids()
        return pid

    def pids(self) -> list[int]:
        """Return the processes of all QEMUs that run in this VM's folder."""
        everybody = (int(name) for name in os.listdir("/proc") if name.isdecimal())
        return [pid for pid in everybody if self._is(pid)]

    def _is(self, pid: int) -> bool:
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            return False
        program = os.path.basename(argv[0])
        return program.startswith(b"qemu-system") and any(bytes(self.qmp) in arg for arg in argv)

    def log_text(self) -> str:
        """Return all that the guest has ever said on its serial port."""
        return self.serial_log.read_text(errors="replace")

    def log_lines(self) -> list[str]:
        """Return the complete lines of `log_text`."""
        return [line.rstrip("\r") for line in self.log_text().split("\n")[:-1]]

    def slots_report(self, since: int = 0) -> slots.SlotsReport:
        """Judge what a slots guest has said, from line number *since* on."""
        return slots.read_serial(self.log_lines()[since:])

    def pages_report(self, since: int = 0) -> pages.PassesReport:
        """Judge what a pages guest has said, from line number *since* on."""
        return pages.read_serial(self.log_lines()[since:])

    async def wait_line(
        self, wanted: Callable[[str], bool], *, since: int = 0, limit_s: float = 60.0
    ) -> str:
        """Return the first line that the guest says, from line number *since* on, and is *wanted*.

        Raises:
          TooSlowError: no such line within *limit_s*; the note has the last lines.
        """
        try:
            with trio.fail_after(limit_s), FileWatch(self.serial_log) as watch:
                while True:
                    lines = self.log_lines()
                    for line in lines[since:]:
                        if wanted(line):
                            return line
                    since = max(since, len(lines))
                    await watch.changed()
        except trio.TooSlowError as late:
            late.add_note("the guest's last lines:\n" + "\n".join(self.log_lines()[-10:]))
            raise

    async def wait_checked(self, *, since: int | None = None, limit_s: float = 120.0) -> None:
        """Wait until a slots guest has looked at all its disk slots and memory from now on.

        Counts from its first sign of life after line number *since*, by default the end.
        """
        since = len(self.log_lines()) if since is None else since
        dirties = isinstance(self.guest, Slots) and self.guest.dirty_mib_s > 0
        first: slots.Okay | None = None

        def enough(line: str) -> bool:
            nonlocal first
            now = slots.parse_okay(line)
            if now is None:
                return False
            first = first or now
            return (not self.disks or now.rounds >= first.rounds + 2) and (
                not dirties or now.generation >= first.generation + 2
            )

        await self.wait_line(enough, since=since, limit_s=limit_s)

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Monitor]:
        """Connect to the second monitor, which is ours: qsnapd does not know of it."""
        stream = await trio.open_unix_socket(self.folder / "qmp2")
        async with stream:
            monitor = Monitor(stream)
            await monitor.greet()
            yield monitor

    async def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401
        """Run one QMP command on the second monitor; see `Monitor.execute`."""
        async with self.monitor() as monitor:
            return await monitor.execute(command, **arguments)

    async def tell(self, line: str, *, limit_s: float = 30.0) -> None:
        """Have the shell of an agent guest carry out *line*; it has when this returns."""
        since = len(self.log_lines())
        async with await trio.open_unix_socket(self.folder / "shell") as stream:
            await stream.send_all(line.encode() + b"\n")
            await self.wait_line(lambda said: said == f"DID {line}", since=since, limit_s=limit_s)

    async def kill(self) -> None:
        """End every QEMU of this VM; they are gone on return."""
        with trio.fail_after(KILL_LIMIT_S, shield=True):
            while pids := self.pids():
                for pid in pids:
                    await _kill(pid)


class FileWatch:
    """Tells when a file has been written to, by inotify(7): nothing is missed, nothing polled."""

    _IN_MODIFY = 2

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if libc.inotify_add_watch(self._fd, os.fsencode(path), self._IN_MODIFY) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {path}")

    async def changed(self) -> None:
        """Wait until the file is written to, or has been since the last call."""
        await trio.lowlevel.wait_readable(self._fd)
        os.read(self._fd, 4096)

    def __enter__(self) -> "FileWatch":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)


@asynccontextmanager
async def open_vm(
    qemu: Qemu,
    guest: Guest,
    *,
    disks: Sequence[Disk] = (),
    machine: MachineType = "pc",
    ram: Ram = "default",
    memory_mib: int = 128,
    extra: Sequence[str] = (),
    accel: str = "tcg",
    log_monitor: bool = False,
) -> AsyncIterator[Vm]:
    """Start a VM and hold it for the block; it is running and its sockets listen.

    On exit: every QEMU of this VM is dead, also one that a revert has started, and all its
    files are gone.
    """
    folder = Path(tempfile.mkdtemp(prefix="q"))
    try:
        images = tuple(folder / f"disk{n}.{disk.format}" for n, disk in enumerate(disks))
        for disk, image in zip(disks, images, strict=True):
            create = [qemu.img, "create", "-q", "-f", disk.format, image, f"{disk.size_mib}M"]
            await trio.run_process([str(word) for word in create])
        if isinstance(guest, Agent):
            await trio.run_process([*command("mke2fs"), "-q", "-t", "ext4", str(images[0])])
        log = f",logfile={folder}/qmp.log" if log_monitor else ""
        argv = (
            *(str(qemu.system), "-nodefaults", "-no-user-config", "-display", "none"),
            *machine_arguments(
                machine,
                ram,
                memory_mib=memory_mib,
                folder=folder,
                firmware=microvm_firmware() if machine == "microvm" else None,
            ),
            *("-accel", accel),
            *("-chardev", f"socket,id=qmp,path={folder}/qmp,server=on,wait=off{log}"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=qmp2,path={folder}/qmp2,server=on,wait=off"),
            *("-mon", "chardev=qmp2,mode=control"),
            *("-chardev", f"file,id=serial,path={folder}/serial,append=on"),
            *("-serial", "chardev:serial"),
            *disks_arguments(machine, disks, images),
            *_guest_arguments(guest, machine, folder),
            *extra,
            # the parent returns when the sockets listen; the VM is not our child
            *("-daemonize", "-pidfile", f"{folder}/pid"),
        )
        vm = Vm(folder, guest, argv, images)
        vm.serial_log.touch()
        try:
            with trio.fail_after(START_LIMIT_S):
                # what it prints goes through: an error is for the person who runs the test
                await trio.run_process(list(argv), stdin=subprocess.DEVNULL)
            yield vm
        finally:
            with trio.fail_after(KILL_LIMIT_S, shield=True):
                await vm.kill()
    finally:
        shutil.rmtree(folder)


def _guest_arguments(guest: Guest, machine: MachineType, folder: Path) -> list[str]:
    if isinstance(guest, Slots):
        # microvm has only its PIT to measure the CPU's clock by. On a busy host that fails, and
        # the kernel hangs; a wrong value it notices, and does with jiffies.
        clock = "tsc_early_khz=2000000 " if machine == "microvm" else ""
        options = (
            f"{QUICK_KERNEL} {clock}{guest.kernel_options} "  # the rest is what slots.c reads
            f"slots.memory_mib={guest.memory_mib} slots.dirty_mib_s={guest.dirty_mib_s} "
            f"slots.disk_pause_us={guest.disk_pause_us} slots.sign_ms={guest.sign_ms} "
            f"slots.flush={guest.flushes:d}"
        )
        return ["-kernel", str(kernel()), "-initrd", str(initrd()), "-append", options]
    if isinstance(guest, Agent):
        ports = (("agent", "org.qemu.guest_agent.0"), ("shell", "test"))
        return [
            *("-kernel", str(kernel()), "-initrd", str(agent_initrd()), "-append", QUICK_KERNEL),
            *("-device", "virtio-serial-pci"),
            *(word for port in ports for word in _port_arguments(*port, folder)),
        ]
    if isinstance(guest, Idle):
        words = ["-S"] if guest.is_held else []
        if guest.noise_mib:
            noise = folder / "noise"
            noise.write_bytes(os.urandom(guest.noise_mib << 20))
            words += ["-device", f"loader,file={noise},addr=0x100000,force-raw=on"]
        return words
    image = pages_boot_image()
    if guest.spin:
        image = folder / "pages.img"
        pages.write_slow_boot_image(pages_boot_image(), image, spin=guest.spin)
    return boot_disk_arguments(machine, image)


def _port_arguments(socket: str, name: str, folder: Path) -> list[str]:
    return [
        *("-chardev", f"socket,id={socket},path={folder}/{socket},server=on,wait=off"),
        *("-device", f"virtserialport,id=port-{socket},chardev={socket},name={name}"),
    ]


async def _kill(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        await trio.lowlevel.wait_readable(process)  # it has ended
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
