"""Pages that QEMU has given up in an image are given back, and nothing else changes."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsnapd.errors import ImageInvalid, StoreError
from qsnapd.image import mapped_ram, punch
from qsnapd.image.files import data_extents
from qsnapd.image.mapped_ram import Writes
from tests.unit.crafted_images import MIB, PAGE, mapped

PAGE_COUNT = 300


def write_image(path: Path, written: set[int], claimed: set[int]) -> int:
    """Write an image with pages of which only some are in the bitmap; return a descriptor."""
    bitmap = sum(1 << page for page in claimed)
    fd = mapped(path, dict.fromkeys(written, b"x"), bitmap=bitmap, page_count=PAGE_COUNT)
    os.fsync(fd)
    return fd


def pages_in(fd: int) -> set[int]:
    end = MIB + PAGE_COUNT * PAGE
    return {
        page
        for data, hole in data_extents(fd, MIB, end)
        for page in range((data - MIB) // PAGE, -((MIB - hole) // PAGE))
    }


numbers = st.sets(st.integers(0, PAGE_COUNT - 1))


@given(written=numbers, given_up=numbers)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_the_bitmap_leaves_out_becomes_a_hole(
    tmp_path: Path, written: set[int], given_up: set[int]
) -> None:
    claimed = written - given_up
    fd = write_image(tmp_path / "memory.img", written, claimed)
    size_bytes = os.fstat(fd).st_size
    if written & given_up:
        with pytest.raises(ImageInvalid, match="leaves out"):
            mapped_ram.verify(fd, None, Writes.ONCE)
    assert punch.punch(fd)
    assert pages_in(fd) == claimed
    assert os.fstat(fd).st_size == size_bytes
    assert mapped_ram.verify(fd, None, Writes.ONCE).pages == len(claimed)
    for page in claimed:
        assert os.pread(fd, PAGE, MIB + page * PAGE) == b"x" * PAGE
    os.close(fd)


def test_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_ram, "_CHUNK_PAGES", 64)
    fd = write_image(tmp_path / "memory.img", set(range(PAGE_COUNT)), {0, 63, 64, 299})
    assert punch.punch(fd)
    assert pages_in(fd) == {0, 63, 64, 299}
    os.close(fd)


def test_file_system_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = write_image(tmp_path / "memory.img", {1, 2}, {1})
    monkeypatch.setattr(punch, "punch_hole", lambda fd, offset, length: False)
    assert not punch.punch(fd)
    assert pages_in(fd) == {1, 2}
    os.close(fd)


def test_what_the_system_says_about_holes(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="seek") as refused:
        punch.punch_hole(writer, 0, 1)
    assert refused.value.errno == errno.ESPIPE
    os.close(reader)
    os.close(writer)
    fd = write_image(tmp_path / "memory.img", {1, 2}, {1})
    os.close(fd)
    read_only = os.open(tmp_path / "memory.img", os.O_RDONLY)
    with pytest.raises(StoreError):
        punch.punch(read_only)
    os.close(read_only)


def test_cancelled_between_two_holes(tmp_path: Path) -> None:
    fd = write_image(tmp_path / "memory.img", {1, 5, 9}, {9})
    checks = iter([None, KeyboardInterrupt()])

    def check() -> None:
        if error := next(checks):
            raise error

    with pytest.raises(KeyboardInterrupt):
        punch.punch(fd, check)
    assert pages_in(fd) == {5, 9}
    assert mapped_ram.verify(fd, None, Writes.REPEATED).pages == 1
    os.close(fd)
