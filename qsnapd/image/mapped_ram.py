"""QEMU's mapped-ram images: every page of RAM at a fixed offset, a bitmap saying which are there.

Written after docs/devel/migration/mapped-ram.rst and real files. With background-snapshot
QEMU writes every page but never the bitmaps; since it writes a page at most once, and a page
it does not write is zero, the holes of the file tell what the bitmaps should: `seal`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from qsnapd.errors import ImageInvalid
from qsnapd.image.files import data_extents, sync_file, write_all
from qsnapd.image.savevm import (
    Cursor,
    Flag,
    Verified,
    announced_blocks,
    read_head,
    read_tail,
    reading,
    require_blocks,
)
from qsnapd.model.snapshot import RamBlock

_HEADER_VERSION = 1
_WORD_BITS = 64  # QEMU's bitmaps are arrays of unsigned long, little-endian on all our hosts
_CHUNK_PAGES = 1 << 23  # bounds the memory used for bitmaps, whatever the size of a guest
_COMPARE_BYTES = 1 << 20
_ZEROS = bytes(_COMPARE_BYTES)


class Writes(Enum):
    """How often a strategy writes one page, hence what a clear bit promises."""

    ONCE = "once"
    """`background` (sealed), `stopped`, whatever was punched: a page whose bit is clear reads
    as zeros."""
    REPEATED = "repeated"
    """`precopy`: it may hold what the page was before it became zero; see `image.punch`."""


@dataclass(frozen=True, slots=True)
class MappedBlock:
    """Where one block of guest RAM lies in the file."""

    id: str
    size_bytes: int
    page_size_bytes: int
    bitmap_offset_bytes: int
    pages_offset_bytes: int

    @property
    def page_count(self) -> int:
        return self.size_bytes // self.page_size_bytes

    @property
    def bitmap_size_bytes(self) -> int:
        return -(-self.page_count // _WORD_BITS) * _WORD_BITS // 8

    @property
    def end_offset_bytes(self) -> int:
        return self.pages_offset_bytes + self.size_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in one mapped-ram image."""

    machine: str | None
    ram_section_id: int
    blocks: tuple[MappedBlock, ...]
    """In the order of the file; none overlaps another or the end of the file."""

    @property
    def ram_blocks(self) -> tuple[RamBlock, ...]:
        return tuple(RamBlock(id=b.id, size_bytes=b.size_bytes) for b in self.blocks)

    @property
    def rest_offset_bytes(self) -> int:
        """Where the stream goes on behind the last page."""
        return self.blocks[-1].end_offset_bytes


def read_layout(fd: int) -> Layout:
    """Read where the blocks lie. Raises: ImageInvalid: nonsense, or not a mapped-ram image."""
    with reading():
        head = read_head(fd)
        if "mapped-ram" not in head.capabilities:
            raise ImageInvalid("the memory image was not saved with mapped-ram")
        cursor = Cursor(fd)
        blocks = []
        for announced in announced_blocks(cursor, head):
            block = _read_entry(cursor, announced)
            blocks.append(block)
            cursor.position = block.end_offset_bytes
        if not blocks:
            raise ImageInvalid("the memory image holds no RAM")
        return Layout(head.machine, head.ram_section_id, tuple(blocks))


def _read_entry(cursor: Cursor, announced: RamBlock) -> MappedBlock:
    what = f"the header of the RAM block {announced.id!r}"
    if (version := cursor.number(4, what)) != _HEADER_VERSION:
        raise ImageInvalid(f"{what} has version {version}, known is {_HEADER_VERSION}")
    block = MappedBlock(
        id=announced.id,
        size_bytes=announced.size_bytes,
        page_size_bytes=cursor.number(8, what),
        bitmap_offset_bytes=cursor.number(8, what),
        pages_offset_bytes=cursor.number(8, what),
    )
    page_size_bytes = block.page_size_bytes
    if page_size_bytes.bit_count() != 1 or not 1 << 10 <= page_size_bytes <= 1 << 16:
        raise ImageInvalid(f"{what} has a page size of {page_size_bytes} bytes")
    if block.size_bytes % page_size_bytes or block.pages_offset_bytes % page_size_bytes:
        raise ImageInvalid(f"{what} puts pages at offsets that are no multiples of their size")
    if (
        block.bitmap_offset_bytes < cursor.position
        or block.bitmap_offset_bytes + block.bitmap_size_bytes > block.pages_offset_bytes
    ):
        raise ImageInvalid(f"{what} lets bitmap, pages and headers overlap")
    if block.end_offset_bytes >= cursor.size_bytes:
        raise ImageInvalid(
            f"the memory image was cut off: it has {cursor.size_bytes} bytes, and the RAM "
            f"block {block.id!r} ends only at {block.end_offset_bytes}"
        )
    return block


def seal(fd: int) -> bool:
    """Write the bitmaps that QEMU leaves out of a `background` image; durable on return.

    Preconditions: QEMU is done with the file, which was empty and ours when it began. Never
    for `precopy`: there a page may be in the file that has become zero since.
    On success: loads as what the guest was. False: QEMU wrote the bitmaps, nothing changed.
    Raises: ImageInvalid; StoreError.
    """
    layout = read_layout(fd)
    with reading():
        sync_file(fd)  # only then do the extents tell what is in the file
        chunks = [(block, first) for block in layout.blocks for first in _chunks(block)]
        if any(any(_bitmap(fd, block, first)) for block, first in chunks):
            return False
        for block, first in chunks:
            bits = _pages_with_data(fd, block, first)
            write_all(fd, bits, block.bitmap_offset_bytes + first // 8)
        sync_file(fd)
        return True


def verify(fd: int, ram_blocks: Sequence[RamBlock] | None, writes: Writes) -> Verified:
    """Check a complete image: what loading it relies on, without reading its pages.

    *ram_blocks* must be in it with their sizes; None: whatever it says of itself.
    Every bit in a bitmap must have a page in the file. If pages are written ONCE, every page
    without a bit must read as zeros; only pages that look otherwise are read.
    Raises: ImageInvalid: with what is wrong, for people; StoreError: the disk failed.
    """
    layout = read_layout(fd)
    require_blocks(layout.ram_blocks, ram_blocks)
    with reading():
        pages = sum(
            _verify_bitmap(fd, block, first, writes)
            for block in layout.blocks
            for first in _chunks(block)
        )
        _verify_rest(fd, layout)
    return Verified(layout.ram_blocks, pages)


def pages_left_over(fd: int, block: MappedBlock) -> Iterator[tuple[int, int]]:
    """The ranges of pages (from, to) that are in the file, but not in the bitmap."""
    for first in _chunks(block):
        claimed = int.from_bytes(_bitmap(fd, block, first), "little")
        present = int.from_bytes(_pages_with_data(fd, block, first), "little")
        for start, end in _runs_of_ones(present & ~claimed):
            yield first + start, first + end


def _verify_bitmap(fd: int, block: MappedBlock, first: int, writes: Writes) -> int:
    """Check the bits of the pages from *first* on; return how many are set."""
    claimed = int.from_bytes(_bitmap(fd, block, first), "little")
    present = int.from_bytes(_pages_with_data(fd, block, first), "little")
    if lost := claimed & ~present:
        page = first + (lost & -lost).bit_length() - 1
        raise ImageInvalid(
            f"page {page} of the RAM block {block.id!r} should be in the memory image, but is not"
        )
    if writes is Writes.ONCE:
        for start, end in _runs_of_ones(present & ~claimed):
            _require_zeros(fd, block, first + start, first + end)
    return claimed.bit_count()


def _require_zeros(fd: int, block: MappedBlock, first: int, end: int) -> None:
    # Blocks of the file system that are larger than a page make zero pages look like data.
    stop = block.pages_offset_bytes + end * block.page_size_bytes
    offset = block.pages_offset_bytes + first * block.page_size_bytes
    while offset < stop:
        data = os.pread(fd, min(_COMPARE_BYTES, stop - offset), offset)
        if not data or data != _ZEROS[: len(data)]:
            raise ImageInvalid(
                f"the memory image holds pages of the RAM block {block.id!r} (page {first} or "
                "after) that its bitmap leaves out: it was not sealed"
            )
        offset += len(data)


def _verify_rest(fd: int, layout: Layout) -> None:
    """Check that the section of RAM ends behind the pages, and that devices follow."""
    cursor = Cursor(fd, layout.rest_offset_bytes)
    while (flag := cursor.number(8, "the end of RAM")) != Flag.EOS:
        if flag != Flag.MULTIFD_FLUSH:
            raise ImageInvalid(f"unknown record {flag:#x} behind the pages of the memory image")
    cursor.skip_footer(layout.ram_section_id)
    if cursor.position >= read_tail(fd, cursor.position).eof_offset_bytes:
        raise ImageInvalid("the memory image lacks the state of the devices")


def _chunks(block: MappedBlock) -> range:
    return range(0, block.page_count, _CHUNK_PAGES)


def _chunk_bytes(block: MappedBlock, first: int) -> int:
    return min(block.bitmap_size_bytes - first // 8, _CHUNK_PAGES // 8)


def _bitmap(fd: int, block: MappedBlock, first: int) -> bytes:
    """The bitmap in the file, from page *first* to the end of its chunk."""
    return Cursor(fd, block.bitmap_offset_bytes + first // 8).take(
        _chunk_bytes(block, first), "a bitmap"
    )


def _pages_with_data(fd: int, block: MappedBlock, first: int) -> bytearray:
    """The bitmap as it should be, if everything that is no hole is a page."""
    page_size_bytes = block.page_size_bytes
    start = block.pages_offset_bytes + first * page_size_bytes
    end = min(start + _CHUNK_PAGES * page_size_bytes, block.end_offset_bytes)
    bits = bytearray(_chunk_bytes(block, first))
    for data, hole in data_extents(fd, start, end):
        _set_bits(bits, (data - start) // page_size_bytes, -((start - hole) // page_size_bytes))
    return bits


def _set_bits(bits: bytearray, first: int, end: int) -> None:
    """Set the bits *first* to *end* - 1, whole bytes at a time."""
    head, tail = first // 8, end // 8
    head_mask, tail_mask = 0xFF << first % 8 & 0xFF, 0xFF >> 8 - end % 8
    if head == tail:
        bits[head] |= head_mask & tail_mask
        return
    bits[head] |= head_mask
    bits[head + 1 : tail] = b"\xff" * (tail - head - 1)
    if tail_mask:
        bits[tail] |= tail_mask


def _runs_of_ones(number: int) -> Iterator[tuple[int, int]]:
    """The ranges of bits that are set, lowest first."""
    digits = bin(number)[:1:-1]
    end = 0
    while (start := digits.find("1", end)) >= 0:
        end = digits.find("0", start)
        if end < 0:
            end = len(digits)
        yield start, end
