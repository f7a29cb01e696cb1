"""What a file holds, as a value: with its holes, and what it may hold after a power failure."""

import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

BLOCK_BYTES = 4096
"""What a disk writes as a whole or not at all."""

Piece = tuple[int, bytes]
"""Data and the offset it is at; what lies between two is a hole."""


@dataclass(frozen=True)
class Content:
    """All of a file but its names."""

    size_bytes: int
    pieces: tuple[Piece, ...] = field(repr=False)
    mtime_ns: int = field(compare=False, repr=False)
    key: bytes = field(compare=False, repr=False)
    """The same for what is the same."""

    def write_to(self, fd: int) -> None:
        """Make the file *fd* hold this, the time of its last change included."""
        os.ftruncate(fd, 0)
        os.ftruncate(fd, self.size_bytes)
        for offset, data in self.pieces:
            done = 0
            while done < len(data):
                done += os.pwrite(fd, data[done:], offset + done)
        os.utime(fd, ns=(self.mtime_ns, self.mtime_ns))

    def blocks(self) -> dict[int, bytes]:
        """What is no hole, by the numbers of blocks."""
        return {
            (offset + start) // BLOCK_BYTES: data[start : start + BLOCK_BYTES]
            for offset, data in self.pieces
            for start in range(0, len(data), BLOCK_BYTES)
        }


def made_of(size_bytes: int, pieces: Iterable[Piece], mtime_ns: int) -> Content:
    """Put a content together."""
    pieces = tuple(pieces)
    digest = hashlib.sha256(str(size_bytes).encode())
    for offset, data in pieces:
        digest.update(f" {offset} {len(data)} ".encode() + data)
    return Content(size_bytes, pieces, mtime_ns, digest.digest())


EMPTY = made_of(0, (), 0)


def read_content(fd: int) -> Content:
    """Take what a file holds now. Moves the descriptor's position."""
    status = os.fstat(fd)
    return made_of(status.st_size, _pieces(fd, status.st_size), status.st_mtime_ns)


def _pieces(fd: int, size_bytes: int) -> Iterator[Piece]:
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        if start < size_bytes:
            yield start, os.pread(fd, min(position, size_bytes) - start, start)


def zeros(content: Content) -> Content:
    """Its size has arrived, its data has not."""
    return made_of(content.size_bytes, (), content.mtime_ns)


def torn(old: Content, new: Content, chance: random.Random) -> Content:
    """Each block as it was or as it is, and one of the two sizes."""
    before, after = old.blocks(), new.blocks()
    size_bytes = chance.choice((old.size_bytes, new.size_bytes))
    found: dict[int, bytes] = {}
    for number in sorted(before.keys() | after.keys()):
        block = chance.choice((before, after)).get(number, b"")
        if kept := block[: max(0, size_bytes - number * BLOCK_BYTES)]:
            found[number] = kept
    return made_of(size_bytes, _joined(found), new.mtime_ns)


def _joined(blocks: dict[int, bytes]) -> list[Piece]:
    joined: list[tuple[int, bytearray]] = []
    for number, block in blocks.items():
        offset = number * BLOCK_BYTES
        if joined and joined[-1][0] + len(joined[-1][1]) == offset:
            joined[-1][1].extend(block)
        else:
            joined.append((offset, bytearray(block)))
    return [(offset, bytes(data)) for offset, data in joined]
