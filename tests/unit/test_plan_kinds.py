"""Kinds of snapshots: what is planned for each, and every combination that makes no sense."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qsnapd.errors import AgentAbsent, BadRequest, Blocked, QsnapError, WrongState
from qsnapd.model.plan import Place
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import Consistency, ImageFormat, Strategy
from qsnapd.model.state import Condition
from qsnapd.qmp.agent import GuestAgent
from qsnapd.qmp.migration import MigrationInfo
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.vm.provisions import Provisions
from tests.unit.situations import disk, situation

DISKS = (disk("vda"), disk("vdb", "/images/data.raw", format="raw"))
TWO = situation(disks=DISKS)
PAUSED: dict[str, Any] = {"running": False, "status": "paused", "condition": Condition.PAUSED_USER}
WITH_AGENT = Provisions(agent=GuestAgent(Path("/run/agent")))
NO_DISK = tuple(DiskRequest(target=target, snapshot="no") for target in ("vda", "vdb"))


def one(target: str = "vdb", **what: Any) -> dict[str, Any]:  # noqa: ANN401
    """A request about one disk."""
    return {"disks": (DiskRequest(target=target, **what),)}


REFUSED: list[tuple[dict[str, Any], type[QsnapError], str]] = [
    (
        {"disk_only": True, "live": True},
        BadRequest,
        "live snapshot creation is supported only during full system snapshots",
    ),
    (
        {"disk_only": True, "memory_file": "/m"},
        BadRequest,
        "memory state cannot be saved with offline or disk-only snapshot",
    ),
    ({"disk_only": True, "strategy": Strategy.STOPPED}, BadRequest, "saves none"),
    ({"disk_only": True, "image_format": ImageFormat.STREAM}, BadRequest, "saves none"),
    ({"quiesce": True}, BadRequest, "quiesce requires disk-only"),
    ({"quiesce": True, "live": True}, BadRequest, "quiesce requires disk-only"),
    ({"disk_only": True, "quiesce": True}, AgentAbsent, "no guest agent is configured"),
    (
        {"keep_metadata": False},
        BadRequest,
        "external memory snapshots require a filename",
    ),
    (
        {"disk_only": True, "disks": NO_DISK},
        BadRequest,
        "disk-only snapshots require at least one disk to be selected for snapshot",
    ),
    (one(snapshot="no", file="/d/o"), BadRequest, "requires use of external snapshot mode"),
    (one(snapshot="manual", file="/d/o"), BadRequest, "requires use of external snapshot mode"),
    (one(target_type="block"), BadRequest, "say which block device"),
    (one("vdz"), BadRequest, "no disk named 'vdz'"),
    (
        {"disks": (DiskRequest(target="vda"), DiskRequest(target="vda-node"))},
        BadRequest,
        "disk vda specified twice",
    ),
    ({"memory_file": "/d/o", **one(file="/d/o")}, BadRequest, "the same file is named twice"),
]


@pytest.mark.parametrize(("asked", "error", "words"), REFUSED, ids=str)
def test_what_makes_no_sense(asked: dict[str, Any], error: type[QsnapError], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        plan_checkpoint(CreateRequest(name="s1", **asked), TWO)


@pytest.mark.parametrize(
    "asked",
    [
        {"memory_file": "relative"},
        {"name": "a/b"},
        {"name": ".hidden"},
        {"hold_limit_s": 0},
        {"disks": [{"target": "vda", "snapshot": "internal"}]},
        {"disks": [{"target": "vda", "file": "relative"}]},
        {"disks": [{"target": "vda", "target_type": "volume"}]},
    ],
    ids=str,
)
def test_what_cannot_even_be_said(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CreateRequest.model_validate(asked)


def test_a_medium_that_does_not_change_needs_no_storage_snapshot() -> None:
    now = situation(disks=(disk(), disk("hdc", left_out="removable")))
    with pytest.raises(BadRequest, match="is removable"):
        plan_checkpoint(CreateRequest(**one("hdc", snapshot="manual")), now)


def test_a_device_gets_no_name_made_up() -> None:
    now = situation(disks=(disk(path="/dev/vg/root", format="raw"),))
    with pytest.raises(BadRequest, match="refusing to generate external snapshot name"):
        plan_checkpoint(CreateRequest(), now)


def test_disk_only_leaves_migration_alone() -> None:
    now = situation(migration=MigrationInfo(blocked_reasons=("vfio",)))
    plan = plan_checkpoint(CreateRequest(disk_only=True), now)
    assert (plan.strategy, plan.image_format) == (None, None)
    assert (plan.memory_file, plan.memory_partial, plan.memory_fdset_id) == (None, None, None)
    assert (plan.capabilities, plan.parameters, plan.parameters_before) == ({}, {}, {})
    assert plan.disk_only
    assert not plan.stops_guest
    assert plan.consistency is Consistency.CRASH


@pytest.mark.parametrize(
    ("changes", "asked", "consistency", "agent"),
    [
        ({}, {}, Consistency.MEMORY, None),
        (PAUSED, {}, Consistency.MEMORY, None),
        ({}, {"disk_only": True}, Consistency.CRASH, None),
        (PAUSED, {"disk_only": True}, Consistency.PAUSED, None),
        ({}, {"disk_only": True, "quiesce": True}, Consistency.AGENT, "/run/agent"),
        (PAUSED, {"disk_only": True, "quiesce": True}, Consistency.PAUSED, None),
        ({}, {"disk_only": True, **one(snapshot="manual")}, Consistency.PAUSED, None),
    ],
    ids=str,
)
def test_why_the_disks_make_sense(
    changes: dict[str, Any], asked: dict[str, Any], consistency: Consistency, agent: str | None
) -> None:
    now = situation(disks=DISKS, **changes)
    plan = plan_checkpoint(CreateRequest(**asked), now, provisions=WITH_AGENT)
    assert (plan.consistency, plan.agent) == (consistency, agent)


def test_a_paused_vm_needs_no_agent_to_be_quiet() -> None:
    now = situation(**PAUSED)
    plan = plan_checkpoint(CreateRequest(disk_only=True, quiesce=True), now)
    assert plan.agent is None
    assert "counts as quiesced" in plan.notes[0]


def test_disks_left_out_are_remembered_and_told_of() -> None:
    plan = plan_checkpoint(CreateRequest(**one(snapshot="no")), TWO)
    [left] = plan.left_out
    assert (left.target, left.frozen, left.frozen_format) == ("vdb", "/images/data.raw", "raw")
    assert left.overlay is None
    assert plan.manual == ()
    assert "takes --force" in plan.notes[0]


def test_manual_disks_are_held_for() -> None:
    provisions = Provisions(hook=("/bin/snap", "-x"), hold_limit_s=7)
    request = CreateRequest(disk_only=True, **one(snapshot="manual"))
    plan = plan_checkpoint(request, TWO, provisions=provisions)
    assert (plan.manual, plan.hook, plan.hold_limit_s) == (("vdb",), ("/bin/snap", "-x"), 7)
    assert [pivot.target for pivot in plan.pivots] == ["vda"]
    assert plan.stops_guest
    shorter = request.model_copy(update={"hold_limit_s": 2.0})
    assert plan_checkpoint(shorter, TWO, provisions=provisions).hold_limit_s == 2


def test_no_disk_is_held_for_unasked() -> None:
    plan = plan_checkpoint(CreateRequest(), TWO, provisions=Provisions(hook=("/bin/snap",)))
    assert (plan.manual, plan.hook) == ((), ())


@pytest.mark.parametrize(
    ("asked", "place", "on_device"),
    [
        ({}, Place.NEW, False),
        (one(file="/d/o"), Place.NEW, False),
        (one(file="/dev/x", target_type="block"), Place.DEVICE, True),
        ({**one(file="/d/o"), "reuse_overlays": True}, Place.READY, False),
        ({**one(file="/dev/x", target_type="block"), "reuse_overlays": True}, Place.READY, True),
    ],
    ids=str,
)
def test_where_overlays_go(asked: dict[str, Any], place: Place, on_device: bool) -> None:
    overlay = plan_checkpoint(CreateRequest(**asked), TWO).pivots[1].overlay
    assert (overlay.place, overlay.on_device) == (place, on_device)


def test_without_metadata_a_name_may_be_taken() -> None:
    now = situation(snapshots=frozenset({"s1"}), current="s1")
    request = CreateRequest(name="s1", keep_metadata=False, disk_only=True)
    plan = plan_checkpoint(request, now)
    assert not plan.keeps_metadata
    assert not plan.committed
    assert plan.parent == "s1"


@pytest.mark.parametrize(
    ("changes", "asked", "holds"),
    [
        ({}, {"halt": True}, True),
        (PAUSED, {"halt": True}, True),
        ({}, {"halt": True, "disk_only": True}, False),
        ({}, {"halt": True, "disk_only": True, **one(snapshot="manual")}, True),
        ({}, {}, False),
    ],
    ids=str,
)
def test_a_guest_that_is_to_be_ended_does_not_go_on(
    changes: dict[str, Any], asked: dict[str, Any], holds: bool
) -> None:
    plan = plan_checkpoint(CreateRequest(**asked), situation(disks=DISKS, **changes))
    assert (plan.holds, plan.halts) == (holds, bool(asked.get("halt")))


@pytest.mark.parametrize(("active", "refused"), [(True, False), (False, True)])
def test_disks_that_qemu_has_let_go_of(active: bool, refused: bool) -> None:
    stands = {**PAUSED, "status": "postmigrate"}
    now = situation(disks=(disk(active=active),), **stands)
    request = CreateRequest(disk_only=True)
    if not refused:
        assert plan_checkpoint(request, now).pivots
        return
    with pytest.raises(WrongState, match="has let go of its disks"):
        plan_checkpoint(request, now)


def test_over_what_no_overlay_may_be_put() -> None:
    now = situation(disks=(disk("vda"), disk("vdb", refusal="is shared")))
    with pytest.raises(Blocked, match="disk vdb is shared: leave it out"):
        plan_checkpoint(CreateRequest(), now)
    left = CreateRequest(disks=(DiskRequest(target="vdb", snapshot="no"),))
    assert [pivot.overlay.target for pivot in plan_checkpoint(left, now).pivots] == ["vda"]
