"""What the daemon does about a thaw that a job could not get."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsnapd.daemon.thawing import Thawer
from qsnapd.model.event import Event
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.provisions import Provisions
from tests.unit.fake_agent import STATUS, THAW, open_agent
from tests.unit.test_freeze import PID, Scene


@dataclass
class Supervised:
    store: VmStore
    provisions: Provisions
    attached: AttachedVm | None
    name: str = "vm1"
    problem: str | None = None


class Watched:
    """A thawer at work, and what it has done."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        provisions = Provisions(agent=scene.agent)
        self.vm = Supervised(scene.store, provisions, scene.vm)
        self.events: list[Event] = []
        self.thawer = Thawer(self.vm, self.events.append)


@pytest.fixture
async def watched(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Watched]:
    monkeypatch.setattr("qsnapd.snapshot.taking.thaw.AGAIN_S", 6.0)
    mock_clock.autojump_threshold = 0.2
    with Store(tmp_path / "store") as store:
        async with open_agent(tmp_path / "agent") as fake, trio.open_nursery() as nursery:
            watched = Watched(Scene(fake, store.vm("vm1")))
            nursery.start_soon(watched.thawer.run)
            yield watched
            nursery.cancel_scope.cancel()


async def test_thaws_what_is_owed(watched: Watched, mock_clock: MockClock) -> None:
    watched.scene.owe()
    watched.thawer.look()
    await trio.sleep(1)
    assert watched.scene.is_thawed
    [event] = watched.events
    assert event.event == "recovered"
    assert event.detail == "thawed the file systems of the guest, which were frozen for snapshot s0"
    watched.thawer.look()
    await trio.sleep(1)
    assert len(watched.events) == 1
    assert watched.scene.fake.done == [THAW, STATUS]


async def test_tries_again_and_again(watched: Watched, mock_clock: MockClock) -> None:
    watched.scene.owe()
    watched.scene.fake.deaf = trio.Event()
    watched.thawer.look()
    await trio.sleep(200)
    assert watched.vm.problem is not None
    assert "may be frozen still" in watched.vm.problem
    assert watched.scene.fake.clients < 60, "it does not hurry"
    watched.scene.fake.deaf.set()
    await trio.sleep(40)
    assert watched.scene.is_thawed
    assert watched.vm.problem is None
    assert len(watched.events) == 1


async def test_a_look_hurries_it(watched: Watched, mock_clock: MockClock) -> None:
    watched.scene.owe()
    watched.scene.fake.refuses[THAW] = "not now"
    watched.thawer.look()
    await trio.sleep(100)
    watched.scene.fake.refuses.clear()
    watched.thawer.look()
    await trio.sleep(7)
    assert watched.scene.is_thawed


async def test_no_qemu_and_another_one(watched: Watched, mock_clock: MockClock) -> None:
    watched.scene.owe(pid=PID + 1)
    watched.vm.attached = None
    watched.thawer.look()
    await trio.sleep(1)
    assert watched.scene.owed is not None
    watched.vm.attached = watched.scene.vm
    watched.thawer.look()
    await trio.sleep(1)
    assert watched.scene.owed is None
    assert watched.scene.fake.done == []
    assert watched.events == []


async def test_a_job_that_has_the_agent_is_left_alone(
    watched: Watched, mock_clock: MockClock
) -> None:
    async with watched.scene.agent.alone():
        watched.scene.owe()
        watched.thawer.look()
        await trio.sleep(60)
        assert watched.vm.problem is None
        assert watched.scene.fake.done == []
    await trio.sleep(60)
    assert watched.scene.is_thawed
