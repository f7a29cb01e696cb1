"""What another user may do with files: asked of the kernel, in that user's place."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnapd.model.snapshot import Process
from qsnapd.vm.access import READ, SEARCH, WRITE, Want, refusals

NOBODY, GROUP = 65534, 65533
DENIED = "Permission denied"
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may get to, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    try:
        yield path
    finally:
        path.chmod(0o700)
        shutil.rmtree(path)


def somebody(*groups: int) -> Process:
    """Return whom we may ask as: for root anybody, else ourselves."""
    uid, gid = (NOBODY, NOBODY) if IS_ROOT else (os.geteuid(), os.getegid())
    return Process(exe="/q", argv=("q",), cwd="/", uid=uid, gid=gid, groups=groups)


def made(path: Path, mode: int, group: int | None = None) -> str:
    path.write_text("x")
    if group is not None and IS_ROOT:
        os.chown(path, -1, group)
    path.chmod(mode)
    return str(path)


def test_mode_and_groups(folder: Path) -> None:
    # Who is not root is the owner of what they make.
    mine = 0o400 if not IS_ROOT else 0
    file = made(folder / "file", 0o040 | mine, GROUP)
    wants = [Want(file, READ), Want(file, WRITE), Want(str(folder), READ | SEARCH)]
    assert refusals(somebody(GROUP), wants) == [None, DENIED, None]
    without_group = [DENIED if IS_ROOT else None, DENIED, None]
    assert refusals(somebody(), wants) == without_group


def test_folders_on_the_way(folder: Path) -> None:
    file = made(folder / "file", 0o644)
    folder.chmod(0)
    assert refusals(somebody(), [Want(file, READ)]) == [DENIED]
    assert Path(file).exists() == IS_ROOT  # this thread still is who it was


def test_kinds_and_what_is_not_there(folder: Path) -> None:
    wants = [Want(str(folder), WRITE), Want(str(folder / "no"), READ), Want(str(folder), SEARCH)]
    assert refusals(somebody(), wants) == ["Is a directory", "No such file or directory", None]


def test_root_may_all_of_it(folder: Path) -> None:
    file = made(folder / "file", 0o600)
    root = somebody().model_copy(update={"uid": os.geteuid()})
    assert refusals(root, [Want(file, READ | WRITE)]) == [None]
