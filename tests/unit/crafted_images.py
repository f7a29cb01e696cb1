"""Memory images as QEMU writes them, small and made by hand, with any part replaceable."""

import os
from collections.abc import Mapping
from pathlib import Path

PAGE = 4096
MIB = 1 << 20
RAM = "pc.ram"
DESCRIPTION = b'{"page_size": 4096, "devices": [{"name": "timer"}]}'


def be(number: int, width: int) -> bytes:
    return number.to_bytes(width, "big")


def named(text: str) -> bytes:
    return be(len(text), 1) + text.encode()


def head(*capabilities: str, version: int = 3, config: bool = True) -> bytes:
    """Up to where the section of RAM begins."""
    data = b"QEVM" + be(version, 4)
    if config:
        data += b"\x07" + be(2, 4) + b"pc"
        if capabilities:
            data += b"\x05" + named("configuration/capabilities") + be(1, 4)
            data += be(len(capabilities), 4) + b"".join(map(named, capabilities))
    return data


RAM_START = b"\x01" + be(2, 4) + named("ram") + be(0, 4) + be(4, 4)
RAM_PART = b"\x02" + be(2, 4)
RAM_END = b"\x03" + be(2, 4)
EOS = be(0x10, 8)
FOOTER = b"\x7e" + be(2, 4)
DEVICE = b"\x04" + be(5, 4) + named("timer") + be(0, 4) + be(2, 4) + b"state" + b"\x7e" + be(5, 4)


def tail(description: bytes = DESCRIPTION) -> bytes:
    return DEVICE + b"\0\x06" + be(len(description), 4) + description


def table(blocks: Mapping[str, int]) -> bytes:
    """The table of RAM blocks of a stream, {id: pages}."""
    data = be(sum(blocks.values()) * PAGE | 4, 8)
    return data + b"".join(named(id_) + be(pages * PAGE, 8) for id_, pages in blocks.items())


def page(number: int, fill: bytes = b"x", block: str = "") -> bytes:
    """One record of a page; it names its block if one is given."""
    if fill == b"\0":
        flags, body = 0x02, b"\0"
    else:
        flags, body = 0x08, fill * PAGE
    return be(number * PAGE | flags | (0 if block else 0x20), 8) + (
        named(block) + body if block else body
    )


def stream(*records: bytes, blocks: Mapping[str, int] | None = None, ending: bytes = b"") -> bytes:
    """A stream of one block of four pages, unless told otherwise."""
    table_ = table({RAM: 4} if blocks is None else blocks)
    start = RAM_START + table_ + EOS + FOOTER
    return head() + start + RAM_PART + b"".join(records) + EOS + FOOTER + (ending or tail())


WHOLE = (page(0, block=RAM), page(1, b"\0"), page(2), page(3, b"\0"))


def mapped(
    path: Path,
    pages: Mapping[int, bytes],
    *,
    bitmap: int = 0,
    page_count: int = 100,
    page_size: int = PAGE,
    bitmap_offset: int | None = None,
    pages_offset: int = MIB,
    rest: bytes | None = None,
    header_version: int = 1,
) -> int:
    """Write a mapped-ram image of one block, holding *pages*; return a descriptor of it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    front = head("mapped-ram") + RAM_START + be(page_count * PAGE | 4, 8)
    front += named(RAM) + be(page_count * PAGE, 8)
    if bitmap_offset is None:
        bitmap_offset = len(front) + 28
    front += be(header_version, 4) + be(page_size, 8) + be(bitmap_offset, 8) + be(pages_offset, 8)
    if bitmap:
        size = -(-page_count // 64) * 8
        os.pwrite(fd, bitmap.to_bytes(size, "little"), bitmap_offset)
    os.pwrite(fd, front, 0)
    for number, fill in pages.items():
        os.pwrite(fd, fill * PAGE, pages_offset + number * PAGE)
    if rest is None:
        rest = EOS + FOOTER + RAM_END + EOS + FOOTER + tail()
    os.pwrite(fd, rest, pages_offset + page_count * PAGE)
    return fd
