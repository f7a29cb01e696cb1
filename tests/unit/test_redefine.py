"""Defining snapshots by manifests that somebody brings: what is believed, and what is not."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from qsnapd.errors import BadRequest, ImageInvalid, QsnapError, WrongState
from qsnapd.image.files import identity
from qsnapd.image.savevm import never_cancelled
from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest
from qsnapd.snapshot.moving.redefine import Present, redefine
from qsnapd.store.layout import Store
from qsnapd.store.renaming import copy_snapshot, rename_snapshot
from qsnapd.store.snapshots import VmStore
from tests.parts import qemu_versions
from tests.unit import test_store

QEMU_IMG = qemu_versions()[-1].img
UUID = "6b3f1c1e-7b61-4a5e-9d5b-0d2a0f5f2a11"
OTHER = "00000000-7b61-4a5e-9d5b-0d2a0f5f2a11"
NOBODY = Present()


def create(path: Path, backing: Path | None = None) -> Path:
    over = ["-F", "qcow2", "-b", str(backing)] if backing else []
    size = [] if backing else ["1M"]
    words = [QEMU_IMG, "create", "-q", "-f", "qcow2", *over, path, *size]
    subprocess.run([str(word) for word in words], check=True)
    return path


class Scene:
    """A VM of which there are two disk-only snapshots, with images as `create` leaves them."""

    def __init__(self, folder: Path, store: VmStore) -> None:
        self.store = store
        self.images = [create(folder / "a")]
        for name in "bc":
            self.images.append(create(folder / name, self.images[-1]))
        for number, name in enumerate(("s1", "s2")):
            self.take(name, number, "s1" if number else None)

    def take(self, name: str, number: int, parent: str | None) -> Manifest:
        frozen, overlay = self.images[number : number + 2]
        chain = tuple(identity(image) for image in reversed(self.images[: number + 1]))
        plain = test_store.manifest(name, parent, age=number)
        disk = DiskLayer(
            target="vda",
            node="disk0",
            frozen=str(frozen),
            frozen_format="qcow2",
            overlay=str(overlay),
            virtual_size_bytes=1 << 20,
            chain=chain,
        )
        machine = plain.machine.model_copy(update={"uuid": UUID})
        update: dict[str, Any] = {"disks": (disk,), "machine": machine, "memory": None}
        taken = plain.model_copy(update=update | {"strategy": None, "image_format": None})
        self.store.stage(name)
        self.store.commit(name, taken)
        return taken

    def redefine(self, manifest: Manifest, present: Present = NOBODY) -> Manifest:
        return redefine(self.store, manifest, present, check=never_cancelled).manifest


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Store(tmp_path / "state") as store:
        yield Scene(tmp_path, store.vm("vm1"))


def test_what_can_be_edited(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    edited = before.model_copy(
        update={
            "description": "words",
            "labels": {"a": "b"},
            "parent": None,
            "created_at": before.created_at + timedelta(hours=1),
        }
    )
    scene.redefine(edited)
    assert scene.store.manifest("s2") == edited


def test_a_record_that_was_lost_comes_back(scene: Scene) -> None:
    before = scene.store.snapshots()
    for name in ("s2", "s1"):
        scene.store.remove(name)
    assert scene.redefine(before["s1"]).name == "s1"
    scene.redefine(before["s2"], Present(uuid=UUID))
    assert scene.store.snapshots() == before


def test_one_that_was_only_forgotten_comes_back_and_leaves_nothing(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    kept = scene.store.forget("s2", "0" * 8)
    scene.redefine(before)
    assert scene.store.manifest("s2") == before
    assert not kept.exists()


def test_a_second_name_for_one_that_is_there(scene: Scene) -> None:
    scene.redefine(scene.store.manifest("s2").model_copy(update={"name": "copy"}))
    assert sorted(scene.store.snapshots()) == ["copy", "s1", "s2"]
    assert scene.store.manifest("copy").disks == scene.store.manifest("s2").disks


def test_an_old_name_is_free_after_a_rename(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    rename_snapshot(scene.store, "s2", "s9")
    scene.redefine(before)
    assert sorted(scene.store.snapshots()) == ["s1", "s2", "s9"]


Change = Callable[[Manifest], dict[str, object]]


def machine(uuid: str | None) -> Change:
    return lambda m: {"machine": m.machine.model_copy(update={"uuid": uuid})}


REFUSED: list[tuple[str, Change, type[QsnapError], str]] = [
    ("s2", lambda m: {"parent": "s2"}, BadRequest, "cannot set snapshot s2 as its own parent"),
    ("s2", lambda m: {"parent": "s7"}, BadRequest, "parent s7 for snapshot s2 not found"),
    ("s1", lambda m: {"parent": "s2"}, BadRequest, "parent s2 would create cycle to s1"),
    ("s2", lambda m: {"vm": "vm2"}, BadRequest, "snapshot s2 is VM vm2's, not vm1's"),
    ("s2", machine(OTHER), BadRequest, f"definition for snapshot s2 must use uuid {UUID}"),
    (
        "s2",
        lambda m: {"strategy": "stopped"},
        BadRequest,
        "cannot change between disk only and full system in snapshot s2",
    ),
    ("s2", lambda m: {"paused_ms": 5.0}, BadRequest, "its paused_ms cannot be changed"),
    (
        "s2",
        lambda m: {"disks": (), "state": "paused"},
        BadRequest,
        "its state, disks cannot be changed",
    ),
    ("new", machine(OTHER), BadRequest, f"definition for snapshot new must use uuid {UUID}"),
    ("new", lambda m: {"parent": "new"}, BadRequest, "as its own parent"),
    ("new", lambda m: {"parent": "s7"}, BadRequest, "not found"),
    ("new", lambda m: {"deleting": True}, WrongState, "was being deleted"),
    (
        "new",
        lambda m: {"created_at": m.created_at + timedelta(seconds=1)},
        ImageInvalid,
        "holds disk vda as it was at snapshot s2",
    ),
]


@pytest.mark.parametrize(("name", "change", "kind", "error"), REFUSED)
def test_refusals(
    scene: Scene, name: str, change: Change, kind: type[QsnapError], error: str
) -> None:
    before = scene.store.snapshots()
    plain = before.get(name) or before["s2"].model_copy(update={"name": name})
    with pytest.raises(kind) as refused:
        scene.redefine(plain.model_copy(update=change(plain)))
    assert error in str(refused.value)
    assert scene.store.snapshots() == before
    assert scene.store.partials() == ()


def test_one_that_is_being_deleted_is_left_alone(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    scene.store.replace(before.model_copy(update={"deleting": True}))
    with pytest.raises(WrongState, match="is being deleted"):
        scene.redefine(before)


def test_another_vm_has_taken_the_name(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    for name in ("s1", "s2"):
        scene.store.remove(name)
    with pytest.raises(BadRequest, match=f"must use uuid {OTHER}"):
        scene.redefine(before.model_copy(update={"parent": None}), Present(uuid=OTHER))


def test_an_image_that_is_written_to_now(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    scene.store.remove("s2")
    for image in scene.images[:2]:
        status = image.stat()
        present = Present(uuid=UUID, active={(status.st_dev, status.st_ino): "vda"})
        with pytest.raises(ImageInvalid, match="disk vda of the running VM writes to"):
            scene.redefine(before, present)


def test_an_image_that_got_the_data_of_another(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    scene.store.remove("s2")
    gone, now = identity(scene.images[2]), identity(scene.images[1])
    scene.store.made.moved(gone, now)
    with pytest.raises(ImageInvalid, match="was merged into it since"):
        scene.redefine(before)
    # what had been merged before the snapshot was taken is in it rightly
    known = FileIdentity(path=gone.path, device=0, inode=0)
    disk = before.disks[0].model_copy(update={"known_as": (known,)})
    scene.redefine(before.model_copy(update={"disks": (disk,)}))


@pytest.mark.parametrize("damage", ["missing", "another", "unlinked"])
def test_images_that_are_not_what_they_were(scene: Scene, damage: str) -> None:
    before = scene.store.manifest("s2")
    scene.store.remove("s2")
    image = scene.images[1]
    match damage:
        case "missing":
            image.unlink()
        case "another":
            image.unlink()
            image.write_bytes(b"no image at all" * 100)
        case "unlinked":
            create(image.with_name("else"))
            shutil.copy(image.with_name("else"), image)
    with pytest.raises(ImageInvalid):
        scene.redefine(before)
    assert sorted(scene.store.snapshots()) == ["s1"]
    assert scene.store.partials() == ()


def test_a_cancelled_one_leaves_nothing(scene: Scene) -> None:
    before = scene.store.manifest("s2")
    scene.store.remove("s2")

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        redefine(scene.store, before, NOBODY, check=check)
    assert sorted(scene.store.snapshots()) == ["s1"]
    assert scene.store.partials() == ()
    copy_snapshot(scene.store, "s1", "s2")  # and its name is free


def test_the_folders_of_other_snapshots_are_looked_into(scene: Scene) -> None:
    above = scene.store.directory / ".forgotten"
    above.mkdir()
    (above / "damaged-1").mkdir()
    (above / "damaged-1" / "snapshot.json").write_text("{")
    os.mkfifo(above / "pipe")
    before = scene.store.manifest("s2")
    scene.store.remove("s2")
    assert scene.redefine(before) == before
