"""What the pages guest (pages.S) leaves in RAM and on its serial port, read and judged."""

import itertools
import mmap
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

BASE = 2 << 20
"""The first address the guest writes."""
LEFT_AT_THE_TOP_BYTES = 1 << 20
"""The last MiB, in which the firmware has its own; see pages.S."""
PAGE_BYTES = 4096
TAG = 0x5A9E0001
"""A page's tag is its address with these bits flipped."""

SPIN_OFFSET = 4
"""Where the boot sector holds how many turns the guest idles after each page."""


def write_slow_boot_image(original: Path, slow: Path, *, spin: int) -> None:
    """Copy the boot image so that the guest idles *spin* turns of a loop after each page."""
    image = bytearray(original.read_bytes())
    struct.pack_into("<I", image, SPIN_OFFSET, spin)
    slow.write_bytes(image)


@dataclass(frozen=True)
class PagesReport:
    """What a dump of the guest's RAM shows."""

    pages: int
    """How many pages were looked at."""
    counters: tuple[int, ...]
    """The counter's values in order of rising addresses, without repetitions."""
    torn: tuple[int, ...] = field(repr=False)
    """Addresses of pages without their tag."""

    @property
    def one_instant(self) -> bool:
        """Is this RAM as it was at one moment?

        Either all pages have one counter, or those up to some address have it and the
        pages above still have the one before.
        """
        steps = [above - below for below, above in itertools.pairwise(self.counters)]
        return self.pages > 0 and not self.torn and steps in ([], [-1])


def check_ram(raw: bytes | bytearray | mmap.mmap) -> PagesReport:
    """Judge *raw*: all of the guest's RAM, less than 3 GiB, as QMP's `pmemsave` writes it."""
    addresses = range(BASE, len(raw) - LEFT_AT_THE_TOP_BYTES, PAGE_BYTES)
    counters: list[int] = []
    torn: list[int] = []
    for address in addresses:
        tag, counter = struct.unpack_from("<II", raw, address)
        if tag != address ^ TAG:
            torn.append(address)
        elif not counters or counters[-1] != counter:
            counters.append(counter)
    return PagesReport(len(addresses), tuple(counters), tuple(torn))


@dataclass(frozen=True)
class PassesReport:
    """What the guest itself said on its serial port."""

    passes: tuple[int, ...]
    """The counter at the end of each complete pass."""
    torn: tuple[str, ...]

    @property
    def fine(self) -> bool:
        return bool(self.passes) and not self.torn


def read_serial(lines: Iterable[str]) -> PassesReport:
    """Judge the *lines* of the guest's serial port; those of the firmware are skipped."""
    passes: list[int] = []
    torn: list[str] = []
    for line in lines:
        if found := re.search(r"PASS ([0-9a-f]{8})$", line):
            passes.append(int(found[1], 16))
        elif "TORN" in line:
            torn.append(line)
    return PassesReport(tuple(passes), tuple(torn))
