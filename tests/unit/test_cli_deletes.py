"""`qsnapctl snapshot-delete`, with a daemon that only says it did."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from qsnapd.model.request import DeleteRequest, Descendants
from tests.unit.control_host import Served
from tests.unit.test_cli import run


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def test_says_what_was_asked_for(served: Served) -> None:
    assert await run(served, "snapshot-delete vm1 s1") == "Domain snapshot s1 deleted\n"
    only = await run(served, "snapshot-delete vm1 s1 --children-only")
    assert only == "Domain snapshot s1 children deleted\n"
    await run(served, "snapshot-delete vm1 s1 --children --metadata")
    assert served.host.requests == [
        DeleteRequest(name="s1"),
        DeleteRequest(name="s1", descendants=Descendants.ONLY),
        DeleteRequest(name="s1", descendants=Descendants.TOO, metadata_only=True),
    ]
    reply = json.loads(await run(served, "--json snapshot-delete vm1 s1"))
    assert reply["job"]["kind"] == "delete"


async def test_the_current_one(served: Served) -> None:
    await run(served, "snapshot-delete vm1 --current")
    [request] = served.host.requests
    assert request == DeleteRequest(name="s2")
    assert served.host.current_name == "s2"


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("snapshot-delete vm1", 1, "--snapshotname or --current is required"),
        ("snapshot-delete vm1 s1 --current", 1, "mutually exclusive"),
        ("snapshot-delete vm1 s1 --children --children-only", 1, "mutually exclusive"),
        ("snapshot-delete vm1 nope", 1, "nope"),
    ],
)
async def test_refused(served: Served, words: str, status: int, says: str) -> None:
    assert says in await run(served, words, status)
    assert served.host.requests == []
