"""`qsnapctl snapshot-verify`, and the call behind it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from qsnapd.model.request import CreateRequest
from qsnapd.model.verification import Check, Outcome
from tests.unit.control_host import Served
from tests.unit.test_cli import QSNAPCTL, run

LIMIT_S = 20.0


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with Served.at(tmp_path) as served:
        yield served


async def test_a_line_per_check(served: Served) -> None:
    assert await run(served, "snapshot-verify vm1 s1 --deep") == (
        "memory image:    sound      12 bytes\nDomain snapshot s1 is sound\n"
    )
    assert "Domain snapshot s2 is sound" in await run(served, "snapshot-verify vm1 --current")
    found = json.loads(await run(served, "--json snapshot-verify vm1 s1"))
    assert found == {
        "vm": "vm1",
        "snapshot": "s1",
        "deep": False,
        "sound": True,
        "checks": [{"what": "memory image", "outcome": "sound", "detail": "12 bytes"}],
    }


async def test_bad_news_are_an_exit_status(served: Served) -> None:
    served.host.verdict = Check(what="disk vda", outcome=Outcome.WRONG, detail="it is damaged")
    done = await trio.run_process(
        [QSNAPCTL, "--socket", str(served.path), "snapshot-verify", "vm1", "s1"],
        capture_stdout=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.decode() == (
        "disk vda:        wrong      it is damaged\nDomain snapshot s1 is damaged\n"
    )


async def test_what_was_not_checked_is_not_called_sound(served: Served) -> None:
    detail = "the host has no room"
    served.host.verdict = Check(what="restore", outcome=Outcome.UNCHECKED, detail=detail)
    said = await run(served, "snapshot-verify vm1 s1 --deep")
    assert said.endswith("Domain snapshot s1 is sound as far as it was checked\n")


async def test_unknown_snapshot(served: Served) -> None:
    assert "no snapshot" in await run(served, "snapshot-verify vm1 other", status=1)


async def test_ends_when_the_client_leaves(served: Served) -> None:
    served.host.verdict = None
    call = {"method": "io.qsnapd.VerifySnapshot", "parameters": {"vm": "vm1", "name": "s1"}}
    with trio.fail_after(LIMIT_S):
        stream = await served.connect()
        await stream.send_all(json.dumps({**call, "more": True}).encode() + b"\0")
        await served.host.verifying.wait()
        await stream.aclose()
        await served.host.left.wait()


async def test_hashing_can_be_turned_off(served: Served) -> None:
    await run(served, "snapshot-create-as vm1 a")
    await run(served, "snapshot-create-as vm1 b --no-hash")
    assert served.host.requests == [
        CreateRequest(name="a", hash_memory=True),
        CreateRequest(name="b", hash_memory=False),
    ]
