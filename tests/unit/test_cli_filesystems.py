"""`qsnapctl domfsfreeze`, `domfsthaw` and `domfsinfo` print what virsh prints."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qsnapd.errors import WrongState
from qsnapd.model.freeze import Filesystem
from tests.unit.control_host import Served
from tests.unit.test_cli import run


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def test_freeze_and_thaw(served: Served) -> None:
    assert await run(served, "domfsfreeze vm1") == "Froze 2 filesystem(s)\n"
    assert "frozen already" in await run(served, "domfsfreeze vm1", status=1)
    assert await run(served, "domfsthaw vm1") == "Thawed 2 filesystem(s)\n"
    assert await run(served, "domfsthaw vm1") == "Thawed 0 filesystem(s)\n"


async def test_mountpoints(served: Served) -> None:
    line = "domfsfreeze vm1 --mountpoint /a --mountpoint /b"
    assert await run(served, line) == "Froze 2 filesystem(s)\n"
    refusal = await run(served, "domfsthaw vm1 /a", status=1)
    assert "specifying mountpoints is not supported" in refusal
    assert served.host.frozen == 2
    await run(served, "domfsthaw --domain vm1")
    assert json.loads(await run(served, "domfsfreeze vm1 /a --json")) == {"filesystems": 1}


async def test_list(served: Served) -> None:
    assert await run(served, "domfsinfo vm1") == (
        " Mountpoint   Name   Type   Target\n"
        "------------------------------------\n"
        " /            vda1   ext4   vda\n"
        " /proc        proc   proc\n\n"
    )
    [root, _] = json.loads(await run(served, "domfsinfo vm1 --json"))
    assert root["devices"] == ["/dev/vda"]


async def test_a_guest_does_not_steer_the_terminal(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Filesystem(name="vda1\n", mountpoint="/\x1b[2J\udcff", type="ext4", devices=())

    async def filesystems(name: str) -> tuple[Filesystem, ...]:
        await trio.lowlevel.checkpoint()
        return (odd,)

    monkeypatch.setattr(served.host, "filesystems", filesystems)
    shown = await run(served, "domfsinfo vm1")
    assert r" /\x1b[2J\udcff   vda1\n   ext4" in shown
    assert json.loads(await run(served, "domfsinfo vm1 --json")) == [odd.model_dump(mode="json")]

    async def fail(name: str) -> tuple[Filesystem, ...]:
        await trio.lowlevel.checkpoint()
        raise WrongState("the agent says: \x1b]0;owned\x07")

    monkeypatch.setattr(served.host, "filesystems", fail)
    said = await run(served, "domfsinfo vm1", status=1)
    assert said == "error: the agent says: \\x1b]0;owned\\x07\n"
