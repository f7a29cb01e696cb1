"""The names of a deep chain's images, where QEMU cuts them off."""

from typing import Any

import pytest

from qsnapd.qmp.block import BlockInfo
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.layer_names import layers, read_layer_names
from tests.unit.test_disks import Answers

DEPTH = 300
CUT_OFF = 'json:{"backing": {"backing": ...'


def device(names: list[str]) -> dict[str, Any]:
    """As `query-block` tells of a device with these images, newest first."""
    image: dict[str, Any] | None = None
    for name in reversed(names):
        below = {"backing-image": image} if image else {}
        image = {"filename": name, "format": "qcow2", "virtual-size": 4096, **below}
    inserted = {"node-name": "n0", "file": names[0], "drv": "qcow2", "ro": False, "image": image}
    return {"device": "", "inserted": inserted}


def stats(depth: int) -> dict[str, Any]:
    """As `query-blockstats` tells of its nodes."""
    found: dict[str, Any] = {}
    for n in reversed(range(depth)):
        below = {"backing": found} if found else {}
        found = {"node-name": f"n{n}", "parent": {"node-name": f"f{n}"}, **below}
    return found


def file_node(number: int) -> dict[str, Any]:
    image = {"filename": f"/images/{number}", "format": "file", "virtual-size": 4096}
    return {"node-name": f"f{number}", "file": "", "drv": "file", "ro": False, "image": image}


async def read(names: list[str], **answers: object) -> tuple[str, ...]:
    devices = [BlockInfo.model_validate(device(names)), BlockInfo(device="empty")]
    [found, nothing] = await read_layer_names(QmpSession(Answers(**answers)), devices)
    assert nothing == ()
    return found


async def test_names_that_are_whole_are_taken_as_they_are() -> None:
    names = ["/a", 'json:{"driver": "raw", "file": {"filename": "/b"}}']
    assert await read(names) == tuple(names)


async def test_names_that_are_cut_off_are_those_of_the_nodes_below() -> None:
    names = [CUT_OFF] * (DEPTH - 1) + ["/base"]
    found = await read(
        names,
        query_named_block_nodes=[file_node(n) for n in range(DEPTH)],
        query_blockstats=[{"device": "other"}, stats(DEPTH)],
    )
    assert found == (*(f"/images/{n}" for n in range(DEPTH - 1)), "/base")


@pytest.mark.parametrize("known", [[], [stats(2)]])
async def test_what_has_changed_meanwhile_is_not_guessed(known: list[dict[str, Any]]) -> None:
    found = await read(
        [CUT_OFF] * 3,
        query_named_block_nodes=[file_node(n) for n in range(3)],
        query_blockstats=known,
    )
    assert found == (CUT_OFF,) * 3


def test_a_chain_is_read_however_deep() -> None:
    """pydantic gives up at 255 by itself."""
    block = BlockInfo.model_validate(device([f"/{n}" for n in range(DEPTH)]))
    assert block.inserted is not None
    assert [image.filename for image in layers(block.inserted.image)] == [
        f"/{n}" for n in range(DEPTH)
    ]
