"""Files: never over another one, removed only if ours, refusals in words."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsnapd.errors import ImageInvalid, StoreError, StoreFull, TargetRefused
from qsnapd.image import digest, files


def test_a_new_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    fd = files.create_exclusive(tmp_path / "new")
    assert os.write(fd, b"memory") == 6
    assert (tmp_path / "new").read_bytes() == b"memory"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(fd)


def _file(path: Path) -> None:
    path.write_text("theirs")


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("occupy", [_file, _dangling, Path.mkdir])
def test_what_exists_is_left_alone(tmp_path: Path, occupy: Callable[[Path], None]) -> None:
    path = tmp_path / "taken"
    occupy(path)
    before = path.lstat()
    with pytest.raises(TargetRefused, match="taken: it exists already"):
        files.create_exclusive(path)
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing/file", "cannot create .* no such file or directory"),
        ("plain/file", "not a directory"),
        ("a" * 300, "name is too long"),
        ("loop/file", "too many symbolic links"),
    ],
)
def test_refusals_say_why(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(TargetRefused, match=words):
        files.create_exclusive(tmp_path / path)


def test_publish(tmp_path: Path) -> None:
    partial, final = tmp_path / "x.partial", tmp_path / "x"
    partial.write_text("whole")
    files.publish(partial, final)
    assert os.listdir(tmp_path) == ["x"]
    assert final.read_text() == "whole"


@pytest.mark.parametrize("hard_links", [True, False])
def test_publish_never_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", _refuse_links)
    partial, final = tmp_path / "x.partial", tmp_path / "x"
    partial.write_text("ours")
    final.write_text("theirs")
    with pytest.raises(TargetRefused, match="it exists already"):
        files.publish(partial, final)
    assert (partial.read_text(), final.read_text()) == ("ours", "theirs")


def _refuse_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no links here")


def test_publish_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _refuse_links)
    (tmp_path / "x.partial").write_text("whole")
    files.publish(tmp_path / "x.partial", tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "whole"


def test_reopen_follows_the_file_not_its_name(tmp_path: Path) -> None:
    fd = files.create_exclusive(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    again = files.reopen(fd, os.O_WRONLY)
    os.write(again, b"here")
    assert (tmp_path / "new").read_bytes() == b"here"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.read(again, 1)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0


def test_space(tmp_path: Path) -> None:
    free = files.free_bytes(tmp_path)
    files.require_space(tmp_path, 4096)
    with pytest.raises(StoreFull) as full:
        files.require_space(tmp_path, 1 << 62)
    assert full.value.needed_bytes == 1 << 62
    assert full.value.free_bytes == pytest.approx(free, rel=0.5)
    with pytest.raises(TargetRefused, match=r"cannot use .*missing: there is no such"):
        files.free_bytes(tmp_path / "missing")


def test_identity_by_path_and_by_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    fd = files.create_exclusive(path)
    (tmp_path / "link").symlink_to("disk")
    by_path, by_fd = files.identity(path), files.identity(fd)
    by_link = files.identity(tmp_path / "link")
    assert by_path == by_fd
    assert by_path.path == str(path)
    assert (by_link.device, by_link.inode) == (by_path.device, by_path.inode)
    with pytest.raises(TargetRefused, match=r"cannot use .*missing: there is no such"):
        files.identity(tmp_path / "missing")


def test_only_ours_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    ours = files.identity(files.create_exclusive(path))
    assert not files.remove_if_ours(path, ours.inode + 1)
    assert path.exists()
    assert files.remove_if_ours(path, ours.inode)
    assert not path.exists()
    assert not files.remove_if_ours(path, ours.inode)
    assert not files.remove_if_ours(path / "below", 1)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_an_umask_takes_and_gives_nothing(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.make_directory(tmp_path / "a" / "b")
        os.close(files.create_exclusive(tmp_path / "a" / "b" / "file"))
        files.replace_file(tmp_path / "a" / "b" / "record", "")
    finally:
        os.umask(before)
    modes = {str(p.relative_to(tmp_path)): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes == {"a": 0o700, "a/b": 0o700, "a/b/file": 0o600, "a/b/record": 0o600}


def test_a_directory_that_cannot_be_synced_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next attempt would find it, and take it for lasting."""
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", _fail)
        with pytest.raises(OSError, match="Input/output error"):
            files.make_directory(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    files.make_directory(tmp_path / "a")


def _fail(_fd: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_record_whose_folder_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first one is not there; of a later one nobody knows."""
    path = tmp_path / "record"
    real = os.fsync

    def fail_at_folders(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            _fail(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", fail_at_folders)
    with pytest.raises(OSError, match="Input/output error") as first:
        files.replace_file(path, "one")
    assert not isinstance(first.value, files.NotLasting)
    assert not path.exists()
    path.write_text("one")
    with pytest.raises(files.NotLasting):
        files.replace_file(path, "two")
    assert path.read_text() == "two"


def test_a_draft_is_never_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written of it may seem to be written the next time."""
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", _fail)
        with pytest.raises(OSError, match="Input/output error"):
            files.replace_file(tmp_path / "record", "one")
    with (tmp_path / "record.new").open() as failed:
        files.replace_file(tmp_path / "record", "two")
        assert os.fstat(failed.fileno()).st_ino != (tmp_path / "record").stat().st_ino


def test_a_link_to_ours_is_not_ours(tmp_path: Path) -> None:
    ours = files.identity(files.create_exclusive(tmp_path / "file"))
    (tmp_path / "link").symlink_to("file")
    assert not files.remove_if_ours(tmp_path / "link", ours.inode)
    assert (tmp_path / "link").is_symlink()


Pieces = st.lists(st.tuples(st.integers(0, 3 << 20), st.binary(min_size=1, max_size=9000)))


@given(pieces=Pieces, size=st.integers(0, 4 << 20))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_digest_of_any_sparse_file(
    tmp_path: Path, pieces: list[tuple[int, bytes]], size: int
) -> None:
    path = tmp_path / "sparse"
    with path.open("wb+") as file:
        for offset, data in pieces:
            os.pwrite(file.fileno(), data, offset)
        file.truncate(size)
        assert digest.sha256(file.fileno()) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_extents_are_what_is_not_a_hole(tmp_path: Path) -> None:
    fd = files.create_exclusive(tmp_path / "sparse")
    os.ftruncate(fd, 1 << 20)
    for page in (3, 4, 9):
        os.pwrite(fd, b"x", page * 65536)
    os.fsync(fd)
    found = [n for start, end in files.data_extents(fd, 0, 1 << 20) for n in range(start, end)]
    assert {page * 65536 for page in (3, 4, 9)} <= set(found)
    assert len(found) == files.allocated_bytes(fd)
    assert list(files.data_extents(fd, 10 << 16, 1 << 20)) == []


def test_digest_can_be_cancelled(tmp_path: Path) -> None:
    fd = files.create_exclusive(tmp_path / "big")
    os.ftruncate(fd, 100 << 20)
    calls = 0

    def third_time() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        digest.sha256(fd, third_time)
    assert calls == 3


def test_a_failing_disk_is_the_store_s_failure(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises((StoreError, ImageInvalid), match="cannot read the memory image"):
        digest.sha256(directory)
    os.close(directory)
