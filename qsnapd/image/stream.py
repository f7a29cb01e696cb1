"""QEMU's sequential migration streams: is every page of RAM in the file, and the end too?

RAM is walked record by record without looking at its content. What devices wrote cannot be
walked, since QEMU does not record how long it is; there the tail must do.
"""

import os
from collections.abc import Callable, Sequence
from struct import Struct

from qsnapd.errors import ImageInvalid
from qsnapd.image.savevm import (
    Cursor,
    Flag,
    Head,
    Section,
    Tail,
    Verified,
    announced_blocks,
    never_cancelled,
    read_head,
    read_tail,
    reading,
    require_blocks,
)
from qsnapd.model.snapshot import RamBlock

_WINDOW_BYTES = 1 << 20
_WORD = Struct(">Q")
_ZERO_RECORD_BYTES = _WORD.size + 1
_DEFAULT_PAGE_BYTES = 4096

_PAGE_SKIPPERS = {
    b"virtio-mem": "a virtio-mem device, whose unplugged memory is not saved",
    b"virtio-balloon-device/free-page-report": "a balloon that may leave out free memory",
}
"""Marks in the state of devices that let QEMU leave out pages, and what they are."""


def verify(
    fd: int,
    ram_blocks: Sequence[RamBlock] | None,
    check_cancelled: Callable[[], object] = never_cancelled,
) -> Verified:
    """Check a complete stream: head, table of RAM blocks, every page at least once, tail.

    *ram_blocks* must be in it with their sizes; None: whatever it says of itself. Zero pages
    are in the file too, as records of nine bytes. If QEMU may have left pages out, or if a
    section comes between that nobody else can read, only head and tail are checked, and
    `unchecked` of the result says why.
    *check_cancelled* is called once per MiB or so, and cancels by raising.
    Raises: ImageInvalid: with what is wrong, for people; StoreError: the disk failed.
    """
    with reading():
        head = read_head(fd)
        if "mapped-ram" in head.capabilities:
            raise ImageInvalid("the memory image was saved with mapped-ram, not as a stream")
        cursor = Cursor(fd)
        blocks = tuple(announced_blocks(cursor, head))
        require_blocks(blocks, ram_blocks)
        tail = read_tail(fd, cursor.position)
        if (cause := _why_pages_are_left_out(head, tail)) is not None:
            return Verified(blocks, pages=0, unchecked=cause)
        page_size_bytes = tail.page_size_bytes or _DEFAULT_PAGE_BYTES
        walk = _RamWalk(fd, blocks, page_size_bytes, check_cancelled)
        cursor.position = walk.section(cursor.position)
        cursor.skip_footer(head.ram_section_id)
        foreign = _walk_sections(cursor, head.ram_section_id, walk)
        if foreign is not None:
            return Verified(blocks, walk.pages, unchecked=foreign)
        walk.require_all()
        if cursor.position >= tail.eof_offset_bytes:
            raise ImageInvalid("the memory image lacks the state of the devices")
        return Verified(blocks, walk.pages)


def _why_pages_are_left_out(head: Head, tail: Tail) -> str | None:
    if "x-ignore-shared" in head.capabilities:
        return "it was saved with x-ignore-shared, which leaves out shared memory"
    for mark, device in _PAGE_SKIPPERS.items():
        if mark in tail.window:
            return f"the guest has {device}"
    return None


def _walk_sections(cursor: Cursor, ram_section_id: int, walk: "_RamWalk") -> str | None:
    """Walk up to the first device; the reason if something in between cannot be walked."""
    while True:
        start = cursor.position
        match cursor.number(1, "a section"):
            case Section.PART | Section.END:
                if (section_id := cursor.number(4, "a section's number")) != ram_section_id:
                    raise ImageInvalid(
                        f"section {section_id} at byte {start} of the memory image has no beginning"
                    )
                cursor.position = walk.section(cursor.position)
                cursor.skip_footer(ram_section_id)
            case Section.COMMAND:
                cursor.take(2, "a command")
                cursor.take(cursor.number(2, "a command's length"), "a command")
            case Section.START:
                cursor.take(4, "a section's number")
                name = cursor.name("a section's name")
                return f"only QEMU can read the section {name!r} between those of RAM"
            case Section.FULL | Section.EOF:
                return None
            case kind:
                raise ImageInvalid(f"unknown section {kind} at byte {start} of the memory image")


class _RamWalk:
    """Walks the sections of RAM and remembers which pages it met. Lives for one verification."""

    def __init__(
        self,
        fd: int,
        blocks: Sequence[RamBlock],
        page_size_bytes: int,
        check_cancelled: Callable[[], object],
    ) -> None:
        if page_size_bytes.bit_count() != 1 or not 1 << 10 <= page_size_bytes <= 1 << 16:
            raise ImageInvalid(f"the memory image has pages of {page_size_bytes} bytes")
        self._fd = fd
        self._size_bytes = os.fstat(fd).st_size
        self._page_size_bytes = page_size_bytes
        self._check_cancelled = check_cancelled
        self._page_total = sum(block.size_bytes for block in blocks) // page_size_bytes
        # The least a page takes; also keeps `_met` smaller than the file, whatever it claims.
        if self._page_total * _ZERO_RECORD_BYTES > self._size_bytes:
            raise ImageInvalid(
                f"the memory image of {self._size_bytes} bytes cannot hold the "
                f"{self._page_total} pages of RAM it announces"
            )
        self._met = {b.id: bytearray(b.size_bytes // page_size_bytes) for b in blocks}
        self._current: bytearray | None = None
        self._window = memoryview(bytearray(_WINDOW_BYTES))
        self._window_start = 0
        self._window_size = 0
        self.pages = 0
        """How many records of pages were met; more than there are if a page came again."""

    def require_all(self) -> None:
        """Raises: ImageInvalid: a page was never met."""
        for id_, met in self._met.items():
            if (page := met.find(0)) >= 0:
                raise ImageInvalid(
                    f"page {page} of the RAM block {id_!r} is missing in the memory image, "
                    f"{met.count(0)} of its {len(met)} pages are"
                )

    def section(self, offset: int) -> int:
        """Walk the records from *offset* to the end of their section; return where that is."""
        ended = False
        while not ended:
            at = offset - self._window_start
            if not 0 <= at < self._window_size:
                at = self._move_window(offset)
            try:
                stopped_at, ended = self._records(at)
            except IndexError:
                raise ImageInvalid(
                    "the memory image has a page that is outside of its RAM block, near byte "
                    f"{offset}"
                ) from None
            if stopped_at == at and not ended:  # a record that goes beyond the window
                if at == 0:
                    raise self._cut()
                self._move_window(offset)
            offset += stopped_at - at
        return offset

    def _move_window(self, offset: int) -> int:
        self._check_cancelled()
        self._window_start = offset
        self._window_size = os.preadv(self._fd, [self._window], offset)
        if self._window_size == 0:
            raise self._cut()
        return 0

    def _cut(self) -> ImageInvalid:
        return ImageInvalid(
            f"the memory image was cut off: it ends at byte {self._size_bytes}, within RAM"
        )

    def _records(self, at: int) -> tuple[int, bool]:
        """Walk complete records from *at* on; return where it stopped, and if at the end.

        One turn per page of the guest: what is not needed here is in `_rare_record`.
        """
        window, size = self._window, self._window_size
        page_size_bytes = self._page_size_bytes
        page_record_bytes = _WORD.size + page_size_bytes
        shift = page_size_bytes.bit_length() - 1
        mask = page_size_bytes - 1
        unpack = _WORD.unpack_from
        page_again, zero_again = int(Flag.PAGE | Flag.CONTINUE), int(Flag.ZERO | Flag.CONTINUE)
        met, pages, last = self._current, 0, size - _WORD.size
        while at <= last:
            (word,) = unpack(window, at)
            flags = word & mask
            if flags == page_again:
                end = at + page_record_bytes
            elif flags == zero_again:
                end = at + _ZERO_RECORD_BYTES
            elif flags == Flag.EOS:
                self.pages += pages
                return at + _WORD.size, True
            elif flags == Flag.MULTIFD_FLUSH:
                at += _WORD.size
                continue
            else:
                end = self._rare_record(at, flags)
                met = self._current
            if end > size:
                break
            if met is None:
                raise ImageInvalid("the memory image has a page before the name of its RAM block")
            met[word >> shift] = 1
            pages += 1
            at = end
        self.pages += pages
        return at, False

    def _rare_record(self, at: int, flags: int) -> int:
        """Where a record ends that names its block, or holds its page in an unusual form.

        If the window ends before that is known: somewhere beyond the window.
        """
        at += _WORD.size
        if not flags & Flag.CONTINUE:
            name_at = at + 1
            at = name_at + self._length(at, 1)
            if at > self._window_size:
                return at
            name = bytes(self._window[name_at:at])
            self._current = self._met.get(name.decode(errors="replace"))
            if self._current is None:
                raise ImageInvalid(f"the memory image has a page of an unknown RAM block {name!r}")
        match flags & ~Flag.CONTINUE:
            case Flag.PAGE:
                return at + self._page_size_bytes
            case Flag.ZERO:
                return at + 1
            case Flag.XBZRLE:  # a byte for the kind of encoding comes first
                return at + 3 + self._length(at + 1, 2)
            case Flag.COMPRESSED:
                return at + 4 + self._length(at, 4)
        raise ImageInvalid(f"the memory image has a page with unknown flags {flags:#x}")

    def _length(self, at: int, width: int) -> int:
        """A length in the window; enough to leave the window if it is not all there."""
        if at + width > self._window_size:
            return _WINDOW_BYTES
        return int.from_bytes(self._window[at : at + width], "big")
