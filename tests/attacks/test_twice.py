"""What a killed daemon has left is put right once: who does it again finds nothing to do."""

import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from qsnapd.faults import Action, Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import END_LIMIT_S, Forged, open_forge
from tests.attacks.lane import Lane, difference, open_lane, outcome
from tests.attacks.planted import died, spelled
from tests.long import LONG
from tests.real.cases import NEWEST, VM
from tests.real.footprint import Footprint
from tests.system.processes import COMMANDS

CREATES: tuple[Point, ...] = (
    Point.CREATE_OVERLAYS_PUBLISHED,
    Point.CAPTURE_PIVOTED,
    Point.COMMITTED,
)
DELETES: tuple[Point, ...] = (Point.DELETE_MARKED, Point.DELETE_SWITCHED, Point.DELETE_UNLISTED)
if LONG:
    CREATES += (
        Point.CREATE_FILES_MADE,
        Point.CAPTURE_STOPPED,
        Point.CAPTURE_LEFT,
        Point.COMMIT_OVERLAYS_NOTED,
        Point.SETTLE_CURRENT_SET,
    )
    DELETES += (Point.DELETE_COPIED, Point.DELETE_RECORDED)


@pytest.mark.parametrize("points", [CREATES, DELETES], ids=["create", "delete"])
async def test_once_is_enough(points: Sequence[Point], tmp_path: Path) -> None:
    async with open_forge() as forge, open_lane(forge, NEWEST, tmp_path) as lane:
        for point in points:
            await _leave(lane, point, deletes=points is DELETES)
            await _twice_by_reconcile(lane, point)
            await _twice_by_daemons(lane, point)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            await lane.goes_on(daemon, Strategy.STOPPED)
            await daemon.end()


async def _leave(lane: Lane, point: Point, *, deletes: bool) -> None:
    """Have a daemon killed there, in the middle of its job."""
    name = lane.new_name("s")
    async with lane.daemon(spelled([(point, Action.KILL)])) as daemon:
        await lane.settled(daemon)
        if deletes:
            await lane.create(daemon, name)
            await lane.create(daemon, lane.new_name("s"))
            request = {"name": name}
            error = await outcome(partial(daemon.call, "DeleteSnapshot", vm=VM, request=request))
        else:
            error = await outcome(partial(lane.create, daemon, name))
        assert error is not None
        await died(daemon)


async def _twice_by_reconcile(lane: Lane, point: Point) -> None:
    """What systemd runs behind the daemon; it may be run by hand, too."""
    was_running = (await lane.look()).status == "running"
    said = await _reconcile(lane)
    first = await lane.look()
    assert first.status == "running", f"{point}: {said}"
    assert was_running or "holds its guest no more" in said, f"{point}: {said}"
    said = await _reconcile(lane)
    assert said == "", f"{point}: {said}"
    _require_same(first, await lane.look(), point)


async def _twice_by_daemons(lane: Lane, point: Point) -> None:
    """The next ones: the first of them says what it has done, to everybody who listens."""
    begin = len(_log(lane))
    with _held(lane.vm.pid) as let_go:  # so that nothing is done before somebody listens
        async with lane.daemon() as daemon, _events(daemon) as events:
            let_go()
            done = await _recovered(events)
            await lane.settled(daemon)
            await daemon.end()
    said = _warnings(lane, begin)
    assert [line for line in said if done in line], f"{point}: {done!r} is not in {said}"
    first = await lane.look()
    begin = len(_log(lane))
    async with lane.daemon() as daemon:
        await lane.settled(daemon)
        await daemon.end()
    said = _warnings(lane, begin)
    assert said == [], f"{point}: {said}"
    _require_same(first, await lane.look(), point)


async def _reconcile(lane: Lane) -> str:
    """Run it; returns what it says."""
    argv = [str(COMMANDS / "qsnapd"), "reconcile", "--resume-only", "--config", str(lane.config)]
    with trio.fail_after(END_LIMIT_S):
        done = await trio.run_process(argv, capture_stderr=True)
    lines = done.stderr.decode().splitlines()
    return "\n".join(line for line in lines if not line.startswith("INFO"))


@contextmanager
def _held(pid: int) -> Iterator[Callable[[], None]]:
    """Have a process stand still until the block ends, or earlier by what it gets."""
    os.kill(pid, signal.SIGSTOP)
    let_go = partial(os.kill, pid, signal.SIGCONT)
    try:
        yield let_go
    finally:
        let_go()


@asynccontextmanager
async def _events(daemon: Forged) -> AsyncIterator[AsyncIterator[dict[str, Any] | None]]:
    """What the daemon tells of snapshots from now on."""
    call: dict[str, object] = {
        "method": "io.qsnapd.Subscribe",
        "parameters": {"vm": VM, "kinds": ["snapshot"]},
        "more": True,
    }
    async with await trio.open_unix_socket(daemon.control) as stream:
        await stream.send_all(json.dumps(call).encode() + b"\0")
        async with aclosing(_received(stream)) as events:
            assert await anext(events) is None, "it is listened to from here on"
            yield events


async def _received(stream: trio.SocketStream) -> AsyncGenerator[dict[str, Any] | None, None]:
    buffer = b""
    while chunk := await stream.receive_some():
        *frames, buffer = (buffer + chunk).split(b"\0")
        for frame in frames:
            yield json.loads(frame)["parameters"]["event"]


async def _recovered(events: AsyncIterator[dict[str, Any] | None]) -> str:
    """Wait until something is put right; returns what."""
    with trio.fail_after(END_LIMIT_S):
        while (event := await anext(events)) is None or event["event"] != "recovered":
            pass
    return str(event["detail"])


def _log(lane: Lane) -> list[str]:
    return lane.log.read_text(errors="replace").splitlines()


def _warnings(lane: Lane, begin: int) -> list[str]:
    """What the daemons have said since, but of files that are not theirs."""
    foreign = [str(path) for path in lane.foreign]
    said = [line for line in _log(lane)[begin:] if not line.startswith("INFO")]
    return [line for line in said if not any(path in line for path in foreign)]


def _require_same(before: Footprint, now: Footprint, point: Point) -> None:
    assert now == before, f"{point}: {difference(before, now)}"
