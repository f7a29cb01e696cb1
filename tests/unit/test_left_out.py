"""Disks that a snapshot leaves out: what restoring means for them."""

from pathlib import Path
from typing import Any

import pytest

from qsnapd.model.snapshot import DiskLayer, FileIdentity, Manifest
from qsnapd.snapshot.restoring.differences import Difference
from qsnapd.snapshot.restoring.left_out import compare_left_out, is_left_out_of
from qsnapd.vm.disks import Disk
from tests.unit.situations import disk
from tests.unit.test_store import manifest as make


def layer(image: Path, **changes: Any) -> DiskLayer:  # noqa: ANN401
    parts: dict[str, Any] = {
        "target": "vdb",
        "node": "node",
        "frozen": str(image),
        "frozen_format": "raw",
        "overlay": None,
        "virtual_size_bytes": 4096,
        "chain": (file(image),),
    }
    return DiskLayer(**{**parts, **changes})


def file(path: Path) -> FileIdentity:
    status = path.stat()
    return FileIdentity(path=str(path), device=status.st_dev, inode=status.st_ino)


def taken(*left_out: DiskLayer, **changes: Any) -> Manifest:  # noqa: ANN401
    return make("s1").model_copy(update={"left_out": left_out, **changes})


def compare(
    manifest: Manifest, *others: Manifest, present: tuple[Disk, ...] = (), loads: bool = True
) -> Difference | str:
    [found] = compare_left_out(manifest, others, present, loads=loads)
    return found


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "data.raw"
    path.touch()
    return path


def forced(found: Difference | str) -> bool:
    assert isinstance(found, Difference)
    return found.can_be_forced


def test_with_memory_it_takes_force(image: Path) -> None:
    found = compare(taken(layer(image)))
    assert forced(found)
    assert "newer than the guest's memory" in str(found)


def test_without_memory_it_is_a_note(image: Path) -> None:
    found = compare(taken(layer(image)), loads=False)
    assert isinstance(found, str)
    assert f"stays as it is, on {image}" in found


@pytest.mark.parametrize("loads", [True, False])
def test_what_the_storage_keeps_takes_force(image: Path, loads: bool) -> None:
    found = compare(taken(layer(image), manual_disks=("vdb",)), loads=loads)
    assert forced(found)
    assert "put it back to that, then --force" in str(found)


def test_an_image_that_is_gone(image: Path) -> None:
    left = layer(image)
    image.unlink()
    assert not forced(compare(taken(left)))


def test_an_image_that_was_replaced(image: Path) -> None:
    other = FileIdentity(path=str(image), device=1, inode=2)
    found = compare(taken(layer(image, chain=(other,))))
    assert forced(found)
    assert "another file" in str(found)


def test_an_image_that_a_snapshot_has_frozen_since(image: Path) -> None:
    later = make("s2").model_copy(update={"disks": (layer(image),)})
    found = compare(taken(layer(image)), later, loads=False)
    assert not forced(found)
    assert "frozen image of snapshot s2" in str(found)


def test_an_image_that_lies_below_what_the_vm_writes_to(image: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay"
    overlay.touch()
    now = disk("vdb", chain=(file(overlay), file(image)), depth=2)
    found = compare(taken(layer(image)), present=(now,))
    assert not forced(found)
    assert f"lies below {overlay}" in str(found)


def test_which_disks_are_meant(image: Path) -> None:
    manifest = taken(layer(image))
    assert is_left_out_of(disk("vdb"), manifest)
    assert not is_left_out_of(disk("vda"), manifest)
    assert not is_left_out_of(disk("vdb", left_out="read-only"), manifest)


def test_an_image_of_which_nothing_was_recorded(image: Path) -> None:
    found = compare(taken(layer(image, chain=())))
    assert forced(found)
    assert "is another file than it was on then" in str(found)
