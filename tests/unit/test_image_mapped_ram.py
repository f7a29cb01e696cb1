"""mapped-ram images: what is sealed, and what is refused, in words."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsnapd.errors import ImageInvalid
from qsnapd.image import mapped_ram
from qsnapd.image.mapped_ram import Writes
from qsnapd.model.snapshot import RamBlock
from tests.unit.crafted_images import DEVICE, EOS, FOOTER, MIB, PAGE, RAM, be, head, mapped, tail

PAGES = {0: b"a", 7: b"b", 8: b"c", 63: b"d", 64: b"e", 99: b"f"}
BITS = sum(1 << number for number in PAGES)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "memory.img"


def bitmap_of(fd: int) -> int:
    block = mapped_ram.read_layout(fd).blocks[0]
    bits = os.pread(fd, block.bitmap_size_bytes, block.bitmap_offset_bytes)
    return int.from_bytes(bits, "little")


def test_layout(image: Path) -> None:
    layout = mapped_ram.read_layout(mapped(image, PAGES, page_count=100))
    (block,) = layout.blocks
    assert layout.machine == "pc"
    assert layout.ram_blocks == (RamBlock(id=RAM, size_bytes=100 * PAGE),)
    assert (block.page_count, block.bitmap_size_bytes) == (100, 16)
    assert block.pages_offset_bytes == MIB
    assert layout.rest_offset_bytes == MIB + 100 * PAGE


def test_sealing_sets_the_bit_of_every_page_in_the_file(image: Path) -> None:
    fd = mapped(image, PAGES)
    assert mapped_ram.seal(fd)
    assert bitmap_of(fd) == BITS
    assert mapped_ram.verify(fd, None, Writes.ONCE).pages == len(PAGES)


@given(numbers=st.sets(st.integers(0, 499)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sealing_any_pattern(image: Path, numbers: set[int]) -> None:
    fd = mapped(image, dict.fromkeys(numbers, b"x"), page_count=500)
    mapped_ram.seal(fd)
    assert bitmap_of(fd) == sum(1 << number for number in numbers)
    assert mapped_ram.verify(fd, None, Writes.ONCE).pages == len(numbers)
    os.close(fd)


def test_sealing_in_chunks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_ram, "_CHUNK_PAGES", 64)
    fd = mapped(image, PAGES)
    mapped_ram.seal(fd)
    assert bitmap_of(fd) == BITS
    assert mapped_ram.verify(fd, None, Writes.ONCE).pages == len(PAGES)


def test_sealing_leaves_a_bitmap_of_qemu_alone(image: Path) -> None:
    fd = mapped(image, PAGES, bitmap=1 << 7)
    before = image.read_bytes()
    assert not mapped_ram.seal(fd)
    assert image.read_bytes() == before


def test_an_image_that_was_not_sealed_is_refused(image: Path) -> None:
    fd = mapped(image, PAGES)
    with pytest.raises(ImageInvalid, match="leaves out: it was not sealed"):
        mapped_ram.verify(fd, None, Writes.ONCE)


def test_a_page_that_became_zero_is_legal_after_precopy_alone(image: Path) -> None:
    fd = mapped(image, PAGES, bitmap=BITS & ~(1 << 8))
    assert mapped_ram.verify(fd, None, Writes.REPEATED).pages == len(PAGES) - 1
    with pytest.raises(ImageInvalid, match="page 8 or after"):
        mapped_ram.verify(fd, None, Writes.ONCE)


def test_zeros_that_take_up_space_need_no_bit(image: Path) -> None:
    fd = mapped(image, PAGES | {20: b"\0", 21: b"\0"}, bitmap=BITS)
    assert mapped_ram.verify(fd, None, Writes.ONCE).pages == len(PAGES)


@pytest.mark.parametrize("writes", Writes)
def test_a_page_that_is_not_in_the_file_is_refused(image: Path, writes: Writes) -> None:
    fd = mapped(image, PAGES, bitmap=BITS | 1 << 42)
    with pytest.raises(ImageInvalid, match=r"page 42 of the RAM block 'pc.ram' should be"):
        mapped_ram.verify(fd, None, writes)


def test_a_bit_beyond_the_last_page_is_refused(image: Path) -> None:
    fd = mapped(image, PAGES, bitmap=BITS | 1 << 110)
    with pytest.raises(ImageInvalid, match="page 110"):
        mapped_ram.verify(fd, None, Writes.ONCE)


def test_expected_blocks(image: Path) -> None:
    fd = mapped(image, PAGES, bitmap=BITS)
    right = RamBlock(id=RAM, size_bytes=100 * PAGE)
    assert mapped_ram.verify(fd, [right], Writes.ONCE).ram_blocks == (right,)
    with pytest.raises(ImageInvalid, match="409600 bytes in the memory image and 409601"):
        mapped_ram.verify(fd, [RamBlock(id=RAM, size_bytes=409601)], Writes.ONCE)
    with pytest.raises(ImageInvalid, match=r"lacks the RAM block 'vga.vram'"):
        mapped_ram.verify(fd, [RamBlock(id="vga.vram", size_bytes=1)], Writes.ONCE)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"header_version": 2}, "version 2, known is 1"),
        ({"page_size": 0}, "page size of 0"),
        ({"page_size": 5000}, "page size of 5000"),
        ({"page_size": 1 << 40}, "page size of"),
        ({"pages_offset": MIB + 1}, "no multiples"),
        ({"bitmap_offset": 5}, "overlap"),
        ({"bitmap_offset": MIB - 8}, "overlap"),
        ({"rest": b""}, "was cut off"),
        ({"rest": EOS}, "lack QEMU's ending"),
        ({"rest": EOS + FOOTER + tail()[:-1]}, "lack QEMU's ending"),
        ({"rest": EOS + FOOTER + b"\0\x06" + be(2, 4) + b"{}"}, "description .* is damaged"),
        ({"rest": be(0x08, 8) + tail()}, "unknown record 0x8"),
        ({"rest": EOS + b"\x7e" + be(3, 4) + tail()}, "its footer says 3"),
        ({"rest": EOS + FOOTER + tail()[-len(tail()) + 29 :]}, "lacks the state of the devices"),
    ],
)
def test_refusals(image: Path, wrong: dict[str, int], message: str) -> None:
    fd = mapped(image, PAGES, bitmap=BITS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ImageInvalid, match=message):
        mapped_ram.verify(fd, None, Writes.ONCE)


def test_a_file_that_was_cut_anywhere_is_refused(image: Path) -> None:
    fd = mapped(image, PAGES, bitmap=BITS)
    size = os.fstat(fd).st_size
    # Cut right behind its end mark, a stream lacks nothing that loading it needs.
    complete = size - len(tail()) + len(DEVICE) + 1
    ends = {*range(0, 300), *range(300, size, 4099), *range(size - 200, size)} - {complete}
    for keep in sorted(ends, reverse=True):
        os.ftruncate(fd, keep)
        with pytest.raises(ImageInvalid):
            mapped_ram.verify(fd, None, Writes.REPEATED)


def test_a_stream_is_no_mapped_image(image: Path) -> None:
    image.write_bytes(head() + b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04" + bytes(100))
    with image.open("rb") as file, pytest.raises(ImageInvalid, match="not saved with mapped-ram"):
        mapped_ram.read_layout(file.fileno())


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_harmless(image: Path, data: st.DataObject) -> None:
    """Any bytes written anywhere: nothing but ImageInvalid comes out."""
    fd = mapped(image, PAGES, bitmap=BITS)
    size = os.fstat(fd).st_size
    front, back = st.integers(0, 200), st.integers(size - 200, size - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        os.pwrite(fd, data.draw(st.binary(min_size=1, max_size=12)), data.draw(front | back))
    refused, verified = "", None
    try:
        verified = mapped_ram.verify(fd, None, Writes.REPEATED)
        mapped_ram.seal(fd)
    except ImageInvalid as exc:
        refused = str(exc)
    finally:
        os.close(fd)
    assert refused or (verified and verified.ram_blocks)


@given(junk=st.binary(max_size=2000), prefix=st.integers(0, 2))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes(image: Path, junk: bytes, prefix: int) -> None:
    image.write_bytes([b"", b"QEVM\0\0\0\x03", head("mapped-ram")][prefix] + junk)
    with image.open("rb") as file, pytest.raises(ImageInvalid):
        mapped_ram.verify(file.fileno(), None, Writes.ONCE)
