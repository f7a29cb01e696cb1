"""Who uses a snapshot's files: recorded, and true only of processes that live."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsnapd.errors import StoreError, WrongState
from qsnapd.store.leases import LEASES_NAME, Lease, Leases, mapped_by
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.proc import start_time_ticks

MAP = """
import mmap, sys
with open(sys.argv[1]) as file:
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
print('ready', flush=True)
input()
"""
WAIT = "print('ready', flush=True); input()"


@contextmanager
def process(program: str, *arguments: Path) -> Iterator[int]:
    """Run a Python program that says when it is ready and then waits; its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            yield child.pid
        finally:
            child.kill()


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    return VmStore("vm1", tmp_path).leases


def hold(leases: Leases, snapshot: str, holder: str, pid: int, *, mapped: bool = True) -> Lease:
    leases.hold(snapshot, holder, pid, start_time_ticks(pid), mapped=mapped)
    return next(lease for lease in leases.holders(snapshot) if lease.pid == pid)


def test_lease_ends_with_its_process(leases: Leases, tmp_path: Path) -> None:
    assert leases.holders("s") == ()
    with process(WAIT) as one, process(WAIT) as two:
        first = hold(leases, "s", "vm1", one)
        second = hold(leases, "s", "vm2", two, mapped=False)
        other = hold(leases, "other", "vm2", two)
        assert leases.holders("s") == (first, second)
        assert Leases("vm1", tmp_path).holders("s") == (first, second)
        hold(leases, "s", "vm1", one)  # the same again is one lease
        assert len(leases.holders("s")) == 2
        leases.release("vm2", two)
        leases.release("vm2", two)
        assert leases.holders("s") == (first,)
        assert leases.holders("other") == ()
        assert other.is_true
    assert not first.is_true
    assert leases.holders("s") == ()


def test_pid_that_means_another_process_by_now_holds_nothing(leases: Leases) -> None:
    mine = start_time_ticks(os.getpid())
    leases.hold("s", "vm1", os.getpid(), mine + 1, mapped=True)
    assert leases.holders("s") == ()
    leases.hold("s", "vm1", os.getpid(), mine, mapped=True)
    assert [lease.start_time_ticks for lease in leases.holders("s")] == [mine]


def test_users_are_named(leases: Leases, tmp_path: Path) -> None:
    image = tmp_path / "memory.img"
    image.write_bytes(bytes(4096))
    leases.require_unused("s", image)
    leases.require_unused("s", None)
    with process(WAIT) as one, process(MAP, image) as two:
        hold(leases, "s", "vm2", one, mapped=False)
        with pytest.raises(WrongState) as refused:
            leases.require_unused("s", image)
        assert str(refused.value) == (
            f"snapshot s of VM vm1 is in use: VM vm2 (pid {one}) runs on its disks; "
            f"process {two} ({Path(f'/proc/{two}/comm').read_text().strip()}) maps its memory image"
        )
        hold(leases, "s", "vm3", two)
        with pytest.raises(WrongState, match=rf"VM vm3 \(pid {two}\) runs on its memory image and"):
            leases.require_unused("s", image)
    leases.require_unused("s", image)


def test_mapping_is_found_by_inode_alone(tmp_path: Path) -> None:
    image, copy = tmp_path / "memory.img", tmp_path / "copy.img"
    image.write_bytes(bytes(4096))
    copy.write_bytes(bytes(4096))
    assert mapped_by(tmp_path / "missing") == ()
    with process(MAP, image) as pid:
        moved = image.rename(tmp_path / "moved.img")
        assert mapped_by(moved) == (pid,)
        assert mapped_by(copy) == ()
    assert mapped_by(moved) == ()


def test_clones_that_start_at_once(leases: Leases) -> None:
    mine = start_time_ticks(os.getpid())
    names = [f"clone{n}" for n in range(20)]
    threads = [
        threading.Thread(target=leases.hold, args=("s", n, os.getpid(), mine), kwargs={"mapped": 1})
        for n in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(lease.holder for lease in leases.holders("s")) == sorted(names)


def test_record_that_is_damaged(
    leases: Leases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / LEASES_NAME
    for text in ("nonsense", "{}", json.dumps([{"snapshot": "s"}])):
        path.write_text(text)
        with caplog.at_level(logging.WARNING):
            assert leases.holders("s") == ()
        assert "is not understood and ignored" in caplog.text
        caplog.clear()
    hold(leases, "s", "vm1", os.getpid())
    assert path.stat().st_mode & 0o777 == 0o600


def test_record_that_cannot_be_kept(leases: Leases, tmp_path: Path) -> None:
    (tmp_path / LEASES_NAME).mkdir()
    with pytest.raises(StoreError, match="cannot read"):
        leases.holders("s")
    (tmp_path / LEASES_NAME).rmdir()
    tmp_path.joinpath(".leases.new").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        hold(leases, "s", "vm1", os.getpid())


def test_snapshots_and_leases_do_not_meet(tmp_path: Path) -> None:
    store = VmStore("vm1", tmp_path)
    hold(store.leases, "s", "vm1", os.getpid())
    assert store.snapshots() == {}
    assert store.problems() == {}
    assert store.partials() == ()
