"""Views: memory images without their big pages, for a QEMU whose RAM already maps the image.

A view is a mapped-ram image like any other: same layout, but in the blocks that are mapped no
page is there, and their bitmaps say so. Loading it restores the devices and the small blocks,
and touches nothing of what is mapped.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from qsnapd.image.files import create_exclusive, data_extents, write_all
from qsnapd.image.mapped_ram import Layout
from qsnapd.image.savevm import reading

_CHUNK_BYTES = 1 << 20


def make_view(image_fd: int, layout: Layout, blocks: Collection[str], target: Path) -> int:
    """Create *target* (0600), the view of an image without the pages of *blocks*, by their ids.

    Blocks, for milliseconds: it takes what the small blocks take, however much RAM there is.
    The view lives until it was loaded, so it is not synced.

    Returns how many bytes were copied.
    On failure: there is no such file, and one that was there before is untouched.
    Raises: TargetRefused: *target* exists or cannot be created. StoreError: the disk failed.
    """
    view_fd = create_exclusive(target)
    try:
        with reading():
            size_bytes = os.fstat(image_fd).st_size
            os.ftruncate(view_fd, size_bytes)
            return sum(
                _copy(image_fd, view_fd, start, end)
                for start, end in _kept(layout, blocks, size_bytes)
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    finally:
        os.close(view_fd)


def _kept(layout: Layout, blocks: Collection[str], size_bytes: int) -> Iterator[tuple[int, int]]:
    """The parts of the file around bitmaps and pages of *blocks*."""
    position = 0
    for block in layout.blocks:
        if block.id in blocks:
            bitmap_end = block.bitmap_offset_bytes + block.bitmap_size_bytes
            yield position, block.bitmap_offset_bytes
            yield bitmap_end, block.pages_offset_bytes
            position = block.end_offset_bytes
    yield position, size_bytes


def _copy(image_fd: int, view_fd: int, start: int, end: int) -> int:
    """Copy what is no hole; return how many bytes that is."""
    copied = 0
    for data, hole in data_extents(image_fd, start, end):
        for offset in range(data, hole, _CHUNK_BYTES):
            piece = os.pread(image_fd, min(_CHUNK_BYTES, hole - offset), offset)
            write_all(view_fd, piece, offset)
            copied += len(piece)
    return copied
