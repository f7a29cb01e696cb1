"""What the slots guest (slots.c) says on its serial port, read and judged."""

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

SLOTS = 256
_SLOT = struct.Struct("<QQQQ")
"""How a slot begins: a magic number, disk, slot, sequence number."""
_MAGIC = 0x51534E4150534C54


@dataclass(frozen=True)
class Ready:
    """The guest has found its disks and begins."""

    disks: int
    slots_per_disk: int
    pages: int


@dataclass(frozen=True)
class Okay:
    """One sign of life, about twice a second of guest time."""

    uptime_ms: int
    """By the guest's clock, which stands while the guest does."""
    disk_writes: int
    generation: int
    """Complete walks over the memory that is dirtied."""
    rounds: int
    """Complete walks over all slots, of the disk that has had the fewest."""


@dataclass(frozen=True)
class SlotsReport:
    """All that the guest has said."""

    ready: Ready | None
    ok_lines: tuple[Okay, ...]
    bad_lines: tuple[str, ...]
    """Complaints: LOST, FUTURE, TORN and ERROR, and the kernel's own."""

    @property
    def fine(self) -> bool:
        return bool(self.ok_lines) and not self.bad_lines


_COMPLAINT = re.compile(
    r"^(LOST|FUTURE|TORN|ERROR) |Kernel panic|Oops|Out of memory|I/O error|blocked for more than"
)


def is_complaint(line: str) -> bool:
    """Does *line* say that something is wrong?"""
    return _COMPLAINT.search(line) is not None


def parse_okay(line: str) -> Okay | None:
    """Return what an OK line says, or None if *line* is not one."""
    found = re.fullmatch(r"OK (\d+) (\d+) (\d+) (\d+)", line.strip())
    return Okay(*map(int, found.groups())) if found else None


def least_writes(disk: bytes) -> int:
    """Return how often that slot of a disk was written that was written the least.

    *disk* is all that it holds. Raises: ValueError: a slot is none, so something was lost.
    """
    stride_bytes = len(disk) // SLOTS
    writes: list[int] = []
    for slot in range(SLOTS):
        magic, _, number, seq = _SLOT.unpack_from(disk, slot * stride_bytes)
        if (magic, number) != (_MAGIC, slot):
            raise ValueError(f"slot {slot} of the disk was never written")
        writes.append(seq)
    return min(writes)


def read_serial(lines: Iterable[str]) -> SlotsReport:
    """Judge the *lines* of the guest's serial port; those of firmware and kernel are skipped."""
    ready: Ready | None = None
    ok_lines: list[Okay] = []
    bad_lines: list[str] = []
    for line in lines:
        if found := re.fullmatch(r"READY (\d+) (\d+) (\d+)", line.strip()):
            ready = Ready(*map(int, found.groups()))
        elif okay := parse_okay(line):
            ok_lines.append(okay)
        elif is_complaint(line):
            bad_lines.append(line)
    return SlotsReport(ready, tuple(ok_lines), tuple(bad_lines))
