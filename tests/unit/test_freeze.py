"""Freezing around a block: whatever goes wrong, the guest ends thawed, or a thaw is owed."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from qsnapd.errors import (
    AgentAbsent,
    AgentUnresponsive,
    Effect,
    FreezeFailed,
    FreezeOutcomeUnknown,
    VmBusy,
    WrongState,
)
from qsnapd.model.freeze import OwedThaw
from qsnapd.model.job import JobKind, Phase
from qsnapd.qmp.agent import GuestAgent
from qsnapd.qmp.chardev import ChardevInfo
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.taking.filesystems import freeze_by_hand, list_filesystems, thaw_by_hand
from qsnapd.snapshot.taking.freeze import Quiesced, frozen, require_freezable
from qsnapd.snapshot.taking.thaw import thaw_owed
from qsnapd.store.layout import Store
from qsnapd.store.owed_thaw import OWED_THAW_NAME, forget_owed_thaw, owe_thaw, read_owed_thaw
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.provisions import NO_PROVISIONS
from tests.faults.sweeps import CancelAt
from tests.unit.fake_agent import FREEZE, STATUS, SYNC, THAW, FakeAgent, open_agent

LIMIT_S = 30.0
PID, TICKS = 4711, 99


class Scene:
    """A guest's agent, a store, and a job that freezes."""

    def __init__(self, fake: FakeAgent, store: VmStore) -> None:
        self.fake = fake
        self.store = store
        self.agent = GuestAgent(fake.path)
        self.job = Job(1, "vm1", JobKind.CREATE, "s1", lambda job: None)
        self.chardevs: list[ChardevInfo] = []
        self.vm = cast(
            AttachedVm,
            SimpleNamespace(
                name="vm1",
                session=SimpleNamespace(execute=self._query_chardev),
                identity=SimpleNamespace(pid=PID, start_time_ticks=TICKS),
            ),
        )

    async def _query_chardev(self, command: object) -> list[ChardevInfo]:
        await trio.lowlevel.checkpoint()
        return self.chardevs

    async def freeze(self, *, limit_s: float = LIMIT_S, stay_s: float = 0) -> Quiesced:
        async with frozen(
            self.vm, self.store, self.job, agent=self.agent, limit_s=limit_s
        ) as quiesced:
            assert self.fake.frozen == quiesced.filesystems
            assert self.owed is not None
            await trio.sleep(stay_s)
        return quiesced

    def owe(self, *, pid: int = PID) -> None:
        """As if a job that was killed had frozen."""
        self.fake.frozen = 2
        owed = OwedThaw(
            agent=str(self.fake.path),
            pid=pid,
            start_time_ticks=TICKS,
            since=datetime.now(UTC),
            why="snapshot s0",
        )
        owe_thaw(self.store, owed)

    @property
    def owed(self) -> OwedThaw | None:
        return read_owed_thaw(self.store)

    @property
    def is_thawed(self) -> bool:
        """For good: nothing is frozen, and nobody believes so."""
        return self.fake.frozen == 0 and self.owed is None and not self.agent.is_in_use


@pytest.fixture
async def scene(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    # each jump of the clock takes time
    monkeypatch.setattr("qsnapd.snapshot.taking.thaw.AGAIN_S", 6.0)
    mock_clock.autojump_threshold = 0.2  # longer than a thread needs to write a file
    with Store(tmp_path / "store") as store:
        async with open_agent(tmp_path / "agent") as fake:
            yield Scene(fake, store.vm("vm1"))


async def test_freezes_for_the_block(scene: Scene) -> None:
    quiesced = await scene.freeze()
    assert (quiesced.filesystems, quiesced.held) == (2, True)
    assert quiesced.frozen_ms > 0
    assert scene.fake.done == [STATUS, FREEZE, THAW, STATUS]
    assert scene.job.phase is Phase.FREEZING
    assert scene.job.notes == ()
    assert scene.is_thawed


async def test_nothing_to_freeze(scene: Scene) -> None:
    scene.fake.filesystems = 0
    assert (await scene.freeze()).filesystems == 0
    assert scene.job.notes == ("the guest agent found no file system that could be frozen",)
    assert scene.is_thawed


async def test_the_block_fails(scene: Scene) -> None:
    with pytest.raises(ZeroDivisionError):
        async with frozen(scene.vm, scene.store, scene.job, agent=scene.agent, limit_s=LIMIT_S):
            raise ZeroDivisionError
    assert scene.is_thawed


async def test_the_block_takes_too_long(scene: Scene, mock_clock: MockClock) -> None:
    with pytest.raises(FreezeFailed, match="frozen for 5 s, and its disks had not moved"):
        await scene.freeze(limit_s=5, stay_s=100)
    assert scene.is_thawed


async def test_no_agent(scene: Scene, tmp_path: Path) -> None:
    scene.agent = GuestAgent(tmp_path / "elsewhere")
    with pytest.raises(AgentAbsent):
        await scene.freeze()
    assert scene.owed is None
    with pytest.raises(AgentAbsent, match=r"\[vm.vm1\] agent ="):
        NO_PROVISIONS.require_agent("vm1")


async def test_qemu_knows_that_no_agent_runs(scene: Scene) -> None:
    chardev = {"label": "a", "filename": f"disconnected:unix:{scene.fake.path},server=on"}
    scene.chardevs = [ChardevInfo(**chardev, frontend_open=False)]
    with pytest.raises(AgentAbsent, match="no agent has opened its port"):
        await require_freezable(scene.vm, scene.agent)
    scene.chardevs = [ChardevInfo(**chardev, frontend_open=True)]
    await require_freezable(scene.vm, scene.agent)
    chardev["filename"] = chardev["filename"].removeprefix("disconnected:")
    scene.chardevs = [ChardevInfo(**chardev, frontend_open=True)]
    with pytest.raises(AgentUnresponsive, match="somebody else is connected"):
        await require_freezable(scene.vm, scene.agent)
    assert scene.fake.done == [STATUS]


async def test_an_agent_that_does_not_answer_is_asked_nothing(
    scene: Scene, mock_clock: MockClock
) -> None:
    scene.fake.mute.add(SYNC)
    with pytest.raises(AgentUnresponsive) as caught:
        await scene.freeze()
    assert caught.value.effect is Effect.NONE
    assert scene.fake.done == []
    assert scene.is_thawed


async def test_a_question_without_an_answer_has_no_effect(
    scene: Scene, mock_clock: MockClock
) -> None:
    scene.fake.mute.add(STATUS)
    with pytest.raises(Exception, match="did not answer") as caught:
        await require_freezable(scene.vm, scene.agent)
    assert cast(Any, caught.value).effect is Effect.NONE


async def test_what_somebody_else_froze_stays_frozen(scene: Scene) -> None:
    scene.fake.frozen = 1
    for attempt in (scene.freeze(), require_freezable(scene.vm, scene.agent)):
        with pytest.raises(WrongState, match="frozen already, by somebody else"):
            await attempt
    assert scene.fake.frozen == 1
    assert scene.owed is None


async def test_the_agent_refuses(scene: Scene) -> None:
    scene.fake.refuses[FREEZE] = "failed to freeze /mnt"
    with pytest.raises(FreezeFailed, match="to freeze /mnt; nothing is frozen now") as caught:
        await scene.freeze()
    assert caught.value.effect is Effect.NONE
    assert THAW in scene.fake.done, "it may have frozen others before that one"
    assert scene.is_thawed


async def test_the_answer_to_a_freeze_is_lost(scene: Scene, mock_clock: MockClock) -> None:
    scene.fake.mute.add(FREEZE)
    with pytest.raises(FreezeOutcomeUnknown, match="nothing is frozen now") as caught:
        await scene.freeze()
    assert caught.value.effect is Effect.NONE
    assert scene.is_thawed


async def test_a_freeze_that_comes_late_is_thawed(scene: Scene, mock_clock: MockClock) -> None:
    scene.fake.takes_s[FREEZE] = LIMIT_S + 12
    with pytest.raises(FreezeOutcomeUnknown, match="nothing is frozen now"):
        await scene.freeze()
    assert scene.fake.done[:2] == [STATUS, FREEZE]
    assert scene.is_thawed


async def test_a_freeze_that_comes_too_late_leaves_a_thaw_owed(
    scene: Scene, mock_clock: MockClock
) -> None:
    scene.fake.takes_s[FREEZE] = LIMIT_S + 300
    with pytest.raises(FreezeOutcomeUnknown, match="qsnapctl domfsthaw vm1") as caught:
        await scene.freeze()
    assert caught.value.effect is Effect.UNKNOWN
    assert scene.owed is not None
    await trio.sleep(300)
    assert scene.fake.frozen == 2
    done = await thaw_owed(scene.vm, scene.store, scene.agent, limit_s=20)
    assert done == "thawed the file systems of the guest, which were frozen for snapshot s1"
    assert scene.is_thawed


@pytest.mark.parametrize("loss", ["mute", "hangs_up"])
async def test_the_answer_to_a_thaw_is_lost(
    scene: Scene, mock_clock: MockClock, loss: str
) -> None:
    getattr(scene.fake, loss).add(THAW)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_speak_again, scene.fake)
        quiesced = await scene.freeze()
        nursery.cancel_scope.cancel()
    assert quiesced.held, "nobody knows, and nothing speaks against it"
    assert scene.fake.done.count(THAW) == 2
    assert scene.job.notes == ()
    assert scene.is_thawed


async def _speak_again(fake: FakeAgent) -> None:
    await trio.sleep(5)
    fake.mute.clear()


async def test_a_thaw_that_cannot_be_had_stays_owed(scene: Scene, mock_clock: MockClock) -> None:
    async with frozen(scene.vm, scene.store, scene.job, agent=scene.agent, limit_s=LIMIT_S):
        scene.fake.deaf = trio.Event()
    [note] = scene.job.notes
    assert "may be frozen still" in note
    assert scene.owed is not None
    with pytest.raises(AgentUnresponsive):
        await thaw_owed(scene.vm, scene.store, scene.agent, limit_s=20)
    assert scene.owed is not None
    scene.fake.deaf.set()
    assert await thaw_owed(scene.vm, scene.store, scene.agent, limit_s=20) is not None
    assert scene.is_thawed
    assert await thaw_owed(scene.vm, scene.store, scene.agent, limit_s=20) is None


async def test_an_agent_that_does_not_thaw(scene: Scene, mock_clock: MockClock) -> None:
    async with frozen(scene.vm, scene.store, scene.job, agent=scene.agent, limit_s=LIMIT_S):
        scene.fake.refuses[THAW] = "not now"
    assert "not now" in scene.job.notes[0]
    assert scene.owed is not None


async def test_somebody_thaws_meanwhile(scene: Scene) -> None:
    async with frozen(
        scene.vm, scene.store, scene.job, agent=scene.agent, limit_s=LIMIT_S
    ) as quiesced:
        scene.fake.frozen = 0
    assert not quiesced.held
    assert "thawed by somebody else" in scene.job.notes[0]
    assert scene.is_thawed


async def test_what_a_killed_job_left_is_thawed_first(scene: Scene) -> None:
    scene.owe()
    await scene.freeze()
    assert scene.fake.done == [THAW, STATUS, STATUS, FREEZE, THAW, STATUS]
    assert scene.is_thawed


async def test_a_thaw_is_owed_to_that_guest_only(scene: Scene) -> None:
    scene.owe(pid=PID + 1)
    assert await thaw_owed(scene.vm, scene.store, scene.agent, limit_s=20) is None
    assert scene.owed is None
    assert scene.fake.done == []


async def test_an_owed_thaw_knows_its_agent(scene: Scene, tmp_path: Path) -> None:
    scene.owe()
    other = GuestAgent(tmp_path / "since configured")
    assert await thaw_owed(scene.vm, scene.store, other, limit_s=20) is not None
    assert scene.is_thawed


async def test_a_record_that_cannot_be_read_is_told_in_words(scene: Scene) -> None:
    (scene.store.directory / OWED_THAW_NAME).write_text("{}")
    with pytest.raises(Exception, match="qsnapctl domfsthaw vm1"):
        await scene.freeze()
    assert scene.fake.done == []
    assert await thaw_by_hand(scene.vm, scene.store, scene.agent) == 0
    assert scene.owed is None
    forget_owed_thaw(scene.store)


async def test_by_hand(scene: Scene) -> None:
    vm, store, agent = scene.vm, scene.store, scene.agent
    assert await freeze_by_hand(vm, store, agent, limit_s=LIMIT_S) == 2
    assert scene.owed is None, "it is the user's to thaw"
    assert scene.fake.frozen == 2
    with pytest.raises(WrongState, match="frozen already"):
        await freeze_by_hand(vm, store, agent, limit_s=LIMIT_S)
    assert await thaw_by_hand(vm, store, agent) == 2
    assert await thaw_by_hand(vm, store, agent) == 0
    assert await freeze_by_hand(vm, store, agent, limit_s=LIMIT_S, mountpoints=["/a"]) == 1
    assert await thaw_by_hand(vm, store, agent) == 1
    assert scene.is_thawed


async def test_by_hand_while_a_job_has_the_agent(scene: Scene) -> None:
    async with frozen(scene.vm, scene.store, scene.job, agent=scene.agent, limit_s=LIMIT_S):
        for attempt in (
            freeze_by_hand(scene.vm, scene.store, scene.agent, limit_s=LIMIT_S),
            thaw_by_hand(scene.vm, scene.store, scene.agent),
            list_filesystems(scene.vm, scene.agent),
        ):
            with pytest.raises(VmBusy, match="in use right now"):
                await attempt
    assert scene.is_thawed


async def test_by_hand_and_the_answer_is_lost(scene: Scene, mock_clock: MockClock) -> None:
    scene.fake.mute.add(FREEZE)
    with pytest.raises(FreezeOutcomeUnknown):
        await freeze_by_hand(scene.vm, scene.store, scene.agent, limit_s=LIMIT_S)
    assert scene.is_thawed


@pytest.mark.parametrize("n", range(1, 60))
async def test_cancelled_at_every_step(scene: Scene, n: int) -> None:
    probe = CancelAt(n)
    trio.lowlevel.add_instrument(probe)
    with probe.scope:
        await scene.freeze()
    trio.lowlevel.remove_instrument(probe)
    assert scene.is_thawed


async def test_a_sweep_that_long_cancels_every_step(scene: Scene) -> None:
    probe = CancelAt(60)
    trio.lowlevel.add_instrument(probe)
    with probe.scope:
        await scene.freeze()
    trio.lowlevel.remove_instrument(probe)
    assert probe.left > 0
