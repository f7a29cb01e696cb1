"""Who serves a socket, and what a process has open: told of real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qsnapd.errors import SessionLost, VmError
from qsnapd.model.snapshot import FileIdentity
from qsnapd.vm.identity import (
    ProcessIdentity,
    identify,
    key_of,
    open_pidfd,
    peer_of,
    plain_name,
    read_process,
    resolve_image_path,
    wait_exit,
)
from qsnapd.vm.proc import status_of

LIMIT_S = 10.0
READY_THEN_WAIT = "print('ready', flush=True); input()"


@contextmanager
def python(
    program: str, *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run *program*, which prints a line when it is ready and then waits for one on stdin."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys, socket\n{program}", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,  # inheritable descriptors are passed, as whoever starts QEMU may do
        cwd=cwd,
        env={**os.environ, **environment},
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            yield child
        finally:
            child.kill()


@contextmanager
def holding(*paths: Path | str, cwd: Path | None = None, then: str = "") -> Iterator[int]:
    """A process that has *paths* open; the pid."""
    program = f"files = [open(path) for path in sys.argv[1:]]; {then}\n{READY_THEN_WAIT}"
    with python(program, *paths, cwd=cwd) as child:
        yield child.pid


def identity_of(path: Path) -> FileIdentity:
    status = path.stat()
    return FileIdentity(path=str(path), device=status.st_dev, inode=status.st_ino)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "a.raw"
    path.parent.mkdir()
    path.write_bytes(b"x")
    return path


def test_the_server_of_a_socket_is_told(tmp_path: Path) -> None:
    address = tmp_path / "qmp"
    program = (
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(1)\n"
        "print('ready', flush=True); peer, _ = s.accept(); peer.send(b'hello'); input()"
    )
    with python(program, address) as child, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(address))
        assert sock.recv(5) == b"hello"
        peer = peer_of(sock)
    assert (peer.pid, peer.uid) == (child.pid, os.geteuid())


def test_a_parent_that_only_opened_the_socket_is_not_taken_for_the_server(tmp_path: Path) -> None:
    address = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as sock:
        listener.bind(str(address))
        listener.listen(1)
        listener.set_inheritable(True)
        program = (
            "s = socket.socket(fileno=int(sys.argv[1]))\n"
            "print('ready', flush=True); peer, _ = s.accept(); peer.send(b'hello'); input()"
        )
        with python(program, str(listener.fileno())) as child:
            sock.connect(str(address))
            assert sock.recv(5) == b"hello"
            assert peer_of(sock).pid == child.pid


def test_a_process_is_read_as_it_was_started(tmp_path: Path) -> None:
    with python(READY_THEN_WAIT, "a b", "", cwd=tmp_path, QEMU_X="1", MY_SECRET="2") as child:
        process = read_process(identify(child.pid))
    assert process.exe == os.path.realpath(sys.executable)
    assert process.argv[0] == sys.executable
    assert process.argv[-2:] == ("a b", "")
    assert process.cwd == str(tmp_path)
    assert (process.uid, process.gid) == (os.geteuid(), os.getegid())
    assert set(process.groups) == set(os.getgroups())
    environment = dict(process.environment)
    assert environment["QEMU_X"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert "MY_SECRET" not in environment


PLAIN = (sys.executable, "-c", READY_THEN_WAIT, "-m", "64", "-object", "rng,id=r")


@pytest.mark.parametrize(
    ("told", "believed"),
    [
        (json.dumps(PLAIN), True),
        (json.dumps(PLAIN).replace("64", "128"), False),
        (json.dumps(PLAIN[1:]), False),
        (json.dumps([*PLAIN, 1]), False),
        ("[]", False),
        ("{}", False),
        ("nonsense", False),
    ],
)
def test_words_of_a_process_whose_ram_is_mapped_are_the_plain_ones(
    told: str, believed: bool
) -> None:
    words = (*PLAIN, "-object", "ram,id=m", "-machine", "memory-backend=m", "-incoming", "x", "-S")
    variables = {"QSNAPD_ARGV": told, "QSNAPD_TOKEN": "x", "QEMU_X": "1"}
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            process = read_process(identify(child.pid))
        finally:
            child.kill()
    assert process.argv == (PLAIN if believed else words)
    assert process.environment == (("QEMU_X", "1"),)


@pytest.mark.parametrize(
    "words", [("-runas", "u"), ("--chroot", "/c"), ("-run-with", "async-teardown=on,user=u")]
)
def test_what_gave_up_root_is_started_again_as_whom_it_became(words: tuple[str, ...]) -> None:
    with python(READY_THEN_WAIT, "-name", "-runas", cwd=Path("/")) as child:
        assert read_process(identify(child.pid)).uid == os.geteuid()
    with python(READY_THEN_WAIT, *words) as child:
        process = read_process(identify(child.pid))
    assert (process.uid, process.gid) == (os.geteuid(), os.getegid())


def test_a_daemonized_process_began_where_its_environment_says(tmp_path: Path) -> None:
    for word, pwd, cwd in [
        ("-daemonize", str(tmp_path), str(tmp_path)),
        ("--daemonize", str(tmp_path / "gone"), "/"),
        ("-S", str(tmp_path), "/"),
    ]:
        with python(READY_THEN_WAIT, word, cwd=Path("/"), PWD=pwd) as child:
            assert read_process(identify(child.pid)).cwd == cwd


def test_a_process_that_ended_is_session_lost() -> None:
    with python(READY_THEN_WAIT) as child:
        identity = identify(child.pid)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SessionLost, match="has ended"):  # a zombie, but gone
            identify(child.pid)
    with pytest.raises(SessionLost, match=f"process {child.pid}, has ended"):
        read_process(identity)
    with pytest.raises(SessionLost, match="has ended"):
        open_pidfd(identity)
    with pytest.raises(SessionLost, match="has ended"):
        resolve_image_path(child.pid, "/a")


def test_a_pid_that_was_given_away_is_not_taken_for_the_process() -> None:
    me = identify(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SessionLost):
        open_pidfd(replace(me, start_time_ticks=me.start_time_ticks - 1))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_start_time_is_read_behind_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    started = identify(os.getpid())
    own_name = Path("/proc/self/comm")
    name = own_name.read_text()
    try:
        own_name.write_text("a) R 1 (b")
        assert identify(os.getpid()) == started
    finally:
        own_name.write_text(name.strip())


async def test_the_end_of_a_process_that_is_no_child_is_seen(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    starts_another = (
        "import subprocess\n"
        "other = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "open(sys.argv[1], 'w').write(str(other.pid))\n"
        f"{READY_THEN_WAIT}"
    )
    with python(starts_another, note):
        identity = identify(int(note.read_text()))
        pidfd = open_pidfd(identity)
        try:
            with trio.move_on_after(0.05) as patience:
                await wait_exit(pidfd)
            assert patience.cancelled_caught
            os.kill(identity.pid, signal.SIGKILL)
            with trio.fail_after(LIMIT_S):
                await wait_exit(pidfd)
        finally:
            os.close(pidfd)
    assert key_of(f"/proc/{identity.pid}/exe") is None


def test_an_absolute_name_is_found(image: Path) -> None:
    with holding(image) as pid:
        assert resolve_image_path(pid, str(image)) == identity_of(image)


def test_a_symbolic_link_is_followed_to_the_file(image: Path) -> None:
    link = image.with_name("current")
    link.symlink_to(image)
    with holding(image) as pid:
        assert resolve_image_path(pid, str(link)) == identity_of(image)


def test_a_relative_name_is_found_from_the_working_directory(image: Path) -> None:
    with holding("images/a.raw", cwd=image.parent.parent) as pid:
        assert resolve_image_path(pid, "images/a.raw") == identity_of(image)
        assert resolve_image_path(pid, "./images/../images/a.raw") == identity_of(image)


def test_a_relative_name_is_found_after_the_working_directory_changed(image: Path) -> None:
    with holding("images/a.raw", cwd=image.parent.parent, then="os.chdir('/')") as pid:
        assert resolve_image_path(pid, "images/a.raw") == identity_of(image)


def test_of_two_files_with_the_same_end_none_is_guessed(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "a.raw"
    other.parent.mkdir()
    other.write_bytes(b"y")
    with holding(image, other, cwd=image.parent, then="os.chdir('/')") as pid:
        assert resolve_image_path(pid, "a.raw") is None


def test_json_names_are_understood(image: Path) -> None:
    name = f'json:{{"driver": "qcow2", "file": {{"driver": "file", "filename": "{image}"}}}}'
    with holding(image) as pid:
        assert resolve_image_path(pid, name) == identity_of(image)


@pytest.mark.parametrize("name", ["nbd://host/export", 'json:{"driver": "null-co"}', "", "/dev"])
def test_what_is_no_file_is_not_found(name: str, image: Path) -> None:
    with holding(image) as pid:
        assert resolve_image_path(pid, name) is None


def test_a_file_put_under_the_same_name_is_not_taken_for_the_open_one(image: Path) -> None:
    with holding(image) as pid:
        image.unlink()
        image.write_bytes(b"another")
        assert resolve_image_path(pid, str(image)) is None


def test_a_renamed_file_is_found_under_its_new_name_only(image: Path) -> None:
    with holding(image) as pid:
        renamed = image.rename(image.with_name("b.raw"))
        assert resolve_image_path(pid, str(image)) is None
        assert resolve_image_path(pid, str(renamed)) == identity_of(renamed)


def test_a_name_within_a_chroot_is_found_from_outside(image: Path, tmp_path: Path) -> None:
    new_user = "import ctypes; os.geteuid() and ctypes.CDLL(None).unshare(0x10000000)"
    with holding(image, then=f"{new_user}; os.chroot({str(tmp_path)!r})") as pid:
        assert resolve_image_path(pid, "/images/a.raw") == identity_of(image)


def test_a_process_of_another_user_is_refused_in_words() -> None:
    user = os.geteuid()
    with python(READY_THEN_WAIT) as child:
        pid = child.pid if user == 0 else 1
        identity = identify(pid)
        os.seteuid(65534 if user == 0 else user)
        try:
            with pytest.raises(VmError, match="may not look into QEMU's process"):
                read_process(identity)
            with pytest.raises(VmError, match="may not look into QEMU's process"):
                resolve_image_path(pid, "/a")
        finally:
            os.seteuid(user)
    assert identity == ProcessIdentity(pid, identity.start_time_ticks, uid=0)


def test_a_path_that_leads_nowhere_has_no_key(tmp_path: Path) -> None:
    assert key_of(str(tmp_path / "none")) is None
    assert key_of(str(tmp_path)) == (tmp_path.stat().st_dev, tmp_path.stat().st_ino)


def test_process_that_is_not_who_listened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's process may execute a setuid program with the connection in its hands."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        client.connect(str(path))
        accepted, _ = listener.accept()
        with accepted:
            assert peer_of(client).pid == os.getpid()
            status = {**status_of(os.getpid()), "Uid": "65534\t0\t0\t0"}
            monkeypatch.setattr("qsnapd.vm.identity.status_of", lambda pid: status)
            credentials = Credentials(65534, 65534)
            monkeypatch.setattr("qsnapd.vm.identity._CREDENTIALS", credentials)
            with pytest.raises(VmError, match="is not the user 65534 who began to listen"):
                peer_of(client)


class Credentials:
    """In place of the kernel's, which an unprivileged test cannot have."""

    size = 12

    def __init__(self, uid: int, gid: int) -> None:
        self._ids = (0, uid, gid)

    def unpack(self, _: bytes) -> tuple[int, int, int]:
        return self._ids


@pytest.mark.parametrize("name", ["json:{", "json:" + "[" * 100000, "a\0b"])
def test_names_that_make_no_sense(name: str) -> None:
    if name.startswith("json:"):
        with pytest.raises(VmError, match="not JSON"):
            plain_name(name)
    else:
        assert key_of(name) is None
