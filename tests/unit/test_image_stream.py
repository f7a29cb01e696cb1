"""Sequential streams: every page, the end, and nothing else that is refused by accident."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsnapd.errors import ImageInvalid
from qsnapd.image import stream
from qsnapd.image.savevm import Verified
from qsnapd.model.snapshot import RamBlock
from tests.unit import crafted_images as crafted
from tests.unit.crafted_images import (
    EOS,
    FOOTER,
    PAGE,
    RAM,
    RAM_END,
    RAM_PART,
    RAM_START,
    WHOLE,
    be,
    head,
    named,
    page,
    table,
    tail,
)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "memory.img"


def verify(image: Path, data: bytes, ram_blocks: list[RamBlock] | None = None) -> Verified:
    image.write_bytes(data)
    with image.open("rb") as file:
        return stream.verify(file.fileno(), ram_blocks)


def test_a_whole_stream(image: Path) -> None:
    blocks = [RamBlock(id=RAM, size_bytes=4 * PAGE)]
    verified = verify(image, crafted.stream(*WHOLE), blocks)
    assert verified == Verified(tuple(blocks), pages=4)


def test_pages_again_and_in_any_order(image: Path) -> None:
    records = (page(3, block=RAM), page(2, b"\0"), page(2), page(0), page(1, block=RAM))
    assert verify(image, crafted.stream(*records)).pages == 5


def test_many_blocks_sections_and_commands(image: Path) -> None:
    data = head() + RAM_START + table({"a": 1, "b": 2}) + EOS + FOOTER
    data += RAM_PART + page(0, block="a") + be(0x200, 8) + EOS + FOOTER
    data += b"\x08" + be(11, 2) + be(3, 2) + b"xyz"  # a command, as QEMU 10 sends before the end
    data += RAM_END + page(0, b"\0", block="b") + EOS + FOOTER
    data += RAM_END + page(1) + EOS + FOOTER
    assert verify(image, data + tail()).pages == 3


def test_compressed_pages(image: Path) -> None:
    xbzrle = be(1 * PAGE | 0x40 | 0x20, 8) + b"\x01" + be(3, 2) + b"abc"
    squeezed = be(2 * PAGE | 0x100 | 0x20, 8) + be(4, 4) + b"zlib"
    records = (page(0, block=RAM), page(1), xbzrle, squeezed, page(3))
    assert verify(image, crafted.stream(*records)).pages == 5


def test_records_across_windows(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_WINDOW_BYTES", 5000)
    records = [page(i, b"\0" if i % 3 else b"x", block="" if i % 7 else RAM) for i in range(200)]
    data = crafted.stream(*records, blocks={RAM: 200})
    assert verify(image, data).pages == 200


@pytest.mark.parametrize("machine_without_footers", [False, True])
def test_no_description_of_devices(image: Path, machine_without_footers: bool) -> None:
    data = crafted.stream(*WHOLE, ending=crafted.DEVICE + b"\0")
    assert verify(image, data).pages == 4
    if machine_without_footers:
        with pytest.raises(ImageInvalid, match="lack QEMU's ending"):
            verify(image, crafted.stream(*WHOLE, ending=crafted.DEVICE[:-5] + b"\0"))


def test_a_missing_page_is_named(image: Path) -> None:
    with pytest.raises(ImageInvalid, match=r"page 2 of the RAM block 'pc.ram' is missing"):
        verify(image, crafted.stream(*WHOLE[:2], WHOLE[3]))


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_sections_before_ram(image: Path, size: int) -> None:
    early = b"\x04" + be(1, 4) + named("0000:00:02.0/early") + be(0, 4) + be(1, 4) + bytes(size)
    data = head() + early + crafted.stream(*WHOLE)[len(head()) :]
    assert verify(image, data).pages == 4


def test_shared_ram_is_left_out(image: Path) -> None:
    blocks = (RamBlock(id=RAM, size_bytes=4 * PAGE), RamBlock(id="rom", size_bytes=PAGE))
    entries = be(5 * PAGE | 4, 8)
    for block in blocks:
        entries += named(block.id) + be(block.size_bytes, 8) + be(1 << 32, 8)  # an address
    data = head("x-ignore-shared") + RAM_START + entries + EOS + FOOTER + tail()
    verified = verify(image, data)
    assert verified.ram_blocks == blocks
    assert verified.unchecked == "it was saved with x-ignore-shared, which leaves out shared memory"


@pytest.mark.parametrize("mark", [b"virtio-mem", b"virtio-balloon-device/free-page-report"])
def test_devices_that_leave_out_pages(image: Path, mark: bytes) -> None:
    data = crafted.stream(*WHOLE[:2], ending=mark + tail())
    assert "the guest has a" in str(verify(image, data).unchecked)


def test_a_section_that_only_qemu_can_read(image: Path) -> None:
    foreign = b"\x01" + be(3, 4) + named("dirty-bitmap") + be(0, 4) + be(1, 4) + b"whatever"
    data = head() + RAM_START + table({RAM: 4}) + EOS + FOOTER + foreign + tail()
    verified = verify(image, data)
    assert verified.unchecked is not None
    assert "'dirty-bitmap'" in verified.unchecked


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends at byte 0, in the middle of the magic number"),
        (b"QFI\xfb" + bytes(100), "does not begin with QEMU's magic number"),
        (head(version=2) + RAM_START, "version 2, known is 3"),
        (head() + tail(), "no section of RAM"),
        (head("mapped-ram") + RAM_START + table({RAM: 4}), "with mapped-ram, not as a stream"),
        (head() + RAM_START + be(5, 8), "does not begin with the size of RAM"),
        (crafted.stream(*WHOLE[:3], page(4)), "outside of its RAM block"),
        (crafted.stream(*WHOLE[1:]), "before the name of its RAM block"),
        (crafted.stream(page(0, block="vga")), "unknown RAM block b'vga'"),
        (crafted.stream(be(0xA0, 8)), "unknown flags 0xa0"),
        (crafted.stream(blocks={RAM: 1 << 40}), "cannot hold the 1099511627776 pages"),
        (crafted.stream(*WHOLE, ending=b"\x09" + tail()), "unknown section 9"),
        (crafted.stream(*WHOLE, ending=b"\x02" + be(9, 4) + tail()), "section 9 .* no beginning"),
        (crafted.stream(*WHOLE, ending=tail()[len(crafted.DEVICE) :]), "lacks the state"),
        (crafted.stream(*WHOLE, ending=tail(b"[]")), "damaged"),
        (crafted.stream(*WHOLE, ending=tail(b"[" * 100_000)), "damaged"),
    ],
)
def test_refusals(image: Path, data: bytes, message: str) -> None:
    with pytest.raises(ImageInvalid, match=message):
        verify(image, data)


def test_a_stream_that_was_cut_anywhere_is_refused(image: Path) -> None:
    data = crafted.stream(*WHOLE)
    # Cut right behind its end mark, a stream lacks nothing that loading it needs.
    complete = len(data) - len(tail()) + len(crafted.DEVICE) + 1
    sizes = {*range(0, 200), *range(200, len(data), 97), *range(len(data) - 200, len(data))}
    for size in sizes - {complete}:
        with pytest.raises(ImageInvalid):
            verify(image, data[:size])


def test_expected_blocks(image: Path) -> None:
    with pytest.raises(ImageInvalid, match="lacks the RAM block 'vga'"):
        verify(image, crafted.stream(*WHOLE), [RamBlock(id="vga", size_bytes=1)])


def test_the_caller_can_cancel(image: Path) -> None:
    image.write_bytes(crafted.stream(*WHOLE))

    class Cancelled(BaseException):
        pass

    def cancel() -> None:
        raise Cancelled

    with image.open("rb") as file, pytest.raises(Cancelled):
        stream.verify(file.fileno(), None, cancel)


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_is_refused_or_harmless(image: Path, data: st.DataObject) -> None:
    """Any bytes written anywhere: nothing but ImageInvalid comes out."""
    records = (page(0, block=RAM), page(1, b"\0"), page(2, b"\0"), page(3, b"\0"))
    damaged = bytearray(crafted.stream(*records))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 200) | st.integers(len(damaged) - 200, len(damaged)))
        junk = data.draw(st.binary(min_size=1, max_size=12))
        damaged[at : at + len(junk)] = junk
    refused = ""
    try:
        verify(image, bytes(damaged))
    except ImageInvalid as exc:
        refused = str(exc)
    assert refused or len(damaged) == image.stat().st_size


@given(junk=st.binary(max_size=2000), prefix=st.integers(0, 3))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes(image: Path, junk: bytes, prefix: int) -> None:
    whole = head() + RAM_START + table({RAM: 4}) + EOS + FOOTER + RAM_PART
    start = [b"", b"QEVM\0\0\0\x03", head() + RAM_START, whole][prefix]
    with pytest.raises(ImageInvalid):
        verify(image, start + junk)


def test_speed_is_that_of_the_disk(image: Path) -> None:
    """A generous bound that a loop over bytes would break: 64 MiB in two seconds."""
    count = 16_384
    image.write_bytes(
        crafted.stream(page(0, block=RAM), *map(page, range(1, count)), blocks={RAM: count})
    )
    fd = os.open(image, os.O_RDONLY)
    started = time.perf_counter()
    assert stream.verify(fd, None).pages == count
    assert time.perf_counter() - started < 2
    os.close(fd)
