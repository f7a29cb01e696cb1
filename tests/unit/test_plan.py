"""What is planned for a request, and what is refused, without any VM."""

import re
from typing import Any

import pytest

from qsnapd.errors import (
    BadRequest,
    Blocked,
    CapabilityMissing,
    QsnapError,
    SnapshotExists,
    WrongState,
)
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import FileIdentity, ImageFormat, Strategy
from qsnapd.model.state import Condition
from qsnapd.qmp.block import BitmapInfo, JobInfo
from qsnapd.qmp.migration import MigrationInfo
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.snapshot.taking.plan_disks import CHAIN_LIMIT
from qsnapd.snapshot.taking.saves import UNLIMITED_BYTES_PER_S
from qsnapd.snapshot.taking.saving_plan import plan_saving
from tests.unit.situations import DIRECTORY, disk, situation

MAPPED, STREAM = ImageFormat.MAPPED_RAM, ImageFormat.STREAM
PAUSED = {"running": False, "status": "paused", "condition": Condition.PAUSED_USER}


# --- names and files -----------------------------------------------------------------------


def test_names_of_everything_a_checkpoint_makes() -> None:
    plan = plan_checkpoint(CreateRequest(name="s1"), situation(current="s0"))
    [pivot] = plan.pivots
    assert re.fullmatch("[0-9a-f]{8}", plan.token)
    assert (plan.name, plan.parent, plan.reason) == ("s1", "s0", "RUNNING_BOOTED")
    assert plan.memory_file == f"{DIRECTORY}/s1/memory.img"
    assert plan.memory_partial == f"{DIRECTORY}/.s1.partial/memory.img"
    assert pivot.overlay.path == "/images/root.after-s1.qcow2"
    assert pivot.overlay.partial == f"/images/root.after-s1.qcow2.{plan.token}.partial"
    assert pivot.overlay.backing == "/images/root.qcow2"
    assert pivot.overlay_node == f"qsnapd-{plan.token}-0"
    assert pivot.file_node == f"qsnapd-{plan.token}-0-f"
    assert len(pivot.overlay_node) < 32, "QEMU's limit for names of nodes"


def test_two_plans_share_no_temporary_name() -> None:
    plans = [plan_checkpoint(CreateRequest(name="s1"), situation()) for _ in range(2)]
    assert plans[0].token != plans[1].token


def test_a_snapshot_without_a_name_is_called_by_the_time() -> None:
    name = plan_checkpoint(CreateRequest(), situation()).name
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z", name)


def test_memory_goes_where_the_request_says() -> None:
    plan = plan_checkpoint(CreateRequest(name="s1", memory_file="/big/m"), situation())
    assert plan.memory_file == "/big/m"
    assert plan.memory_partial == f"/big/m.{plan.token}.partial"


def test_overlays_are_named_for_the_oldest_image_and_do_not_grow() -> None:
    names = ("/d/root.after-s1.qcow2", "/d/root.after-s0.qcow2", "/d/root.img")
    chain = tuple(FileIdentity(path=name, device=1, inode=n) for n, name in enumerate(names))
    now = situation(disks=(disk(chain=chain, depth=3),))
    assert plan_checkpoint(CreateRequest(name="s2"), now).pivots[0].overlay.path == (
        "/d/root.after-s2.qcow2"
    )


def test_disks_whose_overlays_would_have_one_name_get_their_own() -> None:
    now = situation(disks=(disk("vda", "/d/x.qcow2"), disk("vdb", "/d/x.raw", format="raw")))
    paths = [p.overlay.path for p in plan_checkpoint(CreateRequest(name="s"), now).pivots]
    assert paths == ["/d/x.after-s.qcow2", "/d/vdb-x.after-s.qcow2"]


def test_descriptor_sets_get_ids_that_nobody_has() -> None:
    now = situation(fdset_ids=frozenset({0, 7}), disks=(disk("vda"), disk("vdb", "/images/b")))
    plan = plan_checkpoint(CreateRequest(name="s1"), now)
    ids = [plan.memory_fdset_id, *(pivot.fdset_id for pivot in plan.pivots)]
    assert ids == [8, 9, 10]


def test_what_the_overlay_takes_over_from_its_disk() -> None:
    bitmaps = (
        BitmapInfo(name="kept", granularity_bytes=65536, persistent=True),
        BitmapInfo(name="transient", granularity_bytes=65536),
        BitmapInfo(name="broken", granularity_bytes=65536, persistent=True, inconsistent=True),
        BitmapInfo(name="still", granularity_bytes=65536, persistent=True, recording=False),
    )
    now = situation(disks=(disk(bitmaps=bitmaps, cache_direct=True, detect_zeroes="unmap"),))
    [pivot] = plan_checkpoint(CreateRequest(name="s1"), now).pivots
    assert [bitmap.name for bitmap in pivot.bitmaps] == ["kept"]
    assert (pivot.cache_direct, pivot.detect_zeroes) == (True, "unmap")
    assert (pivot.overlay.cluster_size_bytes, pivot.overlay.backing_format) == (65536, "qcow2")


def test_raw_disks_have_no_cluster_size_to_take_over() -> None:
    now = situation(disks=(disk(path="/dev/x", format="host_device"),))
    request = CreateRequest(name="s1", disks=(DiskRequest(target="vda", file="/d/o"),))
    [pivot] = plan_checkpoint(request, now).pivots
    assert (pivot.overlay.backing_format, pivot.overlay.cluster_size_bytes) == ("raw", None)


# --- which disks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word", ["vda", "vda-node", "/images/root.qcow2", "vda-device"], ids=str
)
def test_a_disk_answers_to_all_its_names(word: str) -> None:
    request = CreateRequest(name="s1", disks=(DiskRequest(target=word, snapshot="no"),))
    assert plan_checkpoint(request, situation()).pivots == ()


def test_media_that_cannot_change_are_left_out() -> None:
    disks = (disk(), disk("hdc", left_out="removable"), disk("vdb", left_out="read-only"))
    plan = plan_checkpoint(CreateRequest(name="s1"), situation(disks=disks))
    assert [pivot.target for pivot in plan.pivots] == ["vda"]


TWICE = (DiskRequest(target="vda"), DiskRequest(target="vda-node"))
SAME_FILE = tuple(DiskRequest(target=target, file="/d/o") for target in ("vda", "vdb"))
LONG = f"/d/{'x' * 250}"


@pytest.mark.parametrize(
    ("requests", "disks", "words"),
    [
        ((DiskRequest(target="vdz"),), (disk(),), "no disk named 'vdz'; this VM has: vda"),
        (TWICE, (disk(),), "disk vda specified twice"),
        (
            (DiskRequest(target="same"),),
            (disk(node="same"), disk("vdb", node="same")),
            "'same' means several disks: vda, vdb",
        ),
        (
            (DiskRequest(target="vda", snapshot="no", file="/d/o"),),
            (disk(),),
            "requires use of external snapshot mode",
        ),
        ((DiskRequest(target="vda"),), (disk(left_out="read-only"),), "disk vda is read-only"),
        (SAME_FILE, (disk(), disk("vdb", "/d/b")), "the same file"),
        ((DiskRequest(target="vda", file=LONG),), (disk(),), "is too long"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_make_no_sense(requests: Any, disks: Any, words: str) -> None:  # noqa: ANN401
    with pytest.raises(BadRequest, match=re.escape(words)):
        plan_checkpoint(CreateRequest(name="s1", disks=requests), situation(disks=disks))


@pytest.mark.parametrize("path", [f"{DIRECTORY.parent}/x", f"{DIRECTORY}/../s9/memory.img"])
def test_files_among_qsnapds_own_are_refused(path: str) -> None:
    for request in (
        CreateRequest(name="s1", memory_file=path),
        CreateRequest(name="s1", disks=(DiskRequest(target="vda", file=path),)),
    ):
        with pytest.raises(BadRequest, match="name another place"):
            plan_checkpoint(request, situation())


# --- what is refused -----------------------------------------------------------------------

JOB = JobInfo(id="j", type="mirror", status="running")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"snapshots": frozenset({"s1"})}, SnapshotExists, "already has a snapshot 's1'"),
        ({"status": "inmigrate", "running": False}, WrongState, "has not started yet"),
        ({"status": "prelaunch", "running": False}, WrongState, "has not started yet"),
        ({"status": "postmigrate", "running": False}, WrongState, "qsnapctl resume vm1"),
        ({"status": "guest-panicked", "running": False}, WrongState, "only a running or paused"),
        ({"status": "suspended", "running": False}, WrongState, "of PMSUSPENDED guests"),
        ({"condition": Condition.SHUTDOWN_USER}, WrongState, r"in shutdown \(user\)"),
        ({"migration": MigrationInfo(status="active")}, Blocked, "another migration is under way"),
        ({"migration": MigrationInfo(blocked_reasons=("vfio",))}, Blocked, "QEMU says: vfio"),
        ({"jobs": (JOB,)}, Blocked, r"block jobs are running: j \(mirror, running\)"),
        ({"disks": (disk(format="nbd"),)}, Blocked, "of type 'nbd'"),
        ({"disks": (disk(path=None, filename="nbd://h"),)}, Blocked, "'nbd://h' is no file"),
        ({"disks": (disk(depth=CHAIN_LIMIT),)}, Blocked, "more than 200 layers"),
    ],
    ids=str,
)
def test_refusals(changes: dict[str, Any], error: type[QsnapError], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_checkpoint(CreateRequest(name="s1"), situation(**changes))


# --- strategy and image format -------------------------------------------------------------


@pytest.mark.parametrize(
    ("major", "changes", "request_", "strategy", "image_format"),
    [
        (10, {}, CreateRequest(), Strategy.STOPPED, MAPPED),
        (7, {}, CreateRequest(), Strategy.STOPPED, STREAM),
        (10, {}, CreateRequest(live=True), Strategy.BACKGROUND, MAPPED),
        (10, {"background_refusal": "no"}, CreateRequest(live=True), Strategy.PRECOPY, MAPPED),
        (7, {}, CreateRequest(live=True), Strategy.PRECOPY, STREAM),
        (7, PAUSED, CreateRequest(live=True), Strategy.STOPPED, STREAM),
        (10, PAUSED, CreateRequest(live=True), Strategy.BACKGROUND, MAPPED),
        (7, {}, CreateRequest(strategy=Strategy.BACKGROUND), Strategy.BACKGROUND, STREAM),
        (10, {}, CreateRequest(image_format=STREAM), Strategy.STOPPED, STREAM),
        (10, {}, CreateRequest(live=True, strategy=Strategy.STOPPED), Strategy.STOPPED, MAPPED),
    ],
    ids=str,
)
def test_the_best_that_can_be_had(
    major: int,
    changes: dict[str, Any],
    request_: CreateRequest,
    strategy: Strategy,
    image_format: ImageFormat,
) -> None:
    saving = plan_saving(request_, situation(major=major, **changes))
    assert (saving.strategy, saving.image_format) == (strategy, image_format)


@pytest.mark.parametrize(
    ("major", "changes", "request_", "words"),
    [
        (10, {"background_refusal": "EPERM"}, {"strategy": Strategy.BACKGROUND}, "EPERM"),
        (7, PAUSED, {"strategy": Strategy.BACKGROUND}, "use --strategy stopped"),
        (7, {}, {"image_format": MAPPED}, "use stream"),
    ],
    ids=str,
)
def test_what_is_forced_and_cannot_be_had(
    major: int, changes: dict[str, Any], request_: dict[str, Any], words: str
) -> None:
    with pytest.raises(CapabilityMissing, match=words):
        plan_saving(CreateRequest(**request_), situation(major=major, **changes))


def test_every_capability_is_set_explicitly_and_remembered() -> None:
    now = situation()
    now = situation(capabilities={**now.capabilities, "xbzrle": True})
    saving = plan_saving(CreateRequest(strategy=Strategy.PRECOPY), now)
    assert saving.capabilities == {
        "events": True,
        "xbzrle": False,
        "pause-before-switchover": True,
        "mapped-ram": True,
    }
    assert saving.capabilities_before == {
        "events": False,
        "xbzrle": True,
        "pause-before-switchover": False,
        "mapped-ram": False,
    }


def test_parameters_are_set_and_remembered() -> None:
    saving = plan_saving(CreateRequest(), situation())
    assert saving.parameters["max-bandwidth"] == UNLIMITED_BYTES_PER_S
    assert saving.parameters_before == {"max-bandwidth": 1 << 27, "multifd-channels": 8}


@pytest.mark.parametrize(
    ("major", "strategy", "cancellable", "drained", "by_fdset"),
    [
        (10, Strategy.STOPPED, False, False, True),  # multifd
        (10, Strategy.PRECOPY, True, False, True),
        (10, Strategy.BACKGROUND, True, False, True),
        (7, Strategy.STOPPED, True, False, False),
        (7, Strategy.PRECOPY, True, False, False),
        (7, Strategy.BACKGROUND, False, True, False),
    ],
)
def test_what_each_qemu_survives(
    major: int, strategy: Strategy, cancellable: bool, drained: bool, by_fdset: bool
) -> None:
    saving = plan_saving(CreateRequest(strategy=strategy), situation(major=major))
    assert (saving.cancellable, saving.drained, saving.by_fdset) == (cancellable, drained, by_fdset)
