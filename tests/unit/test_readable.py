"""Whether QEMU may open an image: said of each user as the kernel does it."""

import os
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qsnapd.model.snapshot import Process
from qsnapd.vm.ram_options import CannotMap
from qsnapd.vm.readable import require_readable

OWNER, OTHER = 4242, 4243
GROUP, SECOND = 5252, 5253


def user(uid: int, gid: int, *groups: int) -> Process:
    return Process(exe="/qemu", argv=("qemu",), cwd="/", uid=uid, gid=gid, groups=groups)


def refusal(path: Path, process: Process) -> str | None:
    try:
        require_readable(str(path), process)
    except CannotMap as exc:
        return str(exc)
    return None


IS_ROOT = os.geteuid() == 0
ME = user(os.geteuid(), os.getegid(), *os.getgroups())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all may search, whatever pytest makes of its own."""
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    return tmp_path


def test_mode_of_the_file_and_of_the_folders(folder: Path) -> None:
    who = user(OTHER, GROUP) if IS_ROOT else ME
    inner = folder / "inner"
    inner.mkdir()
    path = inner / "f"
    path.touch(mode=0o000)
    inner.chmod(0o000)
    denied = "Permission denied"
    assert refusal(path, who) == f"QEMU, as user {who.uid}, cannot search {inner}: {denied}"
    inner.chmod(0o711)
    assert refusal(path, who) == f"QEMU, as user {who.uid}, cannot read {path}: {denied}"
    path.chmod(0o444)
    assert refusal(path, who) is None


def test_links_are_followed(folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "f").touch()
    (folder / "link").symlink_to("hidden/f")
    assert refusal(folder / "link", ME) is None
    (hidden / "f").unlink()
    assert refusal(folder / "link", ME) == (
        f"QEMU, as user {ME.uid}, cannot read {hidden}/f: No such file or directory"
    )


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
ACLS = {
    "none": None,
    "user": acl((1, 6, NOBODY), (2, 4, OTHER), (4, 0, NOBODY), (16, 4, NOBODY), (32, 0, NOBODY)),
    "masked": acl((1, 6, NOBODY), (2, 4, OTHER), (4, 4, NOBODY), (16, 0, NOBODY), (32, 0, NOBODY)),
    "group": acl((1, 6, NOBODY), (4, 0, NOBODY), (8, 4, SECOND), (16, 4, NOBODY), (32, 0, NOBODY)),
    "denied": acl((1, 6, NOBODY), (2, 0, OTHER), (4, 0, NOBODY), (16, 4, NOBODY), (32, 4, NOBODY)),
}
USERS: tuple[Process, ...] = (ME,)
if IS_ROOT:
    USERS = (user(OWNER, GROUP), user(OTHER, GROUP), user(OTHER, SECOND, GROUP), user(9, 9))


@pytest.mark.parametrize("name", ACLS)
def test_says_what_the_kernel_does(name: str, folder: Path) -> None:
    path = folder / "f"
    path.write_text("x")
    if IS_ROOT:
        os.chown(path, OWNER, GROUP)
    answers = set()
    for mode in (0o600, 0o640, 0o604, 0o044, 0o000):
        path.chmod(mode)
        if (text := ACLS[name]) is not None:
            os.setxattr(path, "system.posix_acl_access", text)
        for process in USERS:
            answers.add(answer := refusal(path, process) is None)
            assert answer == can_read(path, process), (process, oct(mode))
    assert answers == {True, False}


def can_read(path: Path, process: Process) -> bool:
    """Whether a program that runs as that user can."""
    ids: dict[str, Any] = {}
    if IS_ROOT:
        ids = {"user": process.uid, "group": process.gid, "extra_groups": process.groups}
    command = ["/bin/cat", str(path)]
    return subprocess.run(command, capture_output=True, check=False, **ids).returncode == 0
