"""What snapshots may occupy: said before anything is touched, and while they grow."""

from pathlib import Path
from typing import Any

import pytest

from qsnapd.errors import QuotaUsedUp, StoreFull
from qsnapd.image.files import free_bytes, identity
from qsnapd.model.plan import CheckpointPlan
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, MemoryImage, Strategy
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.snapshot.taking.room import DEVICE_STATE_BYTES, Room, image_bytes, occupied_bytes
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore
from tests.unit.situations import disk, situation
from tests.unit.test_store import manifest

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> VmStore:
    return Store(tmp_path / "state").vm("vm1")


def plan_of(store: VmStore, folder: Path, **request: Any) -> CheckpointPlan:  # noqa: ANN401
    now = situation(
        directory=store.directory, disks=(disk(path=str(folder / "root.qcow2")),), ram_bytes=GIB
    )
    return plan_checkpoint(CreateRequest(name="s", **request), now)


def take(store: VmStore, name: str, size_bytes: int) -> Path:
    """Have a snapshot whose memory is of that size."""
    memory = store.stage(name) / "memory.img"
    memory.write_bytes(b"x" * size_bytes)
    path = store.path(name) / "memory.img"
    image = MemoryImage(path=str(path), size_bytes=size_bytes, allocated_bytes=size_bytes)
    store.commit(name, manifest(name).model_copy(update={"memory": image}))
    return path


@pytest.mark.parametrize(
    ("request_", "expected_bytes"),
    [
        ({}, GIB + DEVICE_STATE_BYTES),
        ({"image_format": ImageFormat.STREAM}, GIB + GIB // 256 + DEVICE_STATE_BYTES),
        (
            {"strategy": Strategy.PRECOPY, "image_format": ImageFormat.STREAM},
            2 * GIB + DEVICE_STATE_BYTES,
        ),
        ({"disk_only": True}, 0),
    ],
)
def test_how_large_an_image_may_become(
    request_: dict[str, Any], expected_bytes: int, store: VmStore, tmp_path: Path
) -> None:
    assert image_bytes(plan_of(store, tmp_path, **request_)) == expected_bytes


def test_where_it_is_written_to(store: VmStore, tmp_path: Path) -> None:
    room = Room(store)
    assert room.places(plan_of(store, tmp_path)) == [store.directory, tmp_path]
    elsewhere = plan_of(store, tmp_path, memory_file="/mnt/memory")
    assert room.places(elsewhere) == [Path("/mnt"), tmp_path]
    assert room.places(plan_of(store, tmp_path, disk_only=True)) == [tmp_path]


def test_there_is_room(store: VmStore, tmp_path: Path) -> None:
    Room(store, low_water_bytes=0).require(plan_of(store, tmp_path, disk_only=True))


def test_what_has_to_stay_free(store: VmStore, tmp_path: Path) -> None:
    all_bytes = free_bytes(tmp_path) + GIB
    room = Room(store, low_water_bytes=all_bytes)
    with pytest.raises(StoreFull, match="bytes free, the snapshot needs"):
        room.require(plan_of(store, tmp_path, disk_only=True))
    with pytest.raises(StoreFull):
        room.require_low_water([tmp_path])
    Room(store, low_water_bytes=0).require_low_water([tmp_path])


def test_own_quota(store: VmStore, tmp_path: Path) -> None:
    take(store, "a", 3 * MIB)
    needed_bytes = GIB + DEVICE_STATE_BYTES
    plan = plan_of(store, tmp_path)
    Room(store, low_water_bytes=0, quota_bytes=needed_bytes + 4 * MIB).require(plan)
    with pytest.raises(QuotaUsedUp, match="the snapshots of VM vm1 occupy") as refused:
        Room(store, low_water_bytes=0, quota_bytes=needed_bytes + 2 * MIB).require(plan)
    assert refused.value.used_bytes == 3 * MIB
    assert refused.value.needed_bytes == needed_bytes


def test_quota_of_all(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as whole:
        store, other = whole.vm("vm1"), whole.vm("vm2")
        (tmp_path / "image").write_bytes(b"x" * (2 * MIB))
        other.made.add([identity(tmp_path / "image")])
        room = Room(
            *(store, lambda: [other]),
            low_water_bytes=0,
            total_quota_bytes=GIB + DEVICE_STATE_BYTES + MIB,
        )
        with pytest.raises(QuotaUsedUp, match="the snapshots of all VMs occupy"):
            room.require(plan_of(store, tmp_path))
        (tmp_path / "image").unlink()
        room.require(plan_of(store, tmp_path))


def test_a_file_with_two_names_counts_once(store: VmStore, tmp_path: Path) -> None:
    path = take(store, "a", MIB)
    second = tmp_path / "second"
    second.hardlink_to(path)
    store.made.add([identity(second)])
    assert occupied_bytes([store]) == MIB
