"""`qsnapctl snapshot-prune`, with a daemon that only says it did."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qsnapd.model.request import PruneRequest
from tests.unit.control_host import Served
from tests.unit.test_cli import QSNAPCTL, environment, run


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def test_says_what_is_gone_and_what_stays(served: Served) -> None:
    said = await run_loud(served, "snapshot-prune vm1 --keep-last 2 --keep-within 36h")
    assert said == (b"Domain snapshot s1 deleted\n", b"note: snapshot s2 stays: it is in use\n")
    assert served.host.requests == [PruneRequest(keep_last=2, keep_within_s=36 * 3600.0)]
    reply = json.loads(await run(served, "--json snapshot-prune vm1 --keep-last 1"))
    assert reply["pruned"]["refused"] == [{"name": "s2", "why": "it is in use"}]
    assert reply["job"]["phase"] == "done"


async def test_a_look_beforehand_asks_for_nothing(served: Served) -> None:
    out, err = await run_loud(served, "snapshot-prune vm1 --keep-last 2 --dry-run")
    assert out == b"Domain snapshot s1 would be deleted\n"
    assert err == b"note: snapshot s2 stays: it is in use\n"
    assert served.host.requests == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("snapshot-prune vm1", "--keep-last"),
        ("snapshot-prune vm1 --keep-last 0", "--keep-last"),
        ("snapshot-prune vm1 --keep-last 1 --keep-within 7", "say 90s, 15m, 36h, 7d or 4w"),
        ("snapshot-prune vm1 --keep-last 1 --keep-within 0d", "is no duration"),
        ("snapshot-prune nope --keep-last 1", "nope"),
    ],
)
async def test_refused(served: Served, words: str, says: str) -> None:
    assert says in await run(served, words, 1)
    assert served.host.requests == []


async def run_loud(served: Served, line: str) -> tuple[bytes, bytes]:
    """What it prints for scripts, and for people."""
    words = [QSNAPCTL, *line.split()]
    done = await trio.run_process(
        words, env=environment(served), capture_stdout=True, capture_stderr=True
    )
    return done.stdout, done.stderr
