"""Reading tar streams: what GNU tar writes comes out as it was, and nothing else is let in."""

import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsnapd.errors import ImageInvalid
from qsnapd.image.sparse import Content, SparseWriter, copy_sparse
from qsnapd.image.tar_reader import Member, TarReader
from qsnapd.snapshot.moving.tar_writer import TAR_OPTIONS

PAGE = 4096
BLOCK = 512


def nothing(_count: int) -> None:
    pass


def unpack(stream: bytes) -> dict[str, bytes]:
    """All files in the stream."""
    reader = TarReader(io.BytesIO(stream).read)
    return {member.name: content(reader, member) for member in reader.members()}


def content(reader: TarReader, member: Member) -> bytes:
    data = bytearray(member.size_bytes)
    for offset, piece in reader.data(member):
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def write_sparse(path: Path, size_bytes: int, pages: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for number, data in pages.items():
            file.seek(number * PAGE)
            file.write(data)


def gnu_tar(folder: Path, *names: str, options: tuple[str, ...] = TAR_OPTIONS) -> bytes:
    command = ["tar", *options, f"--directory={folder}", "--", *names]
    return subprocess.run(command, check=True, capture_output=True).stdout


@settings(max_examples=12, deadline=None)
@given(
    tail=st.integers(0, 2 * PAGE),
    pages=st.dictionaries(st.integers(0, 60), st.binary(min_size=1, max_size=PAGE), max_size=20),
)
def test_sparse_files_come_out_as_they_were(tail: int, pages: dict[int, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size_bytes = (max(pages, default=0) + 1) * PAGE + tail
        write_sparse(folder / "a", size_bytes, pages)
        (folder / "b").write_bytes(b"plain")
        assert unpack(gnu_tar(folder, "a", "b")) == {
            "a": (folder / "a").read_bytes(),
            "b": b"plain",
        }


def test_holes_are_kept_and_cost_nothing(tmp_path: Path) -> None:
    write_sparse(tmp_path / "a", 1 << 40, {5: b"x" * PAGE, 1 << 20: b"y"})
    stream = gnu_tar(tmp_path, "a")
    assert len(stream) < 100_000
    reader = TarReader(io.BytesIO(stream).read)
    [member] = [m for m in reader.members() if list(reader.data(m))]
    assert (member.size_bytes, member.data_bytes) == (1 << 40, 2 * PAGE)


def test_members_of_more_than_8_gib_are_followed() -> None:
    """Their sizes do not fit into the header; here only a hole pretends to be that long."""
    reader = TarReader(io.BytesIO(big_header(9 << 30)).read)
    member = next(reader.members())
    assert (member.size_bytes, member.data_bytes) == (9 << 30, 9 << 30)


def big_header(size_bytes: int) -> bytes:
    info = tarfile.TarInfo("big")
    info.size = size_bytes
    return info.tobuf(tarfile.PAX_FORMAT)


def test_what_python_writes(tmp_path: Path) -> None:
    """A folder packed by hand, names with "./" and a folder's entry among them."""
    (tmp_path / "a").write_bytes(b"1" * 1000)
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path, arcname=".")
    assert unpack(target.getvalue()) == {"./a": b"1" * 1000}


@pytest.mark.parametrize("options", [("--create", "--sparse", "--format=gnu")])
def test_other_kinds_of_holes_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    write_sparse(tmp_path / "a", 100 * PAGE, {50: b"x"})
    with pytest.raises(ImageInvalid, match="not a plain file"):
        unpack(gnu_tar(tmp_path, "a", options=(*options, "--file=-")))


def test_older_sparse_versions_are_refused(tmp_path: Path) -> None:
    write_sparse(tmp_path / "a", 100 * PAGE, {50: b"x"})
    options = ("--create", "--file=-", "--format=posix", "--sparse", "--sparse-version=0.1")
    with pytest.raises(ImageInvalid, match="not known here"):
        unpack(gnu_tar(tmp_path, "a", options=options))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: os.mkfifo(path),
        lambda path: os.link(path.with_name("first"), path),
    ],
    ids=["symbolic link", "pipe", "hard link"],
)
def test_only_plain_files(tmp_path: Path, make: Callable[[Path], object]) -> None:
    (tmp_path / "first").write_bytes(b"x")
    make(tmp_path / "second")
    options = ("--create", "--file=-", "--format=posix")
    with pytest.raises(ImageInvalid, match="not a plain file"):
        unpack(gnu_tar(tmp_path, "first", "second", options=options))


def valid_stream() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        write_sparse(Path(name) / "a", 20 * PAGE, {3: b"x" * PAGE, 9: b"y" * PAGE})
        return gnu_tar(Path(name), "a")


VALID = valid_stream()


@pytest.mark.parametrize("length", [0, 1, 511, 512, 700, 1024, 1536, 2048, 2560, 6000, 10000])
def test_cut_streams(length: int) -> None:
    with pytest.raises(ImageInvalid, match="cut off"):
        unpack(VALID[:length])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(1, 255))
def test_damage_is_found_or_harmless(offset: int, flipped: int) -> None:
    damaged = bytearray(VALID)
    damaged[offset] ^= flipped
    try:
        files = unpack(bytes(damaged))
    except ImageInvalid:
        return
    # A digit of the size may be another one now: who asks for a file knows how large it is.
    assert all(10 * PAGE <= len(data) < 100_000 for data in files.values())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ImageInvalid):
        unpack(noise + b"x" * BLOCK)


def patched_map(text: bytes) -> bytes:
    """The valid stream, with another map of its holes."""
    start = VALID.index(b"\n12288\n4096\n") - 1
    while VALID[start - 1] not in (0,):
        start -= 1
    block = start // BLOCK * BLOCK
    return VALID[:block] + text.ljust(BLOCK, b"\0") + VALID[block + BLOCK :]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"2\n36864\n4096\n12288\n4096\n", "overlap"),
        (b"2\n12288\n4096\n12288\n4096\n", "overlap"),
        (b"2\n12288\n4096\n81920\n4096\n", "overlap"),
        (b"1\n12288\n4096\n", "do not fit"),
        (b"3\n12288\n4096\n36864\n4096\n40960\n4096\n", "do not fit"),
        (b"99999999\n", "more than"),
        (b"2\n-1\n4096\n12288\n4096\n", "number is damaged"),
        (b"2\n12288\n9999999999999999999\n", "number is too large"),
        (b"9" * 400 + b"\n", "number is damaged"),
        (b"9" * 512, "number is too long"),
        (b"5\n1\n", "number is damaged|ends too early|too long"),
    ],
)
def test_maps_that_make_no_sense(text: bytes, words: str) -> None:
    with pytest.raises(ImageInvalid, match=words):
        unpack(patched_map(text))


def test_a_header_that_wants_much_memory() -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    with pytest.raises(ImageInvalid, match="header is too long"):
        unpack(info.tobuf(tarfile.USTAR_FORMAT) + bytes(4096))


def test_writer_and_copy_agree_with_sha256sum(tmp_path: Path) -> None:
    write_sparse(tmp_path / "a", 5_000_001, {7: b"x" * PAGE, 900: b"y" * 10})
    expected = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("wb+") as target:
        copied = copy_sparse(source.fileno(), target.fileno(), 5_000_001, nothing)
        looked = copy_sparse(source.fileno(), None, 5_000_001, nothing)
    assert copied == looked == Content(5_000_001, 2 * PAGE, expected)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert (tmp_path / "b").stat().st_blocks == (tmp_path / "a").stat().st_blocks


def test_copy_of_a_file_that_shrank(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    with (tmp_path / "a").open("rb") as source, pytest.raises(ImageInvalid, match="shorter"):
        copy_sparse(source.fileno(), None, 101, nothing)


def test_writer_is_cancelled_by_its_tick() -> None:
    class Enough(Exception):
        pass

    def tick(_count: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        SparseWriter(None, tick).finish(1 << 50)
