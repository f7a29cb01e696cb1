"""Renaming and copying snapshots: broken off anywhere, each listed one can be restored."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from qsnapd.errors import Effect, SnapshotExists, StoreError, UnknownSnapshot, WrongState
from qsnapd.image.files import identity
from qsnapd.model.snapshot import Manifest, MemoryImage
from qsnapd.store.layout import Store
from qsnapd.store.leases import Lease
from qsnapd.store.renaming import (
    RENAMING_NAME,
    copy_snapshot,
    finish_renaming,
    rename_snapshot,
)
from qsnapd.store.snapshots import VmStore
from tests.unit.test_store import manifest

CONTENT = b"the guest's memory"
PARENTS = {"root": None, "old": "root", "child1": "old", "child2": "old"}
DONE, REFUSED, PARTIAL, BROKEN, KILLED = 0, 1, 2, 3, 9
CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree")


def take(vm: VmStore, name: str, parent: str | None) -> Manifest:
    staging = vm.stage(name)
    image = staging / "memory.img"
    image.write_bytes(CONTENT)
    path = str(vm.path(name) / "memory.img")
    memory = MemoryImage(
        path=path,
        size_bytes=len(CONTENT),
        allocated_bytes=4096,
        file=identity(image).model_copy(update={"path": path}),
    )
    taken = manifest(name, parent).model_copy(update={"memory": memory})
    vm.commit(name, taken)
    return taken


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[VmStore]:
    with Store(tmp_path / "state") as store:
        yield filled(store.vm("vm1"))


def filled(vm: VmStore) -> VmStore:
    for name, parent in PARENTS.items():
        take(vm, name, parent)
    vm.set_current("old")
    vm.leases.hold("old", "vm1", os.getpid(), _start_time_ticks(), mapped=True)
    return vm


def _start_time_ticks() -> int:
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[19])


def tree(vm: VmStore) -> dict[str, str | None]:
    return {name: m.parent for name, m in vm.snapshots().items()}


def assert_whole(vm: VmStore) -> None:
    """Every snapshot that is listed has its memory, where its manifest says."""
    assert vm.problems() == {}
    for name, known in vm.snapshots().items():
        assert known.memory is not None
        assert known.memory.path == str(vm.path(name) / "memory.img")
        assert Path(known.memory.path).read_bytes() == CONTENT
        assert identity(Path(known.memory.path)) == known.memory.file
    assert vm.partials() == ()
    assert not (vm.directory / RENAMING_NAME).exists()
    # a draft is overwritten by the next one, an empty folder by the next that is removed
    others = {".current", ".current.new", ".leases.json", ".leases.new", ".renaming.new"}
    assert {*os.listdir(vm.directory)} - others - {".old.removed"} == set(vm.snapshots())


RENAMED = {"root": None, "new": "root", "child1": "new", "child2": "new"}
COPIED = PARENTS | {"new": "root"}


def holders(vm: VmStore) -> list[Lease]:
    return [lease for lease in vm.leases.all() if lease.holder == "vm1"]


def test_a_rename_takes_all_that_refers_to_it_along(vm: VmStore) -> None:
    before = vm.manifest("old")
    renamed = rename_snapshot(vm, "old", "new")
    assert tree(vm) == RENAMED
    assert vm.current() == "new"
    assert [lease.snapshot for lease in holders(vm)] == ["new"]
    assert vm.manifest("new") == renamed
    same = {"name", "memory"}
    assert before.model_dump(exclude=same) == renamed.model_dump(exclude=same)
    assert_whole(vm)


def test_a_copy_needs_the_same_files(vm: VmStore) -> None:
    copy_snapshot(vm, "old", "new")
    assert tree(vm) == COPIED
    assert vm.current() == "old"
    files = [vm.path(name) / "memory.img" for name in ("old", "new")]
    assert files[0].samefile(files[1])
    assert_whole(vm)
    vm.remove("old")
    assert (vm.path("new") / "memory.img").read_bytes() == CONTENT


def test_memory_that_lies_elsewhere_stays_there(vm: VmStore, tmp_path: Path) -> None:
    elsewhere = tmp_path / "memory"
    elsewhere.write_bytes(CONTENT)
    vm.stage("s1")
    memory = MemoryImage(path=str(elsewhere), size_bytes=len(CONTENT), allocated_bytes=4096)
    taken = manifest("s1").model_copy(update={"memory": memory})
    vm.commit("s1", taken)
    rename_snapshot(vm, "s1", "s2")
    assert vm.manifest("s2").memory == memory
    assert os.listdir(vm.path("s2")) == ["snapshot.json"]


def test_refusals_change_nothing(vm: VmStore) -> None:
    for call in (rename_snapshot, copy_snapshot):
        with pytest.raises(SnapshotExists):
            call(vm, "old", "child1")
        with pytest.raises(UnknownSnapshot):
            call(vm, "none", "new")
        with pytest.raises(ValueError, match="invalid name"):
            call(vm, "old", "../new")
    vm.replace(vm.manifest("child1").model_copy(update={"deleting": True}))
    with pytest.raises(WrongState, match="is being deleted"):
        rename_snapshot(vm, "child1", "new")
    (vm.path("old") / "notes.txt").write_text("somebody's")
    with pytest.raises(WrongState, match=r"\(notes.txt\): move that away first"):
        rename_snapshot(vm, "old", "new")
    assert tree(vm) == PARENTS
    assert vm.partials() == ()
    assert finish_renaming(vm) is None


def test_what_was_begun_by_an_import_is_not_taken_for_one(vm: VmStore) -> None:
    (vm.path("old") / ".import.json").write_text("{}")
    copy_snapshot(vm, "old", "new")
    assert sorted(os.listdir(vm.path("new"))) == ["memory.img", "snapshot.json"]


def test_a_record_that_nobody_understands_stands(vm: VmStore) -> None:
    (vm.directory / RENAMING_NAME).write_text('{"old": "old", "new": "new", "more": 1}')
    with pytest.raises(StoreError, match="written by another version"):
        finish_renaming(vm)


def in_child(work: Callable[[], object], step: int, *, kills: bool) -> int:
    """Do *work* in a process whose *step*-th change of a file fails, or is its end."""
    if (pid := os.fork()) == 0:
        steps = count(1)

        def strike(event: str, arguments: tuple[object, ...]) -> None:
            if event not in CHANGES or (event == "open" and not _creates(arguments)):
                return
            if next(steps) == step:
                if kills:
                    os._exit(KILLED)
                raise OSError(errno.EIO, "planted")

        sys.addaudithook(strike)
        outcome = BROKEN
        try:
            work()
            outcome = DONE
        except StoreError as exc:
            outcome = PARTIAL if exc.effect is Effect.PARTIAL else REFUSED
        finally:
            os._exit(outcome)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _creates(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_CREAT | os.O_TRUNC))


@pytest.mark.parametrize("kills", [True, False], ids=["killed", "failing"])
@pytest.mark.parametrize(
    ("change", "after"), [(rename_snapshot, RENAMED), (copy_snapshot, COPIED)]
)
def test_broken_off_anywhere(
    change: Callable[[VmStore, str, str], Manifest],
    after: dict[str, str | None],
    kills: bool,
    tmp_path: Path,
) -> None:
    outcomes = []
    for step in count(1):
        with Store(tmp_path / str(step)) as store:
            vm = filled(store.vm("vm1"))
            outcome = in_child(partial(change, vm, "old", "new"), step, kills=kills)
            outcomes.append(outcome)
            between = tree(vm)
            assert set(between) >= set(PARENTS) - {"old"}
            assert {"old", "new"} & set(between)
            if outcome == REFUSED:
                assert between == PARENTS
            finish_renaming(vm)
            # once more: whoever finishes it may be killed, too
            assert finish_renaming(vm) is None
            assert tree(vm) == (PARENTS if tree(vm) == PARENTS else after)
            assert outcome in (KILLED, REFUSED) or tree(vm) == after
            assert vm.current() == ("new" if "old" not in tree(vm) else "old")
            assert [lease.snapshot for lease in holders(vm)] == [vm.current()]
            assert_whole(vm)
        if outcome == DONE:
            break
    assert len(outcomes) > 8
    expected = {KILLED, DONE} if kills else {REFUSED, DONE}
    assert set(outcomes) - {PARTIAL} == expected


@pytest.mark.parametrize("call", [rename_snapshot, copy_snapshot])
def test_the_unfinished_import_of_somebody_else_stays(
    vm: VmStore, call: Callable[[VmStore, str, str], Manifest]
) -> None:
    begun = vm.stage("new") / "memory.img"
    begun.write_bytes(b"half of it")
    with pytest.raises(StoreError, match="is in the way"):
        call(vm, "old", "new")
    assert begun.read_bytes() == b"half of it"
    assert finish_renaming(vm) is None
    assert tree(vm) == PARENTS


@pytest.mark.parametrize("taken_anew", ["old", "new"])
def test_a_name_that_was_taken_anew_is_another_snapshots(vm: VmStore, taken_anew: str) -> None:
    take(vm, "new", None)
    other = vm.manifest(taken_anew)
    vm.replace(other.model_copy(update={"created_at": other.created_at + timedelta(seconds=1)}))
    record = '{"old": "old", "new": "new", "keeps_old": false}'
    (vm.directory / RENAMING_NAME).write_text(record)
    assert finish_renaming(vm) is None
    assert tree(vm) == PARENTS | {"new": None}
    assert not (vm.directory / RENAMING_NAME).exists()
