"""Room that is reserved in a file, without anybody taking it for what is in the file."""

import ctypes
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnapd.errors import StoreError, StoreFull
from qsnapd.image import reserve as module
from qsnapd.image.files import allocated_bytes, data_extents
from qsnapd.image.reserve import give_back, reserve

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def nothing() -> None:
    pass


def pages_with_data(fd: int) -> set[int]:
    extents = data_extents(fd, 0, os.fstat(fd).st_size)
    return {page for start, end in extents for page in range(start // PAGE, -(-end // PAGE))}


def test_the_size_stays(fd: int) -> None:
    assert reserve(fd, 8 * MIB, "it")
    assert os.fstat(fd).st_size == 0
    assert allocated_bytes(fd) >= 8 * MIB


def test_holes_stay_holes(fd: int) -> None:
    """That is what sealing an image relies on."""
    pages = set(random.Random(1).sample(range(1024), 100))
    assert reserve(fd, 16 * MIB, "it")
    for page in pages:
        os.pwrite(fd, b"x" * PAGE, page * PAGE)
    os.ftruncate(fd, 5 * MIB)
    os.fsync(fd)
    assert pages_with_data(fd) == pages
    give_back(fd, nothing)
    assert pages_with_data(fd) == pages
    assert all(os.pread(fd, PAGE, page * PAGE) == b"x" * PAGE for page in pages)
    assert os.fstat(fd).st_size == 5 * MIB
    assert allocated_bytes(fd) < 2 * len(pages) * PAGE


@pytest.mark.parametrize(
    ("number", "failure"),
    [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, StoreError)],
)
def test_why_it_fails(
    number: int, failure: type[StoreError], fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_libc", Failing())
    monkeypatch.setattr(ctypes, "get_errno", lambda: number)
    with pytest.raises(StoreError) as raised:
        reserve(fd, MIB, "it")
    assert type(raised.value) is failure


def test_a_file_system_that_cannot(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_libc", Failing())
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EOPNOTSUPP)
    assert not reserve(fd, MIB, "it")


class Failing:
    def fallocate(self, *_arguments: int) -> int:
        return -1
