"""Snapshots whose records were lost: taken in again where their files are there, and only then."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsnapd.errors import (
    ImageInvalid,
    ManifestTooNew,
    QsnapError,
    SnapshotExists,
    StoreError,
    TargetRefused,
    WrongState,
)
from qsnapd.image import sparse
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.moving import take_in as taking_in
from qsnapd.snapshot.moving.adopt import Adopted
from qsnapd.snapshot.moving.scan import current_in, look_through, open_memory
from qsnapd.snapshot.moving.take_in import bring_children_back, take_in
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore
from tests.unit.crafted_images import PAGE
from tests.unit.fsck_world import MEMORY, Change, World, make_world, qemu_img
from tests.unit.test_fsck import LEFT, copied, made_folder, made_link, manifest_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = make_world(tmp_path)
    with world.damages:
        yield world


@pytest.fixture
def new(tmp_path: Path) -> VmStore:
    """A state directory that knows nothing of it."""
    return Store(tmp_path / "new").vm("vm1")


def nothing() -> None:
    pass


def saved(world: World, name: str, **changes: Any) -> Manifest:  # noqa: ANN401
    """What snapshot-export --metadata would have written, changed by hand."""
    whole = json.loads(manifest_of(world, name).read_text())
    return parse_manifest(json.dumps({**whole, **changes}), "it")


def from_folder(store: VmStore, root: Path) -> dict[str, Adopted | QsnapError]:
    """Do what a scan does; returns what became of each name, or path."""
    done: dict[str, Adopted | QsnapError] = {}
    for found in look_through(root):
        manifest = found.manifest
        if manifest is None:
            done[str(found.path)] = StoreError(str(found.what))
            continue
        memory_fd = open_memory(found)
        try:
            done[manifest.name] = take_in(store, manifest, memory_fd=memory_fd, check=nothing)
        except QsnapError as exc:
            done.setdefault(manifest.name, exc)
        finally:
            if memory_fd is not None:
                os.close(memory_fd)
    return done


def content(store: VmStore) -> set[str]:
    return {str(path.relative_to(store.directory)) for path in store.directory.rglob("*")}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_lost_state_directory_comes_back(world: World, new: VmStore, depth: int) -> None:
    """From what it was moved to: the folder of one VM, of all, or somewhere above."""
    old = world.images.parent / "aside" / "old"
    old.parent.mkdir()
    shutil.move(world.store.directory.parent, old)
    root = (old / "vm1", old, old.parent)[depth]
    done = from_folder(new, root)
    assert list(done) == ["s1", "s2", "left"]
    assert {name: m.parent for name, m in new.snapshots().items()} == {
        "left": "s1",
        "s1": None,
        "s2": "s1",
    }
    assert current_in(old / "vm1") == "s2"
    for name, manifest in new.snapshots().items():
        memory = new.path(name) / "memory.img"
        assert manifest.memory is not None
        assert (manifest.memory.path, memory.read_bytes()) == (str(memory), MEMORY)
        assert memory.stat().st_ino == (old / "vm1" / name / "memory.img").stat().st_ino
        assert manifest.memory.file is not None
        assert manifest.memory.file.inode == memory.stat().st_ino
        taken = done[name]
        assert isinstance(taken, Adopted)
        assert taken.notes == ()
    again = World(new, world.images)
    new.set_current("s2")
    again.live = world.live
    assert again.findings() == ()


def test_memory_of_another_file_system_or_owner_is_copied(
    world: World, new: VmStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    with monkeypatch.context() as patched:
        patched.setattr(taking_in, "_link", fail)
        from_folder(new, world.store.directory)
    copy = new.path("s1") / "memory.img"
    assert copy.read_bytes() == MEMORY
    assert copy.stat().st_ino != world.memory("s1").stat().st_ino
    assert copy.stat().st_mode & 0o777 == 0o600


def test_files_with_new_numbers_are_taken_for_copies(world: World, new: VmStore) -> None:
    """As after restoring a backup; the numbers they have now are recorded."""
    for name in ("base.qcow2", "data.raw", LEFT):
        copied(world.image(name))
    taken = take_in(new, saved(world, "left", memory=None, strategy=None), check=nothing)
    assert [note.split(" ")[0] for note in taken.notes[:2]] == [
        str(world.image(LEFT)),
        str(world.image("base.qcow2")),
    ]
    assert "becomes a root" in taken.notes[2]
    [disk] = new.manifest("left").disks
    assert [file.inode for file in disk.chain] == [
        world.image(name).stat().st_ino for name in (LEFT, "base.qcow2")
    ]


def shrunk(world: World) -> None:
    world.image("base.qcow2").unlink()
    qemu_img("create", "-f", "qcow2", world.image("base.qcow2"), 512)


def other_memory(world: World) -> None:
    """The same size and structure, and another content."""
    data = bytearray(MEMORY)
    data[2 * PAGE] ^= 1
    aside = world.memory("s1").with_name("aside")
    aside.write_bytes(data)
    aside.rename(world.memory("s1"))


REFUSED: dict[str, tuple[Change, str]] = {
    "image missing": (lambda w: w.image("base.qcow2").unlink(), "base.qcow2 is missing"),
    "image of another size": (shrunk, "is a disk of 512 bytes now"),
    "no image": (lambda w: w.image("base.qcow2").write_bytes(b"no"), "is no qcow2 image"),
    "raw of another size": (lambda w: os.truncate(w.image("data.raw"), 512), "disk of 512 bytes"),
    "other image below": (
        lambda w: qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", w.image("base.after-s1.qcow2")),
        "is no longer an overlay over",
    ),
    "link": (
        lambda w: made_link(w.image("base.qcow2")),
        "base.qcow2 cannot be looked at",
    ),
    "folder": (
        lambda w: made_folder(w.image("base.qcow2")),
        "base.qcow2 cannot be looked at",
    ),
    "short memory": (lambda w: os.truncate(w.memory("s1"), 9), "has 9 bytes"),
    "other memory": (other_memory, "other content"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_whole_is_refused(world: World, new: VmStore, what: str) -> None:
    damage, words = REFUSED[what]
    damage(world)
    name = "s2" if what == "other image below" else "s1"
    refused = from_folder(new, world.store.directory)[name]
    assert isinstance(refused, QsnapError)
    with pytest.raises(type(refused), match=words):
        raise refused
    assert name not in new.snapshots()
    assert not [entry for entry in content(new) if name in entry]


HOSTILE: dict[str, tuple[dict[str, Any], type[QsnapError], str]] = {
    "newer": ({"format": 99}, ManifestTooNew, "format 99"),
    "being deleted": ({"deleting": True}, WrongState, "was being deleted"),
    "no images": ({"disks": [{"chain": []}]}, ImageInvalid, "which images it has"),
    "frozen image that is not in its chain": (
        {"disks": [{"frozen": "/etc/shadow"}]},
        ImageInvalid,
        "which images it has",
    ),
    "others' memory as a disk": (
        {"disks": [{"frozen": "STORE/web/s/memory.img", "chain": ["STORE/web/s/memory.img"]}]},
        ImageInvalid,
        "is a file of qsnapd's",
    ),
    "path that goes up": (
        {"disks": [{"frozen": "/vms/../etc/x", "chain": ["/vms/../etc/x"]}]},
        ImageInvalid,
        "no plain path",
    ),
    "others' memory": ({"memory": "STORE/web/s/memory.img"}, ImageInvalid, "another snapshot"),
    "memory nowhere": ({"memory": "/nowhere/memory.img"}, ImageInvalid, "is missing"),
    "device as memory": ({"memory": "/dev/zero"}, ImageInvalid, "it is no file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_manifest_that_somebody_else_wrote(world: World, new: VmStore, what: str) -> None:
    changes, error, words = HOSTILE[what]
    whole = json.loads(manifest_of(world, "left").read_text())
    text = json.dumps(changes).replace("STORE", str(new.directory.parent))
    changes = json.loads(text)
    for disk in changes.pop("disks", ()):
        if disk.get("chain"):
            disk["chain"] = [{"path": path, "device": 1, "inode": 2} for path in disk["chain"]]
        whole["disks"][0].update(disk)
    if "memory" in changes:
        whole["memory"]["path"] = changes.pop("memory")
    with pytest.raises(error, match=words):
        take_in(new, parse_manifest(json.dumps({**whole, **changes}), "it"), check=nothing)
    assert content(new) == set()


def test_another_vms_snapshot(world: World, new: VmStore) -> None:
    """While that VM is one of this daemon's, its images are its own; else this is its new name."""
    manifest = saved(world, "left", vm="web", memory=None, strategy=None)
    other = new.directory.parent / "web"
    other.mkdir()
    with pytest.raises(WrongState, match="is VM web's"):
        take_in(new, manifest, check=nothing)
    other.rmdir()
    assert take_in(new, manifest, name="renamed", check=nothing).manifest.vm == "vm1"
    assert new.manifest("renamed").disks[0].frozen == str(world.image(LEFT))


def test_names_that_are_taken(world: World) -> None:
    with pytest.raises(SnapshotExists, match="already has a snapshot 's1'"):
        take_in(world.store, saved(world, "s1"), check=nothing)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_record_that_was_lost_is_put_back(world: World, damage: str) -> None:
    """What snapshot-fsck tells people to do."""
    manifest, path = saved(world, "s1"), manifest_of(world, "s1")
    path.write_text("{") if damage == "damaged" else path.unlink()
    before = {f.code for f in world.findings()}
    assert before & {"manifest-unreadable", "manifest-missing"}
    take_in(world.store, manifest, check=nothing)
    back = world.store.manifest("s1")
    assert (back.disks, back.parent, back.machine) == (
        manifest.disks, manifest.parent, manifest.machine
    )
    assert world.store.manifest("s2").parent == "s1"
    assert {f.code for f in world.findings()} <= {"stranger"}
    aside = world.store.directory / ".s1.damaged"
    assert aside.exists() == (damage == "damaged")


def test_newer_record_is_not_replaced(world: World) -> None:
    manifest = saved(world, "s1")
    world.edit("s1", format=99)
    with pytest.raises(ManifestTooNew):
        take_in(world.store, manifest, check=nothing)


def test_forgotten_snapshot_comes_back(world: World) -> None:
    store = world.store
    kept = store.forget("left", "0123abcd")
    assert "left" not in store.snapshots()
    assert world.findings() == ()  # its images are not what nobody needs
    done = from_folder(store, store.directory)
    assert isinstance(done["left"], Adopted)
    (kept / "notes.txt").write_text("somebody's")
    store.drop_forgotten(kept)
    assert [entry.name for entry in kept.iterdir()] == ["notes.txt"]
    (kept / "notes.txt").unlink()
    store.drop_forgotten(kept)
    assert not kept.exists()
    assert world.findings() == ()
    assert world.memory("left").read_bytes() == MEMORY


def test_children_come_from_it_again(world: World) -> None:
    """Which a deletion of its record had given to its parent."""
    store = world.store
    manifest = store.manifest("s1")
    store.forget("s1", "0123abcd")
    for name in ("s2", "left"):
        store.replace(store.manifest(name).model_copy(update={"parent": None}))
    with open(store.directory / ".forgotten/s1-0123abcd/memory.img", "rb") as memory:
        take_in(store, manifest, memory_fd=memory.fileno(), check=nothing)
    bring_children_back(store, {"s1"})
    bring_children_back(store, {"s1"})
    parents = {name: m.parent for name, m in store.snapshots().items()}
    assert parents == {"s1": None, "s2": "s1", "left": "s1"}
    bring_children_back(store, {"left", "gone"})
    assert store.manifest("s2").parent == "s1"


def test_cancelled_in_the_middle(world: World, new: VmStore) -> None:
    """At every look whether it is: nothing is left, or the snapshot is there."""
    manifest = saved(world, "left")
    for limit in range(100):
        looks = iter(range(limit))

        def check(looks: Iterator[int] = looks) -> None:
            if next(looks, None) is None:
                raise KeyboardInterrupt

        with open(world.memory("left"), "rb") as memory:
            try:
                take_in(new, manifest, memory_fd=memory.fileno(), check=check)
            except KeyboardInterrupt:
                assert content(new) == set()
                continue
        assert set(new.snapshots()) == {"left"}
        assert limit > 0
        return
    pytest.fail("it never ends")


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TargetRefused, match="No such file"):
        look_through(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(TargetRefused, match="Not a directory"):
        look_through(tmp_path / "file")


def test_what_else_may_lie_there(world: World, new: VmStore, tmp_path: Path) -> None:
    """Links lead nowhere, what is no snapshot is passed over, what is damaged is told of."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(world.store.directory)
    (root / "snapshot.json").symlink_to(manifest_of(world, "s1"))
    (root / "notes.json").write_text("[1, 2")
    os.mkfifo(root / "pipe.json")
    (root / "folder.json").mkdir()
    (root / "damaged").mkdir()
    (root / "damaged" / "snapshot.json").write_text("{")
    (root / ".hidden").mkdir()
    shutil.copy(manifest_of(world, "s1"), root / ".hidden" / "snapshot.json")
    shutil.copy(manifest_of(world, "left"), root / "left.json")
    found = look_through(root)
    names = {str(f.path.relative_to(root)) for f in found}
    assert names == {"damaged/snapshot.json", "left.json", "snapshot.json"}
    told = [f for f in found if f.manifest is None]
    assert {f.path.name for f in told} == {"snapshot.json"}
    done = from_folder(new, root)
    assert isinstance(done["left"], Adopted | ImageInvalid)


def test_of_several_of_one_name_the_newest(world: World, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, year in enumerate(("2020", "2025", "2021")):
        (root / str(number)).mkdir(parents=True)
        text = json.dumps({**json.loads(manifest_of(world, "s1").read_text())})
        text = text.replace("2026-", f"{year}-")
        (root / str(number) / "snapshot.json").write_text(text)
    years = [f.manifest.created_at.year for f in look_through(root) if f.manifest]
    assert years == [2025, 2021, 2020]


def test_parents_come_first_however_deep(world: World, tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(300)]
    whole = json.loads(manifest_of(world, "s1").read_text())
    for number, name in enumerate(names):
        parent = names[number - 1] if number else None
        folder = tmp_path / "deep" / f"x{(number * 7) % 300:03}"
        folder.mkdir(parents=True)
        text = json.dumps({**whole, "name": name, "parent": parent})
        (folder / "snapshot.json").write_text(text)
    assert [f.manifest.name for f in look_through(tmp_path / "deep") if f.manifest] == names


def test_a_copy_keeps_its_holes(world: World, tmp_path: Path) -> None:
    """A memory image is mostly holes."""
    assert sparse.CHUNK_BYTES
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(64 << 20)
    with big.open("rb") as file:
        os.chmod(big, 0o666)
        taking_in._bring(file.fileno(), tmp_path / "copy", 64 << 20, nothing)
    assert (tmp_path / "copy").stat().st_blocks < 100
