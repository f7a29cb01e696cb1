"""One look at all that must not grow: a daemon, a QEMU of its, and the files of both."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tests.harness import Vm
from tests.monitor import Monitor
from tests.real.footprint import OF_THE_DAEMON


@dataclass(frozen=True)
class Process:
    """What one process has."""

    resident_kib: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return cls(
            resident_kib=int(status["VmRSS"].split()[0]),
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(status["Threads"]),
        )


@dataclass(frozen=True)
class Kept:
    """What QEMU and the disks hold, where as many snapshots were kept: the same every time."""

    nodes: int
    """In QEMU's block graph."""
    fdsets: int
    layers: tuple[int, ...]
    """Images in the backing chain of each disk."""
    qemu_descriptors: int
    files: tuple[str, ...]
    """Kinds of files beside the disks and in the store, with how many there are of each."""


@dataclass(frozen=True)
class Sample:
    """One look."""

    kept: Kept
    daemon: Process
    qemu: Process
    disk_bytes: int
    """That all those files occupy."""
    record_bytes: int
    """The length of the daemon's records, those of the snapshots included."""


async def take_sample(monitor: Monitor, vm: Vm, daemon_pid: int, state_dir: Path) -> Sample:
    """Look, past qsnapd; nothing is under way."""
    qemu = Process.of(vm.pid)
    media = [d["inserted"] for d in await monitor.execute("query-block") if "inserted" in d]
    paths = [path for folder in (vm.folder, state_dir) for path in folder.rglob("*")]
    files = [path for path in paths if path.is_file() and path.name not in OF_THE_DAEMON]
    kinds = sorted(_kind(path) for path in files)
    return Sample(
        kept=Kept(
            nodes=len(await monitor.execute("query-named-block-nodes")),
            fdsets=len(await monitor.execute("query-fdsets")),
            layers=tuple(_layers(medium["image"]) for medium in media),
            qemu_descriptors=qemu.descriptors,
            files=tuple(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        ),
        daemon=Process.of(daemon_pid),
        qemu=qemu,
        disk_bytes=sum(_occupied_bytes(path) for path in files),
        record_bytes=sum(_size_bytes(path) for path in files if path.suffix == ".json"),
    )


def growth(numbers: Sequence[float]) -> float:
    """By how much the median of the last quarter lies above that of the second one."""
    quarter = len(numbers) // 4
    assert quarter, "too few to tell"
    return median(numbers[-quarter:]) - median(numbers[quarter : 2 * quarter])


def _layers(image: dict[str, Any]) -> int:
    below = image.get("backing-image")
    return 1 + (_layers(below) if below else 0)


def _kind(path: Path) -> str:
    """Its name, without what tells it from others of its kind."""
    first, after, _ = path.name.partition(".after-")
    return f"{first}{after}*" if after else path.name


def _size_bytes(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _occupied_bytes(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
