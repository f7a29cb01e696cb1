"""What a client gets at the end of a job that it follows."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from qsnapd.control.host import Host, Job
from qsnapd.control.methods.base import follow
from qsnapd.model.snapshot import Manifest
from tests.unit.test_store import manifest


def host(*listed: Manifest, current: str | None = None) -> Host:
    return cast(
        Host,
        SimpleNamespace(
            snapshots=lambda vm: listed, current=lambda vm: current, users=lambda vm: {}
        ),
    )


def job(result: Manifest) -> Job:
    async def wait() -> Manifest:
        await trio.lowlevel.checkpoint()
        return result

    return cast(Job, SimpleNamespace(info=lambda: None, wait=wait))


MADE = manifest("s1", "s0", age=1)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ((manifest("s0"), MADE), {"current": True, "children": 0}),
        ((manifest("s0"),), {"current": False, "children": 0}),  # no metadata, or deleted
        ((manifest("s1", age=9),), {"current": False}),  # another one of that name
    ],
    ids=["listed", "not-listed", "another"],
)
async def test_the_snapshot_that_was_made(
    listed: tuple[Manifest, ...], expected: dict[str, Any]
) -> None:
    reply = await follow(job(MADE), host(*listed, current="s1"), None)
    assert reply.snapshot is not None
    assert (reply.snapshot.name, reply.snapshot.created_at) == ("s1", MADE.created_at)
    assert expected.items() <= reply.snapshot.model_dump().items()
