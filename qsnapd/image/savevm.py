"""What all of QEMU's migration streams share: head, table of RAM blocks, sections, tail.

The numbers are those of QEMU's migration/savevm.c and migration/ram.c; all are big-endian.
Nothing in an image is believed before it was checked: every read is bounded by the size of
the file, and the only failure of a reader is ImageInvalid (StoreError if the disk fails).
Files are read, never mapped: an I/O error in a mapping would be a signal that kills us.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

from qsnapd.errors import ImageInvalid, StoreError
from qsnapd.model.snapshot import RamBlock

_MAGIC = b"QEVM"
_VERSION = 3
_HEAD_LIMITS_BYTES = (64 << 10, 16 << 20)  # nearly always RAM begins after some hundred bytes
_TAIL_LIMIT_BYTES = 16 << 20  # a big machine's description takes some hundred KiB
_BLOCKS_LIMIT = 4096
_RAM_STARTS = re.compile(rb"\x01.{4}\x03ram\0\0\0\0\0\0\0\x04", re.DOTALL)
_LAST_FOOTER = re.compile(rb"\x7e.{4}\0", re.DOTALL)
_FLAG_MASK = 0xFFF


class Section(IntEnum):
    """The byte that every section begins with."""

    EOF = 0
    START = 1
    PART = 2
    END = 3
    FULL = 4
    SUBSECTION = 5
    DESCRIPTION = 6
    CONFIGURATION = 7
    COMMAND = 8
    FOOTER = 0x7E


class Flag(IntFlag):
    """The low bits of every record's address in a section of RAM."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    COMPRESSED = 0x100
    MULTIFD_FLUSH = 0x200


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verification found out about an image it did not refuse."""

    ram_blocks: tuple[RamBlock, ...]
    pages: int
    """How many pages of RAM the file holds."""
    unchecked: str | None = None
    """Why only the head and the tail could be checked, if so."""


@contextmanager
def reading() -> Iterator[None]:
    """Turn a failing disk into a StoreError."""
    try:
        yield
    except OSError as exc:
        raise StoreError(f"cannot read the memory image: {exc.strerror}") from exc


def never_cancelled() -> None:
    """The check of a caller who does not cancel."""


class Cursor:
    """A position in an image, and what can be read from there. Lives for one verification."""

    def __init__(self, fd: int, position: int = 0) -> None:
        self.fd = fd
        self.size_bytes = os.fstat(fd).st_size
        self.position = position

    def take(self, count: int, what: str) -> bytes:
        """Read *count* bytes and move behind them; *what* they are is for the message."""
        data = os.pread(self.fd, count, self.position)
        if len(data) < count:
            raise ImageInvalid(
                f"the memory image ends at byte {self.size_bytes}, in the middle of {what}"
            )
        self.position += count
        return data

    def number(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "big")

    def name(self, what: str) -> str:
        """A string of up to 255 bytes behind a byte that tells its length."""
        text = self.take(self.number(1, what), what)
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise ImageInvalid(f"{what} in the memory image is no text: {text!r}") from None

    def skip_footer(self, section_id: int) -> None:
        """Pass the footer behind a section, which very old machine types leave out."""
        if os.pread(self.fd, 1, self.position) != bytes([Section.FOOTER]):
            return
        start = self.position
        self.position += 1
        if (found := self.number(4, "a section's footer")) != section_id:
            raise ImageInvalid(
                f"the section of RAM that ends at byte {start} of the memory image is "
                f"numbered {section_id}, its footer says {found}"
            )


@dataclass(frozen=True, slots=True)
class Head:
    """All up to the table of RAM blocks."""

    machine: str | None
    capabilities: tuple[str, ...]
    ram_section_id: int
    table_offset_bytes: int


def read_head(fd: int) -> Head:
    """Read header and configuration, and find the section of RAM. Raises: ImageInvalid."""
    cursor = Cursor(fd)
    if cursor.take(4, "the magic number") != _MAGIC:
        raise ImageInvalid("this is not a memory image: it does not begin with QEMU's magic number")
    if (version := cursor.number(4, "the version")) != _VERSION:
        raise ImageInvalid(f"the memory image has version {version}, known is {_VERSION}")
    machine, capabilities = None, list[str]()
    if os.pread(fd, 1, cursor.position) == bytes([Section.CONFIGURATION]):
        cursor.position += 1
        machine = _read_machine(cursor)
        capabilities = _read_capabilities(cursor)
    start = _find_ram(cursor)
    return Head(
        machine=machine,
        capabilities=tuple(capabilities),
        ram_section_id=int.from_bytes(start[0][1:5], "big"),
        table_offset_bytes=cursor.position + start.end(),
    )


def _find_ram(cursor: Cursor) -> re.Match[bytes]:
    """Find how the section of RAM begins, from the cursor on.

    A search, since sections may come before it that do not tell how long they are.
    """
    for limit_bytes in _HEAD_LIMITS_BYTES:
        front = os.pread(cursor.fd, limit_bytes, cursor.position)
        if found := _RAM_STARTS.search(front):
            return found
    raise ImageInvalid("the memory image has no section of RAM where one must be")


def _read_machine(cursor: Cursor) -> str:
    length = cursor.number(4, "the configuration")
    if length > 255:
        raise ImageInvalid(f"the memory image has a machine type of {length} bytes")
    return cursor.take(length, "the machine type").decode(errors="replace")


def _read_capabilities(cursor: Cursor) -> list[str]:
    """The capabilities that source and destination must share, if the image lists them first."""
    start = cursor.position
    if os.pread(cursor.fd, 1, start) == bytes([Section.SUBSECTION]):
        cursor.position += 1
        if cursor.name("a part of the configuration") == "configuration/capabilities":
            cursor.take(4, "the version of the capabilities")
            count = cursor.number(4, "the number of capabilities")
            if count > 255:
                raise ImageInvalid(f"the memory image lists {count} capabilities")
            return [cursor.name("a capability") for _ in range(count)]
    cursor.position = start
    return []


def announced_blocks(cursor: Cursor, head: Head) -> Iterator[RamBlock]:
    """Read the table of RAM blocks, from *head* on.

    After each block the cursor is behind its entry; the consumer reads what its format
    adds there, and leaves the cursor where the next entry begins. Raises: ImageInvalid.
    """
    cursor.position = head.table_offset_bytes
    word = cursor.number(8, "the size of RAM")
    if word & _FLAG_MASK != Flag.MEM_SIZE:
        raise ImageInvalid("the section of RAM does not begin with the size of RAM")
    left_bytes = word & ~_FLAG_MASK
    seen = set[str]()
    while left_bytes:
        id_ = cursor.name("the name of a RAM block")
        size_bytes = cursor.number(8, "the size of a RAM block")
        if id_ in seen or len(seen) == _BLOCKS_LIMIT or size_bytes > left_bytes:
            raise ImageInvalid(f"the table of RAM blocks makes no sense at block {id_!r}")
        seen.add(id_)
        left_bytes -= size_bytes
        if "x-ignore-shared" in head.capabilities:
            cursor.take(8, "the address of a RAM block")
        yield RamBlock(id=id_, size_bytes=size_bytes)


def require_blocks(found: Sequence[RamBlock], expected: Sequence[RamBlock] | None) -> None:
    """Return if every *expected* block was *found* with its size; more may have been.

    Raises: ImageInvalid.
    """
    sizes = {block.id: block.size_bytes for block in found}
    for block in expected or ():
        # On machine types before 4.0 a block may be named by its backend's path.
        size_bytes = sizes.get(block.id, sizes.get(f"/objects/{block.id}"))
        if size_bytes is None:
            raise ImageInvalid(f"the memory image lacks the RAM block {block.id!r}")
        if size_bytes != block.size_bytes:
            raise ImageInvalid(
                f"the RAM block {block.id!r} has {size_bytes} bytes in the memory image "
                f"and {block.size_bytes} bytes in the VM"
            )


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of the stream, and the window of the file it was found in."""

    eof_offset_bytes: int
    """Where the marker is that follows the last device's state."""
    page_size_bytes: int | None
    window: bytes


def read_tail(fd: int, after_bytes: int) -> Tail:
    """Check that the stream ends as QEMU ends it, somewhere behind *after_bytes*.

    Raises: ImageInvalid: it was cut off.
    """
    size_bytes = os.fstat(fd).st_size
    start = max(after_bytes, size_bytes - _TAIL_LIMIT_BYTES)
    window = os.pread(fd, _TAIL_LIMIT_BYTES, start)
    # The description is JSON to the last byte of the file, behind its length: no NUL in it.
    marker = bytes([Section.EOF, Section.DESCRIPTION])
    at = window.rfind(marker)
    while at >= 0:
        text = at + len(marker) + 4
        if int.from_bytes(window[text - 4 : text], "big") == len(window) - text:
            page_size_bytes = _described_page_size(window[text:])
            return Tail(start + at, page_size_bytes, window)
        at = window.rfind(marker, 0, at)
    # With suppress-vmdesc=on, or cut right here: loading needs no more.
    if _LAST_FOOTER.fullmatch(window[-6:]):
        return Tail(size_bytes - 1, None, window)
    raise ImageInvalid(f"the memory image was cut off: its {size_bytes} bytes lack QEMU's ending")


def _described_page_size(text: bytes) -> int | None:
    try:
        description: Any = json.loads(text)
        devices, page_size_bytes = description["devices"], description.get("page_size")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        devices = page_size_bytes = None
    if not isinstance(devices, list) or not devices:
        raise ImageInvalid("the description of the devices at the end of the image is damaged")
    return page_size_bytes if isinstance(page_size_bytes, int) else None
