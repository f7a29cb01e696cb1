"""Views of memory images: all but the pages of some blocks."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsnapd.errors import TargetRefused
from qsnapd.image.files import allocated_bytes
from qsnapd.image.mapped_ram import read_layout, seal
from qsnapd.image.view import make_view
from tests.unit.crafted_images import (
    EOS,
    FOOTER,
    MIB,
    PAGE,
    RAM_END,
    RAM_START,
    be,
    head,
    named,
    tail,
)

PAGES_EACH = 512
Pages = Mapping[str, set[int]]
"""Which pages of each block are in the image."""


def write_image(path: Path, blocks: Pages) -> int:
    """Write a sealed image of blocks of 2 MiB; return a descriptor of it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    front = head("mapped-ram") + RAM_START + be(len(blocks) * PAGES_EACH * PAGE | 4, 8)
    os.pwrite(fd, front, 0)
    position = len(front)
    for id_, pages in blocks.items():
        entry = named(id_) + be(PAGES_EACH * PAGE, 8) + be(1, 4) + be(PAGE, 8)
        bitmap_offset = position + len(entry) + 16
        pages_offset = -(-(bitmap_offset + PAGES_EACH // 8) // MIB) * MIB
        os.pwrite(fd, entry + be(bitmap_offset, 8) + be(pages_offset, 8), position)
        for page in pages:
            os.pwrite(fd, bytes([page % 255 + 1]) * PAGE, pages_offset + page * PAGE)
        position = pages_offset + PAGES_EACH * PAGE
    os.pwrite(fd, EOS + FOOTER + RAM_END + EOS + FOOTER + tail(), position)
    seal(fd)
    return fd


def expected_view(image: bytes, fd: int, left_out: set[str]) -> bytes:
    """Compute it another way: the image, with zeros in place of what is left out."""
    expected = bytearray(image)
    for block in read_layout(fd).blocks:
        if block.id in left_out:
            bitmap_end = block.bitmap_offset_bytes + block.bitmap_size_bytes
            expected[block.bitmap_offset_bytes : bitmap_end] = bytes(block.bitmap_size_bytes)
            expected[block.pages_offset_bytes : block.end_offset_bytes] = bytes(block.size_bytes)
    return bytes(expected)


blocks = st.dictionaries(
    st.sampled_from(["pc.ram", "vga.vram", "/objects/m0"]),
    st.sets(st.integers(0, PAGES_EACH - 1), max_size=20),
    min_size=1,
)


@given(blocks=blocks, left_out=st.sets(st.sampled_from(["pc.ram", "/objects/m0"])))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_view_is_the_image_without_the_pages_of_some_blocks(
    tmp_path: Path, blocks: Pages, left_out: set[str]
) -> None:
    image, view = tmp_path / "memory.img", tmp_path / "view"
    fd = write_image(image, blocks)
    before = image.read_bytes()
    copied = make_view(fd, read_layout(fd), left_out, view)
    kept_pages = sum(len(pages) for id_, pages in blocks.items() if id_ not in left_out)
    assert copied >= kept_pages * PAGE
    assert view.read_bytes() == expected_view(before, fd, left_out)
    assert image.read_bytes() == before
    assert stat.S_IMODE(view.stat().st_mode) == 0o600
    view.unlink()
    os.close(fd)


def test_view_takes_no_room_for_what_it_leaves_out(tmp_path: Path) -> None:
    fd = write_image(tmp_path / "memory.img", {"pc.ram": set(range(PAGES_EACH)), "small": {3}})
    make_view(fd, read_layout(fd), ["pc.ram"], tmp_path / "view")
    with (tmp_path / "view").open("rb") as view:
        os.fsync(view.fileno())
        assert os.fstat(view.fileno()).st_size == os.fstat(fd).st_size
        assert allocated_bytes(view.fileno()) < 64 << 10
    os.close(fd)


def test_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    fd = write_image(tmp_path / "memory.img", {"pc.ram": {1}})
    view = tmp_path / "view"
    view.write_text("somebody's")
    with pytest.raises(TargetRefused, match="exists already"):
        make_view(fd, read_layout(fd), ["pc.ram"], view)
    assert view.read_text() == "somebody's"
    os.close(fd)


def test_view_that_fails_is_removed(tmp_path: Path) -> None:
    with (tmp_path / "memory.img").open("wb") as unreadable:
        other = write_image(tmp_path / "other.img", {"pc.ram": {1}})
        layout = read_layout(other)
        os.close(other)
        os.write(unreadable.fileno(), b"x")
        with pytest.raises(Exception, match="cannot read the memory image"):
            make_view(unreadable.fileno(), layout, ["pc.ram"], tmp_path / "view")
    assert not (tmp_path / "view").exists()
