"""QEMU's answers that cannot be: refused as a whole where it matters, else made the best of."""

import os
from typing import Any

import pytest

from qsnapd.errors import UnexpectedReply
from qsnapd.qmp.block import BlockInfo, ImageInfo, NodeInfo, QueryBlock
from qsnapd.qmp.commands import QueryFdsets, QueryMemdev, QueryVersion
from qsnapd.qmp.migration import MigrationInfo, QueryMigrate, QueryMigrateParameters
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.taking.saving import progress_of
from qsnapd.vm.cpu import read_cpu
from qsnapd.vm.disks import assign_targets, read_disks
from tests.fuzz.bounds import bounded
from tests.unit.test_disks import Answers, image, node


def on_a_disk(strange: dict[str, object]) -> dict[str, object]:
    return {"query_block": [{"inserted": node("n", image("/x") | strange)}]}


RAM = {"transferred": 5, "remaining": 3, "total": 8}


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        (QueryVersion(), {"query_version": {"qemu": {"major": -1, "minor": 0, "micro": 0}}}),
        (QueryMemdev(), {"query_memdev": [{"id": "m", "size": -1}]}),
        (QueryMemdev(), {"query_memdev": [{"id": "m", "size": 1 << 63}]}),
        (QueryFdsets(), {"query_fdsets": [{"fdset-id": -1, "fds": []}]}),
        (QueryBlock(), on_a_disk({"virtual-size": -1})),
        (QueryBlock(), on_a_disk({"cluster-size": 0})),
        (QueryBlock(), on_a_disk({"format-specific": {"data": 5}})),
        (QueryMigrate(), {"query_migrate": {"ram": RAM | {"mbps": float("nan")}}}),
        (QueryMigrate(), {"query_migrate": {"ram": RAM | {"mbps": 1e300}}}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
async def test_numbers_that_cannot_be(command: Any, answers: dict[str, object]) -> None:  # noqa: ANN401
    with pytest.raises(UnexpectedReply, match="is not understood"):
        await QmpSession(Answers(**answers)).execute(command)


@pytest.mark.parametrize(
    ("ram", "done_bytes", "left_s"),
    [
        (RAM, 5, None),
        (RAM | {"remaining": -5}, 8, None),
        (RAM | {"remaining": 1 << 70}, 0, None),
        (RAM | {"mbps": 8.0}, 5, 0.0),
        (RAM | {"mbps": 1e-320}, 5, None),
    ],
)
def test_progress_of_any_numbers(
    ram: dict[str, object], done_bytes: int, left_s: float | None
) -> None:
    progress = progress_of(MigrationInfo.model_validate({"status": "active", "ram": ram}))
    assert (progress.done_bytes, progress.left_s) == (done_bytes, left_s)


async def test_reasons_are_for_people() -> None:
    says = {"error-desc": "no\n\x1b[2J" + "y" * 100_000, "blocked-reasons": ["a\nb"]}
    info = await QmpSession(Answers(query_migrate=says)).execute(QueryMigrate())
    assert info.error_desc is not None
    assert info.error_desc.startswith("no??[2Jyyy")
    assert len(info.error_desc) < 3000
    assert info.blocked_reasons == ("a?b",)


async def test_of_parameters_only_those_that_can_be_put_back() -> None:
    says = {"max-bandwidth": 5, "tls-creds": "", "mode": "normal", "direct-io": False}
    strange = {"a": [1], "b": {"c": 1}, "d": float("nan"), "e": "\ud800", "f": 1 << 70}
    answers = Answers(query_migrate_parameters=says | strange)
    assert await QmpSession(answers).execute(QueryMigrateParameters()) == says


@pytest.mark.parametrize("machine", [5, None, "pc\0", "x" * 5000])
async def test_a_cpu_without_a_name(machine: object) -> None:
    cpus = [{"cpu-index": 0, "qom-path": "/machine/cpu"}]
    with pytest.raises(UnexpectedReply):
        await read_cpu(QmpSession(Answers(query_cpus_fast=cpus, qom_get=machine)))


@pytest.mark.parametrize("name", ["a/b", "\0", "x" * 200, "\u202e", "\x1b[2J"])
def test_a_name_that_no_file_could_have_is_no_target(name: str) -> None:
    assert assign_targets([BlockInfo(device=name)], [""]) == ["disk0"]


@pytest.mark.parametrize("number", ["9" * 5000, "99", "x", "-1"])
async def test_descriptor_sets_that_are_none(number: str) -> None:
    answers = Answers(
        query_block=[{"qdev": "d", "inserted": node("n", image(f"/dev/fdset/{number}"))}],
        query_fdsets=[],
        qom_get={"not": "a name"},
    )
    [disk] = await read_disks(QmpSession(answers), os.getpid())
    assert (disk.chain, disk.depth) == ((), 1)


async def test_one_wrong_item_is_told_not_a_million() -> None:
    wrong = [5] * 1_000_000
    with bounded(len(wrong)), pytest.raises(UnexpectedReply, match="at 0"):
        await QmpSession(Answers(query_memdev=wrong)).execute(QueryMemdev())


def test_chains_are_understood_however_deep() -> None:
    deep: dict[str, object] = image("/0")
    for number in range(1, 900):
        deep = image(f"/{number}", **{"backing-image": deep})
    info = NodeInfo.model_validate(node("n", deep)).image
    depth = 0
    found: ImageInfo | None = info
    while found is not None:
        found, depth = found.backing_image, depth + 1
    assert depth == 900
