"""Every combination that makes no sense is refused with its reason, and QEMU is only asked."""

from pathlib import Path
from typing import Any

import pytest

from qsnapd.control.authorization import Role
from qsnapd.control.methods.snapshots import CreateSnapshot
from qsnapd.errors import AgentAbsent, BadRequest, Effect, QsnapError, TargetRefused, WrongState
from qsnapd.model.request import CreateRequest, DiskRequest
from tests.parts import Qemu
from tests.real.cases import VM, each_qemu, open_lazy
from tests.real.footprint import look
from tests.real.steering import steered
from tests.unit.test_plan_kinds import REFUSED as PLANNED

ASKING = ("query-", "qom-get")
OTHERS: tuple[tuple[dict[str, Any], type[QsnapError], str], ...] = (
    (
        {"disks": (DiskRequest(target="vda", file="/nowhere/o", target_type="block"),)},
        TargetRefused,
        "doesn't exist",
    ),
    (
        {"reuse_overlays": True, "disks": (DiskRequest(target="vda", file="/nowhere/o"),)},
        TargetRefused,
        "missing existing file for disk",
    ),
    ({"disk_only": True, "quiesce": True}, AgentAbsent, "agent"),
)
NAMES = {"vdb": "sda", "vda-node": "disk0"}
"""The disks of the VMs here, by what the plan's tests call theirs."""


def of_this_vm(asked: dict[str, Any]) -> CreateRequest:
    disks = tuple(
        disk.model_copy(update={"target": NAMES.get(disk.target, disk.target)})
        for disk in asked.get("disks", ())
    )
    return CreateRequest(name="s1", **{**asked, "disks": disks})


@each_qemu
async def test_nothing_but_questions_reaches_qemu(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        before = await look(vm, tmp_path)
        for asked, error, words in (*PLANNED, *OTHERS):
            with steered(rig.supervisors[VM]) as session, pytest.raises(error) as refused:
                await rig.create(VM, of_this_vm(asked))
            assert words.replace("vdb", "sda") in str(refused.value), asked
            assert refused.value.effect is Effect.NONE
            sent = {command.name for command in session.sent}
            assert all(name.startswith(ASKING) for name in sent), (asked, sent)
            assert await look(vm, tmp_path) == before, asked


@each_qemu
async def test_a_guest_that_sleeps(qemu: Qemu, tmp_path: Path) -> None:
    """This state cannot be had of a guest here: QEMU is made to say so."""
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        before = await look(vm, tmp_path)
        session = rig.supervisors[VM].require_attached().session
        plain = session.execute

        async def asleep(command: Any, **more: Any) -> Any:  # noqa: ANN401
            reply = await plain(command, **more)
            if command.name == "query-status":
                return reply.model_copy(update={"status": "suspended", "running": False})
            return reply

        session.execute = asleep  # type: ignore[method-assign]
        for request in (CreateRequest(), CreateRequest(disk_only=True)):
            with pytest.raises(WrongState, match="of PMSUSPENDED guests"):
                await rig.create(VM, request)
        session.execute = plain  # type: ignore[method-assign]
        assert await look(vm, tmp_path) == before


@pytest.mark.parametrize(
    ("asked", "role"),
    [
        ({}, Role.OPERATOR),
        ({"disk_only": True, "halt": True}, Role.OPERATOR),
        ({"memory_file": "/m"}, Role.ADMIN),
        ({"disks": (DiskRequest(target="vda", file="/o"),)}, Role.ADMIN),
        ({"reuse_overlays": True}, Role.ADMIN),
    ],
    ids=str,
)
def test_who_may_name_files(asked: dict[str, Any], role: Role) -> None:
    call = CreateSnapshot(vm=VM, request=CreateRequest(**asked))
    assert call.needed_role() is role


def test_the_table_is_whole() -> None:
    assert {error for _, error, _ in (*PLANNED, *OTHERS)} == {
        BadRequest,
        AgentAbsent,
        TargetRefused,
    }
