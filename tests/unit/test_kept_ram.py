"""RAM that a file keeps: which files these are, and that they are emptied."""

import os
from pathlib import Path

import pytest

from qsnapd.errors import Blocked
from qsnapd.vm.argv import parse_options
from qsnapd.vm.kept_ram import empty_file, kept_ram_files

BACKEND = "memory-backend-file,id=ram,size=64M"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (f"{BACKEND},mem-path=/dev/shm/ram,share=on", ["/dev/shm/ram"]),
        (f"{BACKEND},mem-path=ram,share=yes", ["/vm/ram"]),
        (f"{BACKEND},mem-path=/a,,b,share=on", ["/a,b"]),
        ('{"qom-type":"memory-backend-file","id":"r","mem-path":"/r","share":true}', ["/r"]),
        (f"{BACKEND},mem-path=/dev/shm/ram", []),
        (f"{BACKEND},mem-path=/dev/shm/ram,share=off", []),
        (f"{BACKEND},mem-path=/rom,share=on,readonly=on", []),
        ("memory-backend-memfd,id=ram,size=64M,share=on", []),
        ("{'qom-type':'memory-backend-file'}", []),
    ],
)
def test_only_shared_files_keep_ram(value: str, found: list[str]) -> None:
    options = parse_options(["-m", "64", "-object", value, "-nodefaults"])
    assert kept_ram_files(options, "/vm") == found


def test_a_part_of_a_file_is_refused() -> None:
    options = parse_options(["-object", f"{BACKEND},mem-path=/ram,share=on,offset=1M"])
    with pytest.raises(Blocked, match="part of its file"):
        kept_ram_files(options, "/")


def test_an_emptied_file_is_zeros_and_as_long(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(b"old!" * 4096)
    empty_file(str(path), os.getuid())
    assert path.read_bytes() == bytes(16384)
    assert path.stat().st_blocks == 0


def test_nothing_is_made_of_what_is_not_there(tmp_path: Path) -> None:
    empty_file(str(tmp_path / "ram"), os.getuid())
    empty_file(str(tmp_path), os.getuid())
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_refused() -> None:
    with pytest.raises(Blocked, match="no plain file"):
        empty_file("/dev/null", os.getuid())


def test_another_users_file_is_left_alone(tmp_path: Path) -> None:
    """The command line is the word of whoever runs QEMU, and qsnapd may be root."""
    path = tmp_path / "ram"
    path.write_bytes(b"somebody else's")
    with pytest.raises(Blocked, match="is not of user 12345"):
        empty_file(str(path), 12345)
    assert path.read_bytes() == b"somebody else's"
