"""`qsnapctl snapshot-clone` and `undefine`, with a daemon that only says it did."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qsnapd.control.authorization import Role
from qsnapd.control.methods.clones import CloneSnapshot
from qsnapd.model.request import CloneRequest, Identity, Memory
from tests.unit.control_host import Served
from tests.unit.test_cli import run


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def test_clone_says_what_was_asked_for(served: Served) -> None:
    words = await run(served, "snapshot-clone vm1 s1 two")
    assert words.splitlines()[0] == "Domain two cloned from vm1 at s1"
    flags = "--paused --eager --force --mac keep --uuid keep --qmp /r/q"
    await run(served, f"snapshot-clone vm1 s1 two {flags} --substitute tap0=tap1")
    assert served.host.requests == [
        CloneRequest(name="s1", clone="two"),
        CloneRequest(
            name="s1",
            clone="two",
            state="paused",
            memory=Memory.EAGER,
            force=True,
            qmp="/r/q",
            mac=Identity.KEEP,
            uuid=Identity.KEEP,
            substitutes={"tap0": "tap1"},
        ),
    ]
    reply = json.loads(await run(served, "--json snapshot-clone vm1 s1 two"))
    assert reply["job"]["kind"] == "clone"


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("snapshot-clone vm1 s1", 1, "requires <newname>"),
        ("snapshot-clone vm1 s1 two --substitute tap0", 1, "OLD=NEW"),
        ("snapshot-clone vm1 s1 two --lazy --eager", 1, "mutually exclusive"),
        ("snapshot-clone vm1 s1 two --mac other", 1, "other"),
        ("snapshot-clone vm1 s1 vm2", 1, "there is a VM 'vm2' already"),
        ("snapshot-clone vm1 s1 a/b", 1, "must not contain '/'"),
        ("undefine vm1", 1, "in the configuration file"),
    ],
)
async def test_clone_refused(served: Served, words: str, status: int, says: str) -> None:
    assert says in await run(served, words, status)


async def test_undefine(served: Served) -> None:
    assert await run(served, "undefine vm2") == (
        "Domain 'vm2' has been undefined\n  removed /run/vm2.sock\n"
    )
    assert json.loads(await run(served, "--json undefine vm2 --remove-all-storage")) == {
        "removed": ["/run/vm2.sock", "/d/vm2.qcow2"]
    }


def test_names_of_the_host_are_for_root() -> None:
    request = CloneRequest(name="s", clone="two")
    roles = [
        CloneSnapshot(vm="vm1", request=request.model_copy(update=more)).needed_role()
        for more in ({}, {"qmp": "/q"}, {"substitutes": {"1": "2"}})
    ]
    assert roles == [Role.OPERATOR, Role.ADMIN, Role.ADMIN]
