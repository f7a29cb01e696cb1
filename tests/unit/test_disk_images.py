"""Whose images an export reads, and what it calls them."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from qsnapd.errors import ImageInvalid, WrongState
from qsnapd.image.files import identity
from qsnapd.model.snapshot import DiskLayer
from qsnapd.snapshot.moving import disk_images
from qsnapd.snapshot.moving.disk_images import Layer, open_chain
from qsnapd.snapshot.moving.gathering import _require_fitting, _stems
from tests.unit.test_store import manifest


def disk(path: Path, target: str = "vda", size_bytes: int = 0) -> DiskLayer:
    file = identity(path)
    return DiskLayer(
        target=target,
        node="n",
        frozen=file.path,
        frozen_format="raw",
        overlay=None,
        virtual_size_bytes=size_bytes,
        chain=(file,),
    )


def test_link_in_the_place_of_an_image(tmp_path: Path) -> None:
    """Even if the file it leads to has the number that was recorded."""
    image = tmp_path / "image"
    image.write_bytes(b"x" * 512)
    recorded = disk(image)
    with ExitStack() as descriptors:
        [layer] = open_chain(recorded, descriptors)
        assert (layer.path, layer.format) == (str(image), "raw")
    image.rename(tmp_path / "aside")
    image.symlink_to("aside")
    with ExitStack() as descriptors, pytest.raises(ImageInvalid, match="cannot be opened"):
        open_chain(recorded, descriptors)


def status(uid: int, mode: int) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, uid, uid, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (((0, 0o600), (0, 0o600)), None),
        (((7, 0o600), (7, 0o600)), 7),
        (((7, 0o600), (0, 0o644)), 7),
        (((0, 0o644), (7, 0o600)), 7),
        (((7, 0o644), (8, 0o600)), 8),
    ],
)
def test_images_are_read_as_who_may(
    images: tuple[tuple[int, int], ...], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert owner(images, monkeypatch) == expected


def test_root_does_not_read_what_others_can_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for images in (((7, 0o600), (0, 0o600)), ((7, 0o600), (8, 0o600))):
        with pytest.raises(WrongState, match="belongs to user 7, who may not read all"):
            owner(images, monkeypatch)


def owner(images: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """As whom root reads images of such owners and modes."""
    layers = [Layer(f"/{fd}", fd, "qcow2", None) for fd in range(len(images))]
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: 0)
        patched.setattr(os, "fstat", lambda fd: status(*images[fd]))
        found = disk_images._owner(layers)
    return None if found is None else found.st_uid


def test_names_of_files(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    targets = ("vda", "device[1]", "Efi_vars", "3", "vda.base1")
    disks = tuple(disk(image, target) for target in targets)
    stems = _stems(manifest("s").model_copy(update={"disks": disks}))
    assert stems == ["disk-vda", "disk-1", "disk-2", "disk-3", "disk-4"]


def test_disk_that_is_too_large(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    with image.open("rb") as file:
        layers = (Layer(str(image), file.fileno(), "raw", None),)
        _require_fitting(disk(image, size_bytes=16 << 40), layers)
        with pytest.raises(WrongState, match="larger than 16 TiB"):
            _require_fitting(disk(image, size_bytes=(16 << 40) + 1), layers)
