"""The model of a disk that loses power: what it lets arrive, and what it does not."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crashes.medium import Medium, State
from tests.crashes.recorder import Recorder
from tests.crashes.stage import Stage
from tests.crashes.vault import Vault


class Folder:
    """A folder with an old file in it, and what may become of it."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "folder"
        self.path.mkdir()
        (self.path / "old").write_bytes(b"old" * 3000)
        self._recorder = Recorder(Vault(tmp_path / "vault"), [self.path])

    def after(self, work: Callable[[Path], None], mixtures: int = 30) -> Iterator[State]:
        """Yield what may be there when *work* has been done."""
        with self._recorder.recording():
            work(self.path)
        medium = Medium(self._recorder)
        for step in self._recorder.steps:
            medium.apply(step)
        stage = Stage(self._recorder)
        for state in medium.states("seed", mixtures):
            stage.set(state)
            yield state

    def names_and_contents(self, work: Callable[[Path], None]) -> set[tuple[str, bytes]]:
        """Return all that may be found under any name."""
        found = set[tuple[str, bytes]]()
        for _ in self.after(work):
            files = (path for path in self.path.rglob("*") if path.is_file())
            found |= {(str(p.relative_to(self.path)), p.read_bytes()) for p in files}
        return found

    def names(self, work: Callable[[Path], None]) -> set[frozenset[str]]:
        """Return all sets of names that may be found together."""
        return {frozenset(os.listdir(self.path)) for _ in self.after(work)}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def write(path: Path, data: bytes, *, sync: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(fd, data)
    if sync:
        os.fsync(fd)
    os.close(fd)


def sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def test_a_new_file_may_be_missing_empty_or_torn(folder: Folder) -> None:
    data = b"1" * 4096 + b"2" * 4096
    found = folder.names_and_contents(lambda path: write(path / "new", data, sync=False))
    contents = {content for name, content in found if name == "new"}
    assert {b"", data, bytes(8192)} <= contents
    assert any(content not in (b"", data, bytes(8192)) for content in contents)
    assert {content for name, content in found if name == "old"} == {b"old" * 3000}


def test_a_synced_file_is_whole_or_missing(folder: Folder) -> None:
    found = folder.names(lambda path: write(path / "new", b"new", sync=True))
    assert found == {frozenset({"old"}), frozenset({"old", "new"})}


def test_with_its_folder_synced_it_is_there(folder: Folder) -> None:
    def work(path: Path) -> None:
        write(path / "new", b"new", sync=True)
        sync(path)

    assert folder.names(work) == {frozenset({"old", "new"})}


def test_a_rename_without_a_sync_may_lead_to_nothing(folder: Folder) -> None:
    """The classic: the new name has arrived before the data."""

    def work(path: Path) -> None:
        write(path / "draft", b"new" * 3000, sync=False)
        (path / "draft").rename(path / "old")

    contents = {c for name, c in folder.names_and_contents(work) if name == "old"}
    assert {b"", b"old" * 3000, b"new" * 3000} <= contents


def test_a_rename_after_a_sync_is_all_or_nothing(folder: Folder) -> None:
    def work(path: Path) -> None:
        write(path / "draft", b"new" * 3000, sync=True)
        (path / "draft").rename(path / "old")

    contents = {c for name, c in folder.names_and_contents(work) if name == "old"}
    assert contents == {b"old" * 3000, b"new" * 3000}


def test_what_was_removed_may_be_there_again(folder: Folder) -> None:
    def remove(path: Path) -> None:
        (path / "old").unlink()

    assert folder.names(remove) == {frozenset({"old"}), frozenset[str]()}


def test_the_order_between_folders_is_open(folder: Folder) -> None:
    """Removed here, then there: there it may be gone, and here not."""

    def work(path: Path) -> None:
        (path / "one").mkdir()
        (path / "two").mkdir()
        for name in ("one/file", "two/file"):
            write(path / name, b"", sync=True)
        for place in (path / "one", path / "two", path):
            sync(place)
        (path / "one/file").unlink()
        (path / "two/file").unlink()

    found = {
        (os.path.exists(folder.path / "one/file"), os.path.exists(folder.path / "two/file"))
        for _ in folder.after(work)
    }
    assert (True, False) in found


def test_a_move_between_folders_arrives_whole(folder: Folder) -> None:
    def work(path: Path) -> None:
        (path / "below").mkdir()
        sync(path)
        (path / "old").rename(path / "below/moved")

    for _ in folder.after(work):
        there = (folder.path / "old").exists(), (folder.path / "below/moved").exists()
        assert there in ((True, False), (False, True))


def test_inodes_are_those_of_the_recording(folder: Folder) -> None:
    """Also of folders, and of what was removed meanwhile; no number is another file's later."""
    seen: list[int] = []

    def work(path: Path) -> None:
        for name in ("a", "b", "c"):
            (path / name).mkdir()
            seen.append((path / name).stat().st_ino)
            (path / name).rmdir()
            write(path / name, b"", sync=True)
            seen.append((path / name).stat().st_ino)
            (path / name).unlink()

    for _ in folder.after(work):
        for path in folder.path.iterdir():
            assert path.name == "old" or path.stat().st_ino in seen
    assert len(set(seen)) == len(seen)
