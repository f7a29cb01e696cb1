"""The store: one daemon, whole snapshots only, nothing unreadable dropped in silence."""

import json
import logging
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnapd.errors import (
    ManifestInvalid,
    ManifestTooNew,
    SnapshotExists,
    StoreError,
    UnknownSnapshot,
)
from qsnapd.image import files
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import (
    DiskLayer,
    FileIdentity,
    ImageFormat,
    Machine,
    Manifest,
    MemoryImage,
    Process,
    Strategy,
)
from qsnapd.snapshot.moving.imported import remove_leftovers
from qsnapd.store import tree
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def manifest(name: str, parent: str | None = None, *, vm: str = "vm1", age: int = 0) -> Manifest:
    chain = (FileIdentity(path="/d/a.qcow2", device=1, inode=2),)
    return Manifest(
        name=name,
        vm=vm,
        parent=parent,
        created_at=EPOCH + timedelta(minutes=age),
        state="running",
        reason="RUNNING_BOOTED",
        strategy=Strategy.BACKGROUND,
        image_format=ImageFormat.MAPPED_RAM,
        paused_ms=12.5,
        total_ms=900,
        memory=MemoryImage(path=f"/s/{vm}/{name}/memory.img", size_bytes=5, allocated_bytes=5),
        disks=(
            DiskLayer(
                target="vda",
                node="disk0",
                frozen="/d/a.qcow2",
                frozen_format="qcow2",
                overlay=f"/d/a.{name}.qcow2",
                virtual_size_bytes=1 << 30,
                chain=chain,
            ),
        ),
        qemu_version="10.0.2",
        machine=Machine(
            type="pc-q35-10.0",
            ram_bytes=1 << 30,
            process=Process(exe="/usr/bin/qemu", argv=("qemu",) * 40, cwd="/", uid=0, gid=0),
        ),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state")


@pytest.fixture
def vm(store: Store) -> VmStore:
    return store.vm("vm1")


def take(vm: VmStore, name: str, parent: str | None = None, age: int = 0) -> Path:
    (vm.stage(name) / "memory.img").write_bytes(b"image")
    vm.commit(name, manifest(name, parent, age=age))
    return vm.path(name)


def test_directories_are_for_their_owner_alone(vm: VmStore) -> None:
    staging = vm.stage("s1")
    for path in (vm.directory.parent, vm.directory, staging):
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_second_daemon_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"in use by another qsnapd \(pid {os.getpid()}\)"):
        Store(tmp_path / "state")
    store.close()
    store.close()
    with Store(tmp_path / "state") as second:
        assert second.vm("vm1") is second.vm("vm1")


def test_a_state_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/below"):
        with pytest.raises(StoreError, match="cannot use the state directory"):
            Store(tmp_path / path)


def test_a_snapshot_comes_into_being_by_its_commit(vm: VmStore) -> None:
    staging = vm.stage("s1")
    (staging / "memory.img").write_bytes(b"image")
    (vm.directory / ".mine.partial").write_text("a stranger's, and no folder")
    assert vm.partials() == ("s1",)
    assert vm.snapshots() == {}
    vm.commit("s1", manifest("s1"))
    assert vm.partials() == ()
    assert vm.snapshots() == {"s1": manifest("s1")}
    assert (vm.path("s1") / "memory.img").read_bytes() == b"image"
    assert (vm.path("s1") / "snapshot.json").stat().st_mode & 0o777 == 0o600
    assert not staging.exists()


def test_another_process_reads_the_same(vm: VmStore) -> None:
    take(vm, "s1")
    assert VmStore("vm1", vm.directory).manifest("s1") == manifest("s1")


def test_a_taken_name_is_refused(vm: VmStore) -> None:
    take(vm, "s1")
    with pytest.raises(SnapshotExists, match="'vm1' already has a snapshot 's1'"):
        vm.stage("s1")
    assert vm.partials() == ()


def test_a_commit_never_replaces(vm: VmStore) -> None:
    vm.stage("s1")
    vm.path("s1").mkdir()  # rename() would replace an empty directory
    with pytest.raises(SnapshotExists):
        vm.commit("s1", manifest("s1"))
    assert list(vm.path("s1").iterdir()) == []
    vm.path("s1").rmdir()
    vm.commit("s1", manifest("s1"))  # what was staged stood
    assert "s1" in vm.snapshots()


def test_a_commit_of_another_manifest_is_a_bug(vm: VmStore) -> None:
    vm.stage("s1")
    with pytest.raises(ValueError, match="not that of vm1/s1"):
        vm.commit("s1", manifest("s2"))


def test_a_commit_that_cannot_write_leaves_no_snapshot(vm: VmStore) -> None:
    with pytest.raises(StoreError, match="cannot write"):
        vm.commit("never-staged", manifest("never-staged"))
    assert vm.snapshots() == {}


def test_past_the_commit_point_nothing_fails(
    vm: VmStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vm.stage("s1")

    def fail_for_the_parent(path: Path) -> None:
        if path == vm.directory:
            raise OSError(5, "Input/output error")
        files.sync_directory(path)

    monkeypatch.setattr("qsnapd.store.snapshots.sync_directory", fail_for_the_parent)
    with caplog.at_level(logging.WARNING):
        vm.commit("s1", manifest("s1"))
    assert "may not survive a power failure" in caplog.text
    assert "s1" in vm.snapshots()


def test_unstaging(vm: VmStore) -> None:
    take(vm, "kept")
    (vm.stage("s1") / "memory.img").write_bytes(b"half")
    with pytest.raises(StoreError, match="in the way"):
        vm.stage("s1")
    vm.unstage("s1")
    vm.unstage("s1")
    assert sorted(p.name for p in vm.directory.iterdir()) == ["kept"]
    assert vm.stage("s1").is_dir()


def test_unknown_names(vm: VmStore) -> None:
    for name in ("nobody", "..", "/etc", ""):
        with pytest.raises(UnknownSnapshot, match="has no snapshot"):
            vm.manifest(name)
    for name in ("..", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="name"):
            vm.stage(name)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"format": 4}, ManifestTooNew, "has format 4, this qsnapd reads up to 3"),
        ({"format": 7, "brand_new": 1, "name": []}, ManifestTooNew, "format 7"),
        ({"format": None}, ManifestInvalid, "does not tell its format"),
        ({"format": True}, ManifestInvalid, "does not tell its format"),
        ({"format": "1"}, ManifestInvalid, "does not tell its format"),
        ({"surprise": 1}, ManifestInvalid, "field 'surprise' is unknown"),
        ({"paused_ms": -1}, ManifestInvalid, "field 'paused_ms'"),
        ({"memory": {"path": "x"}}, ManifestInvalid, r"field 'memory\.path'"),
        ({"name": "other"}, ManifestInvalid, "is that of snapshot 'other'"),
        ({"vm": "vm2"}, ManifestInvalid, "of VM 'vm2'"),
    ],
)
def test_what_is_not_understood_is_reported(
    vm: VmStore, change: dict[str, object], error: type[StoreError], words: str
) -> None:
    take(vm, "good")
    path = take(vm, "bad") / "snapshot.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert set(vm.snapshots()) == {"good"}
    problem = vm.problems()["bad"]
    assert type(problem) is error
    assert str(path) in str(problem)
    with pytest.raises(error, match=words):
        vm.manifest("bad")


@pytest.mark.parametrize("text", ["", "{", "[]", "nonsense", "[" * 100_000, '{"format": 1}'])
def test_damage_is_reported(vm: VmStore, text: str) -> None:
    path = take(vm, "bad") / "snapshot.json"
    path.write_text(text)
    assert isinstance(vm.problems()["bad"], ManifestInvalid)
    assert vm.snapshots() == {}


def test_a_directory_without_a_manifest_is_reported(vm: VmStore) -> None:
    take(vm, "s1")
    (vm.path("s1") / "snapshot.json").unlink()
    assert "is missing" in str(vm.problems()["s1"])
    with pytest.raises(SnapshotExists):
        vm.stage("s1")


def test_changes_behind_our_back_are_seen(vm: VmStore) -> None:
    path = take(vm, "s1") / "snapshot.json"
    assert vm.manifest("s1").description == ""
    path.write_text(manifest("s1").model_copy(update={"description": "edited"}).model_dump_json())
    assert vm.manifest("s1").description == "edited"
    path.unlink()
    path.parent.rename(vm.directory / "s2")
    assert vm.snapshots() == {}


def test_what_snapshots_have_in_common_is_held_once(vm: VmStore) -> None:
    take(vm, "s1")
    take(vm, "s2")
    first, second = (m.disks[0].chain[0] for m in VmStore("vm1", vm.directory).snapshots().values())
    assert first is second


def test_the_current_snapshot(vm: VmStore) -> None:
    assert vm.current() is None
    take(vm, "current")  # a name like any other
    vm.set_current("current")
    assert VmStore("vm1", vm.directory).current() == "current"
    vm.set_current(None)
    assert vm.current() is None
    vm.set_current("gone")
    assert vm.current() is None
    assert set(vm.snapshots()) == {"current"}


def test_the_state_is_remembered(vm: VmStore) -> None:
    assert vm.recall_state() is None
    vm.remember_state('{"reason": "PAUSED_USER"}')
    vm.remember_state('{"reason": "PAUSED_SNAPSHOT"}')
    assert VmStore("vm1", vm.directory).recall_state() == '{"reason": "PAUSED_SNAPSHOT"}'
    assert not vm.snapshots()
    assert not vm.problems()


def test_many_snapshots_are_listed_fast(vm: VmStore) -> None:
    for number in range(190):
        directory = vm.path(f"s{number}")
        directory.mkdir()
        (directory / "snapshot.json").write_text(manifest(f"s{number}").model_dump_json(indent=1))
    first, again = list[float](), list[float]()
    for _ in range(5):  # the best counts: the machine may be busy with something else
        fresh = VmStore("vm1", vm.directory)
        for times in (first, again):
            started = time.perf_counter()
            assert len(fresh.snapshots()) == 190
            times.append(time.perf_counter() - started)
    assert min(first) < 0.1
    assert min(again) < 0.02


# --- the tree --------------------------------------------------------------------------------


def forest(**parents: str | None) -> dict[str, Manifest]:
    return {n: manifest(n, p, age=i) for i, (n, p) in enumerate(parents.items())}


def test_a_tree() -> None:
    snapshots = forest(a=None, b="a", c="b", d="a", e=None)
    assert tree.roots(snapshots) == ("a", "e")
    assert tree.children(snapshots) == {"a": ("b", "d"), "b": ("c",), "c": (), "d": (), "e": ()}
    assert tree.descendants(snapshots, "a") == ("b", "c", "d")
    assert tree.in_order(snapshots) == (("a", 0), ("b", 1), ("c", 2), ("d", 1), ("e", 0))


def test_a_missing_parent_makes_a_root() -> None:
    snapshots = forest(b="deleted", c="b")
    assert tree.parents(snapshots) == {"b": None, "c": "b"}


def test_a_circle_is_cut() -> None:
    assert tree.parents(forest(a="c", b="a", c="b")) == {"a": "c", "b": "a", "c": None}
    assert tree.parents(forest(a="a")) == {"a": None}


@given(links=st.lists(st.integers(-1, 15), max_size=15))
def test_every_snapshot_is_in_the_tree_once(links: list[int]) -> None:
    snapshots = forest(**{f"s{i}": f"s{p}" if p >= 0 else None for i, p in enumerate(links)})
    order = tree.in_order(snapshots)
    assert sorted(name for name, _ in order) == sorted(snapshots)
    depths = dict(order)
    for name, parent in tree.parents(snapshots).items():
        assert depths[name] == (0 if parent is None else depths[parent] + 1)


@pytest.mark.parametrize("older", [1, 2])
def test_what_older_versions_have_written_is_read(vm: VmStore, older: int) -> None:
    take(vm, "old")
    path = vm.path("old") / "snapshot.json"
    text = json.loads(path.read_text())
    for name in ("consistency", "left_out", "manual_disks", "deleting"):
        del text[name]
    del text["memory"]["file"]
    path.write_text(json.dumps({**text, "format": older}))
    found = vm.manifest("old")
    assert (found.format, found.consistency, found.left_out) == (older, None, ())
    assert not found.deleting


# --- damaged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"\0\0\0\0", b"../s1", b"s1\n", b"\xff", b"x" * 300, b"a/b"])
def test_a_current_snapshot_that_can_be_none_is_none(vm: VmStore, text: bytes) -> None:
    """As a power failure may leave it."""
    take(vm, "s1")
    (vm.directory / ".current").write_bytes(text)
    assert vm.current() is None


@pytest.mark.parametrize("name", [". .partial", "..partial", ".a\n.partial", ".-x.partial"])
def test_what_looks_like_a_snapshot_that_was_begun_is_left_alone(vm: VmStore, name: str) -> None:
    (vm.directory / name).mkdir()
    assert vm.partials() == ()
    remove_leftovers(vm, float("inf"))
    assert (vm.directory / name).exists()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("created_at", "0001-01-01T00:00:00+14:00", "created_at"),
        ("created_at", "9999-12-31T23:59:59-14:00", "created_at"),
        ("machine.type", "pc\0", "machine.type"),
        ("machine.process.argv", ["qemu", "x" * (128 << 10)], r"machine.process.argv.1"),
        ("memory.size_bytes", 1 << 64, "memory.size_bytes"),
        ("total_ms", 1e400, "total_ms"),
    ],
)
def test_a_manifest_that_nobody_could_use_is_refused(
    field: str, value: object, complaint: str
) -> None:
    whole = json.loads(manifest("s1").model_dump_json())
    *above, last = field.split(".")
    place = whole
    for key in above:
        place = place[key]
    place[last] = value
    with pytest.raises(ManifestInvalid, match=complaint):
        parse_manifest(json.dumps(whole), "it")


def test_only_old_drafts_of_records_are_removed(store: Store) -> None:
    vm = store.vm("vm1")
    for name in (".made.new", "mine.new", ".state.json"):
        (vm.directory / name).write_text("x")
    (vm.directory / ".folder.new").mkdir()
    vm.remove_drafts(0.0)
    assert (vm.directory / ".made.new").exists()
    vm.remove_drafts(time.time() + 1)
    left = {path.name for path in vm.directory.iterdir()}
    assert left == {"mine.new", ".state.json", ".folder.new"}
