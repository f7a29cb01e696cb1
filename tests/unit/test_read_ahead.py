"""Reading an image ahead: all that it holds, nothing else, and not faster than allowed."""

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from qsnapd.errors import StoreError
from qsnapd.snapshot.restoring import read_ahead as module
from qsnapd.snapshot.restoring.read_ahead import read_ahead

MIB = 1 << 20
LIMIT_S = 20.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """20 MiB of data, in two parts with a hole between them."""
    path = tmp_path / "memory.img"
    with path.open("wb") as file:
        file.write(b"a" * (18 * MIB))
        file.seek(100 * MIB)
        file.write(b"b" * (2 * MIB))
        os.fsync(file.fileno())
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the kernel is asked for, instead of asking it."""
    calls: list[tuple[int, int]] = []

    def ask(_fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        calls.append((offset // MIB, length // MIB))

    monkeypatch.setattr(os, "posix_fadvise", ask)
    return calls


async def test_data_is_asked_for_piece_by_piece(
    image: Path, asked: list[tuple[int, int]], autojump_clock: trio.testing.MockClock
) -> None:
    began_s = trio.current_time()
    assert await read_ahead(image, limit_bytes_per_s=10 * MIB) == 20 * MIB
    assert asked == [(0, 8), (8, 8), (16, 2), (100, 2)]
    assert trio.current_time() - began_s == pytest.approx(2.0)


async def test_small_pieces_go_together(
    tmp_path: Path, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "data_extents", lambda *_: iter([(0, MIB)] * 20))
    (tmp_path / "f").touch()
    calls = 0
    in_thread = trio.to_thread.run_sync

    async def run_sync(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        return await in_thread(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    assert await read_ahead(tmp_path / "f") == 20 * MIB
    assert calls == 4


async def test_cancelled_between_pieces(
    image: Path, asked: list[tuple[int, int]], autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(1.0) as scope:
        await read_ahead(image, limit_bytes_per_s=8 * MIB)
    assert scope.cancelled_caught
    assert asked[0] == (0, 8)
    assert len(asked) < 4


async def test_image_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .* ahead: No such file"):
        await read_ahead(tmp_path / "missing")


async def test_pages_come_into_the_cache(image: Path) -> None:
    fd = os.open(image, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        await read_ahead(image, limit_bytes_per_s=1 << 40)
        with trio.fail_after(LIMIT_S):
            while True:  # no event tells of it
                if all(cached(fd, offset * MIB) for offset in (0, 5, 17, 101)):
                    break
                await trio.sleep(0.01)
    finally:
        os.close(fd)


def cached(fd: int, offset: int) -> bool:
    """Whether a page can be read without waiting for the disk."""
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
