"""Memory images and disk images: files that a guest, or another host, has had a part in.

An input is a file with holes in the spelling of `packed`: how large it is, then what lies where.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qsnapd.errors import ImageInvalid
from qsnapd.image import mapped_ram, stream
from qsnapd.image.files import data_extents
from qsnapd.image.mapped_ram import Layout, Writes, read_layout, seal
from qsnapd.image.punch import punch
from qsnapd.image.qcow2 import is_blank, is_qcow2, read_header
from qsnapd.image.savevm import Verified
from qsnapd.image.view import make_view
from tests.fuzz.targets.target import Feed, Target, plain, scratch
from tests.unit import crafted_images as crafted

_SIZE = struct.Struct(">Q")
_PIECE = struct.Struct(">QI")
_SIZE_MASK = (1 << 36) - 1
"""64 GiB: more takes time in proportion, as whoever announces it knows."""


def packed(size_bytes: int, pieces: list[tuple[int, bytes]]) -> bytes:
    spelled = (_PIECE.pack(offset, len(data)) + data for offset, data in pieces)
    return _SIZE.pack(size_bytes) + b"".join(spelled)


def packed_file(fd: int) -> bytes:
    size_bytes = os.fstat(fd).st_size
    extents = data_extents(fd, 0, size_bytes)
    pieces = [(start, os.pread(fd, end - start, start)) for start, end in extents]
    return packed(size_bytes, [(start, data.rstrip(b"\0")) for start, data in pieces])


@contextmanager
def unpacked(data: bytes) -> Iterator[int]:
    """The file that *data* spells, however badly."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, int.from_bytes(data[:8], "big") & _SIZE_MASK)
        at = _SIZE.size
        while at + _PIECE.size <= len(data):
            offset, length = _PIECE.unpack_from(data, at)
            at += _PIECE.size
            os.pwrite(fd, data[at : at + length], offset & _SIZE_MASK)
            at += length
        yield fd
    finally:
        os.close(fd)


# --- memory ----------------------------------------------------------------------------------


@contextmanager
def _open_mapped() -> Iterator[Feed]:
    with scratch() as folder:

        def feed(data: bytes) -> None:
            with unpacked(data) as fd, suppress(ImageInvalid):
                _feed_mapped(fd, folder / "view")

        yield feed


def _feed_mapped(fd: int, view: Path) -> None:
    layout = read_layout(fd)
    _require_apart(layout, os.fstat(fd).st_size)
    for writes in Writes:
        with suppress(ImageInvalid):
            _require_sense(mapped_ram.verify(fd, None, writes), layout)
    try:
        make_view(fd, layout, [layout.blocks[0].id], view)
        with open(view, "rb") as file:
            assert read_layout(file.fileno()).blocks == layout.blocks
    finally:
        view.unlink(missing_ok=True)
    if seal(fd):
        with suppress(ImageInvalid):
            mapped_ram.verify(fd, layout.ram_blocks, Writes.ONCE)
    if punch(fd):
        with suppress(ImageInvalid):
            mapped_ram.verify(fd, layout.ram_blocks, Writes.ONCE)


def _require_apart(layout: Layout, size_bytes: int) -> None:
    """Nothing overlaps, and all of it is in the file."""
    end = 0
    for block in layout.blocks:
        assert end <= block.bitmap_offset_bytes
        assert block.bitmap_offset_bytes + block.bitmap_size_bytes <= block.pages_offset_bytes
        end = block.end_offset_bytes
        assert end < size_bytes
    assert len({block.id for block in layout.blocks}) == len(layout.blocks)


def _require_sense(verified: Verified, layout: Layout) -> None:
    assert verified.ram_blocks == layout.ram_blocks
    assert 0 <= verified.pages <= sum(block.page_count for block in layout.blocks)


def feed_stream(data: bytes) -> None:
    with unpacked(data) as fd, suppress(ImageInvalid):
        verified = stream.verify(fd, None)
        assert verified.pages >= 0
        for block in verified.ram_blocks:
            assert block.size_bytes >= 0


def _mapped_seeds() -> list[bytes]:
    found = []
    with scratch() as folder:
        for bitmap, pages in ((0b101, {0: b"a", 2: b"b"}), (0, {0: b"a", 2: b"b"}), (0, {})):
            fd = crafted.mapped(folder / "image", pages, bitmap=bitmap, page_count=4)
            found.append(packed_file(fd))
            os.close(fd)
    return found


def _stream_seeds() -> list[bytes]:
    whole = crafted.stream(*crafted.WHOLE)
    small = crafted.stream(crafted.page(0, b"\0", block="r"), blocks={"r": 1})
    cut = crafted.stream(*crafted.WHOLE, ending=crafted.DEVICE[:-6])
    images = (whole, small, cut, crafted.stream(blocks={}))
    return [packed(len(image), [(0, image)]) for image in images]


# --- disks -----------------------------------------------------------------------------------


def feed_qcow2(data: bytes) -> None:
    with unpacked(data) as fd:
        is_qcow2(fd)
        with suppress(ImageInvalid):
            header = read_header(fd)
            assert header.virtual_size_bytes >= 0
            assert header.backing is None or 0 < len(header.backing) < 1024
        with suppress(ImageInvalid):
            is_blank(fd)


def _qcow2_seeds() -> list[bytes]:
    def header(version: int, *extensions: tuple[int, bytes], name: bytes = b"") -> bytes:
        body = b"".join(
            struct.pack(">II", kind, len(data)) + data + b"\0" * (-len(data) % 8)
            for kind, data in (*extensions, (0, b""))
        )
        length = 104 if version == 3 else 72
        at = length + len(body) if name else 0
        head = struct.pack(">4sIQIIQI", b"QFI\xfb", version, at, len(name), 16, 1 << 30, 0)
        head += struct.pack(">IQ", 1, 0x30000)
        return head.ljust(length - 4, b"\0") + struct.pack(">I", length) + body + name

    plain_ones = (
        header(3),
        header(3, (0xE2792ACA, b"qcow2"), name=b"base.qcow2"),
        header(3, (0x44415441, b"/etc/passwd")),
        header(2, name=b"base.raw"),
    )
    return [packed(0x40000, [(0, image)]) for image in plain_ones]


TARGETS = (
    Target("mapped-ram", _open_mapped, _mapped_seeds, runs_long=20_000, runs_short=300),
    Target("stream", plain(feed_stream), _stream_seeds, runs_long=20_000, runs_short=300),
    Target("qcow2", plain(feed_qcow2), _qcow2_seeds, runs_long=150_000),
)
