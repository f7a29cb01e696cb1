"""Who may read a file: asked of modes and ACLs, and compared with what the kernel does."""

import os
import struct
import subprocess
from pathlib import Path

import pytest

from qsnapd.vm.ram_options import CannotMap
from qsnapd.vm.readable import User, require_readable

OWNER, OTHER = 4242, 4243
GROUP, SECOND = 5252, 5253


def refusal(path: Path, user: User) -> str | None:
    try:
        require_readable(str(path), user)
    except CannotMap as exc:
        return str(exc)
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that all may search, whatever pytest makes of its own."""
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(parent.stat().st_mode | 0o011)
    return tmp_path


def test_root_always_may(folder: Path) -> None:
    path = folder / "f"
    path.touch(mode=0o000)
    assert refusal(path, User(0, 0)) is None


def test_mode_of_the_file_and_of_the_folders(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir(mode=0o700)
    path = inner / "f"
    path.touch()
    user = User(os.geteuid() + OTHER, os.getegid() + GROUP)
    inner.chmod(0o700)
    assert refusal(path, user) == f"QEMU runs as user {user.uid}, who may not search {inner}"
    inner.chmod(0o711)
    path.chmod(0o640)
    assert refusal(path, user) == f"QEMU runs as user {user.uid}, who may not read {path}"
    path.chmod(0o604)
    assert refusal(path, user) is None
    in_group = User(user.uid, GROUP, (os.getegid(),))
    assert "may not read" in (refusal(path, in_group) or "")
    path.chmod(0o640)
    assert refusal(path, in_group) is None


def test_links_are_followed(folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "f").touch(mode=0o644)
    (folder / "link").symlink_to("hidden/f")
    user = User(os.geteuid() + OTHER, GROUP)
    assert f"may not search {hidden}" in (refusal(folder / "link", user) or "")
    assert "cannot be looked at" in (refusal(folder / "missing", user) or "")


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
USERS = (User(OWNER, GROUP), User(OTHER, GROUP), User(OTHER, SECOND, (GROUP,)), User(9, 9))


@pytest.mark.parametrize("name", ACLS)
def test_says_what_the_kernel_does(name: str, folder: Path) -> None:
    """As root, by trying as each of the users; else by what may be asked of oneself."""
    path = folder / "f"
    path.write_text("x")
    if os.geteuid() == 0:
        os.chown(path, OWNER, GROUP)
    users = USERS if os.geteuid() == 0 else (User(os.geteuid(), os.getegid(), os.getgroups()),)
    for mode in (0o600, 0o640, 0o604, 0o044, 0o000):
        path.chmod(mode)
        if (text := ACLS[name]) is not None:
            os.setxattr(path, "system.posix_acl_access", text)
        for user in users:
            assert (refusal(path, user) is None) == can_read(path, user), (user, oct(mode))


def can_read(path: Path, user: User) -> bool:
    if user.uid == os.geteuid():
        return os.access(path, os.R_OK)
    ended = subprocess.run(
        ["/bin/cat", str(path)],
        user=user.uid,
        group=user.gid,
        extra_groups=list(user.groups),
        capture_output=True,
        check=False,
    )
    return ended.returncode == 0
