"""Reading a tar stream that anybody may have sent.

The part of the format that `tar --format=posix --sparse` writes for plain files, and nothing
else: after "pax Interchange Format" of POSIX, and "Storing Sparse Files" of GNU tar's manual
(version 1.0). Python's tarfile would take any kind of member, as much memory as a header asks
for, and gets lost behind a sparse member of more than 8 GiB.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qsnapd.errors import ImageInvalid
from qsnapd.image.sparse import CHUNK_BYTES

Read = Callable[[int], bytes]
"""Returns exactly as many bytes as it is asked for, or fewer if the stream has ended."""

_BLOCK_BYTES = 512
_PAX_LIMIT_BYTES = 1 << 16
_EXTENTS_LIMIT = 1 << 23
_DIGITS_LIMIT = 20


@dataclass(frozen=True)
class Member:
    """One plain file in the stream. Its data is read before the next member is asked for."""

    name: str
    size_bytes: int
    extents: "array[int]"
    """Where in the file its data belongs: offset, length, offset, length; ascending."""
    data_bytes: int


class TarReader:
    """The members of one stream, in their order. Blocks as *read* does."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._left_bytes = 0
        self._padding_bytes = 0

    def members(self) -> Iterator[Member]:
        """Yield each plain file; folders are passed over.

        Raises: ImageInvalid: it is cut off, damaged, or holds what no export does.
        """
        records: dict[str, str] = {}
        while any(header := self._block()):
            kind, name, size_bytes = _parse(header)
            if kind in b"xg":
                said = self._records(size_bytes)
                records = said if kind == b"x" else records
                continue
            if kind == b"5" and size_bytes == 0:
                records = {}
                continue
            name = records.get("GNU.sparse.name", records.get("path", name))
            if kind not in b"0\0":
                raise ImageInvalid(
                    f"{name!r} in the tar stream is not a plain file (made with --format=posix?)"
                )
            yield self._member(name, _number(records.get("size"), size_bytes), records)
            self._skip_rest()
            records = {}

    def data(self, member: Member) -> Iterator[tuple[int, bytes]]:
        """Yield the data of the member that came last, piece by piece, with its place."""
        for index in range(0, len(member.extents), 2):
            offset, end = member.extents[index], sum(member.extents[index : index + 2])
            while offset < end:
                piece = self._take(min(CHUNK_BYTES, end - offset))
                yield offset, piece
                offset += len(piece)

    def _member(self, name: str, stored_bytes: int, records: dict[str, str]) -> Member:
        self._left_bytes = stored_bytes
        self._padding_bytes = -stored_bytes % _BLOCK_BYTES
        if not any(key.startswith("GNU.sparse.") for key in records):
            return Member(name, stored_bytes, array("Q", (0, stored_bytes)), stored_bytes)
        version = records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")
        if version != ("1", "0"):
            raise ImageInvalid(
                f"{name!r} in the tar stream has its holes written in a way that is not known here "
                "(GNU tar's --sparse-version=1.0 is)"
            )
        size_bytes = _number(records.get("GNU.sparse.realsize"), None)
        extents = self._extents(name)
        data_bytes = _checked(name, extents, size_bytes)
        if data_bytes != self._left_bytes:
            raise ImageInvalid(f"{name!r} in the tar stream: its holes do not fit its data")
        return Member(name, size_bytes, extents, data_bytes)

    def _extents(self, name: str) -> "array[int]":
        numbers = self._numbers()
        count = next(numbers)
        if count > _EXTENTS_LIMIT:
            raise ImageInvalid(f"{name!r} in the tar stream has more than {_EXTENTS_LIMIT} holes")
        return array("Q", (next(numbers) for _ in range(2 * count)))

    def _numbers(self) -> Iterator[int]:
        """The numbers at the head of a sparse member, a line each."""
        text = b""
        while True:
            line, newline, rest = text.partition(b"\n")
            if newline:
                text = rest
                yield _number(line.decode("ascii", "replace"), None)
            elif len(line) > _DIGITS_LIMIT:
                raise _nonsense("a number is too long")
            else:
                text += self._take(_BLOCK_BYTES)

    def _records(self, size_bytes: int) -> dict[str, str]:
        """The records of a pax header: "LENGTH KEY=VALUE", each ended by a newline."""
        if size_bytes > _PAX_LIMIT_BYTES:
            raise _nonsense("a header is too long")
        self._left_bytes, self._padding_bytes = size_bytes, -size_bytes % _BLOCK_BYTES
        text = self._take(size_bytes)
        self._skip_rest()
        records = {}
        while text:
            digits = text.partition(b" ")[0]
            length = _number(digits.decode("ascii", "replace"), None)
            record = text[len(digits) + 1 : length]
            if length > len(text) or not record.endswith(b"\n") or b"=" not in record:
                raise _nonsense("a header is damaged")
            key, _, value = record[:-1].decode("utf-8", "replace").partition("=")
            records[key] = value
            text = text[length:]
        return records

    def _take(self, count: int) -> bytes:
        """Read from the data of the member."""
        if count > self._left_bytes:
            raise _nonsense("a member ends too early")
        data = self._read(count)
        if len(data) < count:
            raise ImageInvalid("the tar stream was cut off")
        self._left_bytes -= count
        return data

    def _skip_rest(self) -> None:
        if self._left_bytes:
            raise ValueError("the member's data has not been read")
        if len(self._read(self._padding_bytes)) < self._padding_bytes:
            raise ImageInvalid("the tar stream was cut off")

    def _block(self) -> bytes:
        block = self._read(_BLOCK_BYTES)
        if len(block) < _BLOCK_BYTES:
            raise ImageInvalid("the tar stream was cut off")
        return block


def _parse(header: bytes) -> tuple[bytes, str, int]:
    """The kind, name and size in a header block."""
    if header[257:262] != b"ustar":
        raise ImageInvalid("what was sent is not a tar stream (compressed? unpack it first)")
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if total != _octal(header[148:156]):
        raise _nonsense("a header is damaged")
    name, prefix = (part.split(b"\0")[0] for part in (header[:100], header[345:500]))
    full = b"/".join(filter(None, (prefix, name)))
    return header[156:157], full.decode("utf-8", "replace"), _octal(header[124:136])


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        raise _nonsense("a number is damaged")
    return int(digits, 8)


def _number(text: str | None, default: int | None) -> int:
    if text is None:
        if default is None:
            raise _nonsense("a number is missing")
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > _DIGITS_LIMIT:
        raise _nonsense("a number is damaged")
    if (number := int(text)) >= 1 << 62:
        raise _nonsense("a number is too large")
    return number


def _checked(name: str, extents: "array[int]", size_bytes: int) -> int:
    """How much data the extents hold; they lie in the file, one behind the other."""
    position = total = 0
    for index in range(0, len(extents), 2):
        offset, length = extents[index], extents[index + 1]
        if offset < position or offset + length > size_bytes:
            raise ImageInvalid(f"{name!r} in the tar stream: its holes overlap")
        position, total = offset + length, total + length
    return total


def _nonsense(what: str) -> ImageInvalid:
    return ImageInvalid(f"the tar stream is damaged: {what}")
