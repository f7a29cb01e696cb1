"""Making a clone, step by step, without any QEMU."""

import os
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsnapd.control.view import placed
from qsnapd.errors import Blocked, VmError
from qsnapd.model.plan import ClonePlan, JournalEntry, Launch
from qsnapd.model.registration import LastSeen, Registration, SeenDisk
from qsnapd.snapshot import recovery
from qsnapd.snapshot.restoring import clone_boot
from qsnapd.snapshot.restoring.clone import give_pipe
from qsnapd.snapshot.restoring.clone_plan import require_free
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.launch import Parent
from tests.unit.test_store import manifest


def test_a_pipe_is_given_and_nothing_in_its_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    give_pipe(str(tmp_path / "pipe"), os.getuid(), os.getgid())
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(VmError, match="something else was put in its place"):
            give_pipe(str(tmp_path / name), os.getuid(), os.getgid())


def test_a_monitor_that_cannot_be_is_no_qemus() -> None:
    require_free("two", Path("/" + "x" * 106))
    with pytest.raises(Blocked, match="1 bytes longer"):
        require_free("two", Path("/" + "x" * 107))


def entry(token: str) -> JournalEntry:
    launch = Launch(token=token, executable="/bin/qemu", argv=("qemu",), cwd="/", uid=0, gid=0)
    plan = ClonePlan(
        token=token,
        vm="two",
        name="s",
        requested_at=datetime.now(UTC),
        to_running=True,
        launch=launch,
        loading=None,
        overlays=(),
        source="vm1",
        qmp="/r/q",
    )
    return JournalEntry(plan=plan, pid=0, start_time_ticks=0)


async def test_a_clone_that_does_not_answer_is_still_to_be_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = VmStore("two", tmp_path)
    begun = entry("1")
    store.restoring.write(begun)
    running = {"1": 4711}
    monkeypatch.setattr(recovery, "find_launched", running.get)
    assert await recovery.recover_without_qemu(store, qemu_img="qemu-img") is None
    assert store.restoring.read() == begun
    running.clear()
    assert await recovery.recover_without_qemu(store, qemu_img="qemu-img") is None
    assert store.restoring.read() is None


def test_a_circle_of_snapshots_is_cut_and_each_counted_once() -> None:
    circle = [manifest("a", "c"), manifest("b", "a"), manifest("c", "b"), manifest("d", "c")]
    found = {snapshot.name: snapshot.descendants for snapshot in placed(circle, "a", {})}
    assert found == {"a": 1, "b": 0, "c": 3, "d": 0}


def test_a_clone_whose_images_were_never_found_is_not_started_on_others() -> None:
    machine = manifest("s1").machine
    seen = LastSeen(machine=machine, disks=(SeenDisk(target="vda", chain=()),))
    registration = Registration(
        name="two",
        qmp="/q",
        source="vm1",
        snapshot="s1",
        created_at=datetime.now(UTC),
        overlays=(),
        files=(),
    )
    seat: Any = SimpleNamespace(name="two", parent=Parent())
    with pytest.raises(Blocked, match="disk vda: its images could not be found from here when VM"):
        clone_boot._plan(seat, registration, seen)
