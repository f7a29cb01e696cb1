"""One VM, one daemon, and what there is to measure about them, side by side.

Everything is taken in rounds, each of which has every subject once, the order shifting from
round to round: what the machine does besides then disturbs all of them alike.
"""

import ctypes
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import trio

from qsnapd.control.client import Client
from qsnapd.errors import CapabilityMissing
from tests.bench.floor import BareMonitor, Disk, Floor
from tests.bench.notebook import QSNAPCTL, Measurement, Notebook, Subject
from tests.harness import Disk as NewDisk
from tests.harness import Slots, Vm, open_vm
from tests.parts import Qemu
from tests.system.processes import Daemon, open_daemon

MIB = 1 << 20
PAGE_BYTES = 4096
NAME = "bench"
DISKS = (NewDisk("qcow2"), NewDisk("raw"))


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    ram_mib: int
    dirtied_mib: int
    sized_rounds: int
    """The last so many rounds' images are kept until the end, and their RAM is counted."""


async def measure(
    qemu: Qemu, subjects: tuple[Subject, ...], scale: Scale, notebook: Notebook
) -> None:
    """Take *subjects* in rounds on a VM of their own and note every number."""
    guest = Slots(memory_mib=scale.dirtied_mib, dirty_mib_s=50, disk_pause_us=2000)
    async with open_vm(qemu, guest, disks=DISKS, memory_mib=scale.ram_mib) as vm:
        folder = vm.folder / "state"  # where the disks are, too
        folder.mkdir()
        async with open_daemon(folder, {NAME: vm}, qemu.img, log=notebook.log) as daemon:
            await daemon.wait_attached(NAME)
            await vm.wait_line(lambda line: line.startswith("OK"))
            rounds = Rounds(qemu, vm, daemon, subjects, scale, notebook)
            await trio.to_thread.run_sync(rounds.run)


class Rounds:
    """The measuring itself: blocking and plain, in a thread."""

    def __init__(
        self,
        qemu: Qemu,
        vm: Vm,
        daemon: Daemon,
        subjects: tuple[Subject, ...],
        scale: Scale,
        notebook: Notebook,
    ) -> None:
        self._qemu = qemu
        self._vm = vm
        self._daemon = daemon
        self._subjects = subjects
        self._scale = scale
        self._notebook = notebook
        self._folder = daemon.config.parent
        self._kept: list[tuple[Subject, int, str]] = []
        """Snapshots whose images still exist, with the round they are from."""
        self._dd_bytes = 0
        self._lists = count()

    def run(self) -> None:
        with Client(self._daemon.control) as client:
            with BareMonitor(self._vm.folder / "qmp2") as monitor:
                subjects = self._warm_up(client)
                floor = Floor(monitor, self._vm.folder, self._qemu.img)
                for number in range(self._scale.rounds):
                    for subject in _rotated(subjects, number):
                        trio.from_thread.check_cancelled()
                        self._note_list_time()
                        if subject.strategy is None:
                            self._note_pause(subject, number, floor.checkpoint(_disks(client)))
                        else:
                            self._take(client, monitor, subject, number)
            for subject, number, snapshot in self._kept:
                trio.from_thread.check_cancelled()
                ram_bytes = self._ram_in_use_bytes(client, snapshot)
                self._note(subject, number, ram_bytes=ram_bytes)

    def _warm_up(self, client: Client) -> tuple[Subject, ...]:
        """Take one that does not count: the first write-protection splits huge pages.

        Returns those subjects that this host can do: not each lets QEMU use userfaultfd.
        """
        subjects = self._subjects
        try:
            memory = _create(client, {"strategy": "background"})["memory"]
        except CapabilityMissing as exc:
            self._notebook.tell(f"QEMU {self._qemu}: neither background nor floor: {exc}")
            memory = _create(client, {"strategy": "stopped"})["memory"]
            subjects = tuple(s for s in subjects if s.strategy not in (None, "background"))
        self._dd_bytes = memory["allocated_bytes"]
        Path(memory["path"]).unlink()
        return subjects

    def _take(self, client: Client, monitor: BareMonitor, subject: Subject, number: int) -> None:
        """Take one by qsnapd, and time `dd` writing as many bytes before it or after it."""
        if number % 2:
            self._note(subject, number, dd_s=self._time_dd())
        request: dict[str, object] = {"strategy": subject.strategy, "hash_memory": subject.hashed}
        cpu = CpuClock(self._daemon.process.pid)
        with monitor.pause() as pause:
            begun_s = time.monotonic()
            snapshot = _create(client, request)
            total_s = time.monotonic() - begun_s
        cpu_s, qemu_img_s = cpu.read()
        image = Path(snapshot["memory"]["path"])
        self._dd_bytes = image.stat().st_blocks * 512
        self._note_pause(subject, number, pause.ms)
        self._note(
            subject,
            number,
            total_s=total_s,
            cpu_s=cpu_s,
            qemu_img_s=qemu_img_s,
            image_bytes=self._dd_bytes,
        )
        if not number % 2:
            self._note(subject, number, dd_s=self._time_dd())
        if number >= self._scale.rounds - self._scale.sized_rounds:
            self._kept.append((subject, number, snapshot["name"]))
        else:
            image.unlink()  # or the bench would need room for them all

    def _note(self, subject: Subject, number: int, **values: float) -> None:
        for measure, value in values.items():
            measurement = Measurement(self._qemu.version, subject.name, number, measure, value)
            self._notebook.measurements.append(measurement)

    def _note_pause(self, subject: Subject, number: int, pause_ms: float) -> None:
        self._note(subject, number, pause_ms=pause_ms)
        where = f"QEMU {self._qemu}, round {number + 1} of {self._scale.rounds}"
        self._notebook.tell(f"{where}: {subject.name} paused {pause_ms:.1f} ms")

    def _note_list_time(self) -> None:
        begun_s = time.monotonic()
        subprocess.run(self._daemon.command("list"), stdout=subprocess.DEVNULL, check=True)
        self._note(QSNAPCTL, next(self._lists), list_s=time.monotonic() - begun_s)

    def _time_dd(self) -> float:
        """Time the plain writing of as many bytes as the latest image has."""
        target = self._folder / "dd"
        words = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", "iflag=count_bytes"]
        words += [f"count={self._dd_bytes}", "conv=fsync", "status=none"]
        begun_s = time.monotonic()
        subprocess.run(words, check=True)
        took_s = time.monotonic() - begun_s
        target.unlink()
        return took_s

    def _ram_in_use_bytes(self, client: Client, snapshot: str) -> int:
        """Return the size of all pages that were not zero at the instant of *snapshot*.

        Asked of a QEMU that has loaded it and stands still, so that neither the image's
        layout nor what qsnapd believes of it matters.
        """
        request = {"name": snapshot, "state": "paused"}
        for _ in client.stream("RevertSnapshot", vm=NAME, request=request):
            pass
        dump = self._folder / "ram"
        with BareMonitor(self._vm.folder / "qmp2") as monitor:
            size_bytes = self._scale.ram_mib * MIB
            monitor.send("pmemsave", {"val": 0, "size": size_bytes, "filename": str(dump)})
        zero = bytes(PAGE_BYTES)
        with dump.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as ram:
            pages = range(0, len(ram), PAGE_BYTES)
            in_use = sum(ram[start : start + PAGE_BYTES] != zero for start in pages)
        dump.unlink()
        return in_use * PAGE_BYTES


class CpuClock:
    """The CPU time a process uses, and its children, from now on."""

    def __init__(self, pid: int) -> None:
        clock = ctypes.c_int()
        # finer than utime and stime of /proc/PID/stat, which count in steps of 10 ms
        if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise ProcessLookupError(pid)
        self._clock = clock.value
        self._stat = Path(f"/proc/{pid}/stat")
        self._begin = self._now()

    def read(self) -> tuple[float, float]:
        """Return seconds of the process itself, and of its children that have ended."""
        own_s, children_s = self._now()
        return own_s - self._begin[0], children_s - self._begin[1]

    def _now(self) -> tuple[float, float]:
        fields = self._stat.read_text().rpartition(")")[2].split()
        ticks = int(fields[13]) + int(fields[14])  # cutime, cstime
        return time.clock_gettime(self._clock), ticks / os.sysconf("SC_CLK_TCK")


def _create(client: Client, request: dict[str, object]) -> dict[str, Any]:
    """Take a checkpoint by qsnapd, listening to its progress as qsnapctl does; return it."""
    *_, last = client.stream("CreateSnapshot", vm=NAME, request=request)
    snapshot: dict[str, Any] = last["snapshot"]
    return snapshot


def _rotated(subjects: tuple[Subject, ...], number: int) -> Iterator[Subject]:
    at = number % len(subjects)
    return iter(subjects[at:] + subjects[:at])


def _disks(client: Client) -> list[Disk]:
    """Return the VM's disks as they are now; qsnapd knows, whoever has moved them."""
    disks: list[dict[str, Any]] = client.call("ListDisks", vm=NAME)["disks"]
    return [
        Disk(disk["node"], Path(disk["path"]), disk["format"], disk["virtual_size_bytes"])
        for disk in disks
    ]
