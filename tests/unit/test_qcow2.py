"""Headers of qcow2 images: as qemu-img writes them, and as nobody should."""

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.errors import ImageInvalid
from qsnapd.image.qcow2 import Header, is_blank, read_header
from tests.parts import Qemu, qemu_versions

MIB = 1 << 20


def header(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd)
    finally:
        os.close(fd)


def create(qemu: Qemu, path: Path, *words: str) -> Path:
    subprocess.run([qemu.img, "create", "-q", "-f", "qcow2", *words, path, "5M"], check=True)
    return path


@pytest.mark.parametrize("qemu", qemu_versions(), ids=str)
def test_what_qemu_img_writes(qemu: Qemu, tmp_path: Path) -> None:
    plain = Header(5 * MIB, None, None, False, False, False)
    assert header(create(qemu, tmp_path / "a")) == plain
    assert header(create(qemu, tmp_path / "old", "-o", "compat=0.10")) == plain
    for options in ((), ("-o", "compat=0.10"), ("-o", "cluster_size=512")):
        over = create(qemu, tmp_path / "over", *options, "-F", "qcow2", "-b", "a")
        assert header(over) == Header(5 * MIB, "a", "qcow2", False, False, False)
        over.unlink()
    other = create(qemu, tmp_path / "o", "-o", f"data_file={tmp_path}/data")
    assert header(other).has_data_file


@pytest.mark.parametrize("qemu", qemu_versions(), ids=str)
def test_whether_an_image_holds_anything(qemu: Qemu, tmp_path: Path) -> None:
    create(qemu, tmp_path / "base")
    over = create(qemu, tmp_path / "over", "-F", "qcow2", "-b", "base")
    assert blank(over)
    (tmp_path / "raw").write_bytes(bytes(MIB) + b"x" * 512)
    files = [str(tmp_path / "raw"), str(tmp_path / "full")]
    subprocess.run([str(qemu.img), "convert", "-O", "qcow2", *files], check=True)
    assert not blank(tmp_path / "full")
    assert not blank(create(qemu, tmp_path / "o", "-o", f"data_file={tmp_path}/data"))
    for entries, offset in ((1 << 30, 0), (1, 1 << 50), (1, (1 << 64) - 1)):
        assert not blank(damaged(over, 36, struct.pack(">IQ", entries, offset)))


def blank(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return is_blank(fd)
    finally:
        os.close(fd)


def damaged(path: Path, offset: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    return path


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (0, b"XXXX", "no qcow2"),
        (4, struct.pack(">I", 4), "version 4"),
        (8, struct.pack(">QI", 1 << 50, 5), "behind the end"),
        (8, struct.pack(">QI", (1 << 64) - 1, 5), "behind the end"),
        (8, struct.pack(">QI", (1 << 63) - 5, 5), "behind the end"),
        (8, struct.pack(">QI", 500, 5000), "5000 bytes"),
        (8, struct.pack(">QI", 500, 0), "0 bytes"),
        (112, struct.pack(">II", 1, 1 << 30), "cut off"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, offset: int, data: bytes, words: str) -> None:
    path = create(qemu_versions()[0], tmp_path / "a")
    with pytest.raises(ImageInvalid, match=words):
        header(damaged(path, offset, data))


def test_end_that_is_too_far(tmp_path: Path) -> None:
    """QEMU would go on, up to the end of the cluster: a data file might be named there."""
    path = create(qemu_versions()[0], tmp_path / "a", "-o", "cluster_size=2M")
    filler = struct.pack(">II", 0x12345678, (1 << 16) - 200)
    damaged(path, 112, filler)
    damaged(path, (1 << 16) - 80, struct.pack(">II", 0x12345678, 72))
    with pytest.raises(ImageInvalid, match="no end"):
        header(path)


def test_too_short(tmp_path: Path) -> None:
    path = create(qemu_versions()[0], tmp_path / "a")
    os.truncate(path, 100)
    with pytest.raises(ImageInvalid, match="no qcow2"):
        header(path)


def test_marked_as_damaged_or_encrypted(tmp_path: Path) -> None:
    path = create(qemu_versions()[0], tmp_path / "a")
    assert header(damaged(path, 72, struct.pack(">Q", 2))).is_corrupt
    assert header(damaged(path, 32, struct.pack(">I", 2))).is_encrypted


@given(st.binary(min_size=200, max_size=200))
def test_noise_is_refused_or_read(noise: bytes) -> None:
    fd = os.memfd_create("noise")
    try:
        os.write(fd, b"QFI\xfb\0\0\0\x03" + noise)
        read_header(fd)
    except ImageInvalid:
        pass
    finally:
        os.close(fd)
