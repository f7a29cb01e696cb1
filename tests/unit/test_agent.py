"""The client of a guest agent: whatever the guest sends, there is an answer or an error in time."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qsnapd.errors import (
    AgentAbsent,
    AgentRefused,
    AgentSilent,
    AgentUnresponsive,
    Effect,
    VmBusy,
)
from qsnapd.qmp import agent_commands
from qsnapd.qmp.agent import LINE_LIMIT_BYTES, AgentSession, GuestAgent
from qsnapd.qmp.chardev import ChardevInfo
from qsnapd.qmp.words import in_words
from tests.unit.fake_agent import FREEZE, STATUS, SYNC, THAW, FakeAgent, open_agent

FSINFO = "guest-get-fsinfo"


@pytest.fixture
async def fake(tmp_path: Path, mock_clock: MockClock) -> AsyncIterator[FakeAgent]:
    mock_clock.autojump_threshold = 0.1  # no time passes but what is waited out
    async with open_agent(tmp_path / "agent") as agent:
        yield agent


@pytest.fixture
async def session(fake: FakeAgent) -> AsyncIterator[AgentSession]:
    session = await GuestAgent(fake.path).connect()
    yield session
    session.close()


async def test_asks_and_is_answered(fake: FakeAgent, session: AgentSession) -> None:
    assert not await agent_commands.is_frozen(session)
    assert await agent_commands.freeze(session, limit_s=5) == 2
    assert await agent_commands.is_frozen(session)
    assert await agent_commands.thaw(session) == 2
    assert await agent_commands.thaw(session) == 0
    assert await agent_commands.freeze(session, limit_s=5, mountpoints=["/a"]) == 1


async def test_what_was_left_over_is_not_taken_for_an_answer(fake: FakeAgent) -> None:
    fake.stale = b'{"return": 7}\n\xff{"return": 12345}\n{"error": {"desc": "late"}}\nhalf a li'
    session = await GuestAgent(fake.path).connect()
    assert not await agent_commands.is_frozen(session)
    session.close()


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(AgentAbsent, match="No such file"):
        await GuestAgent(tmp_path / "agent").connect()


async def test_does_not_answer_the_sync(fake: FakeAgent, mock_clock: MockClock) -> None:
    fake.mute.add(SYNC)
    with pytest.raises(AgentUnresponsive, match="nothing was asked of the guest") as caught:
        await GuestAgent(fake.path).connect()
    assert caught.value.effect is Effect.NONE
    assert fake.done == []


async def test_another_client_is_connected(
    fake: FakeAgent, session: AgentSession, mock_clock: MockClock
) -> None:
    agent = GuestAgent(fake.path)
    with pytest.raises(AgentUnresponsive, match="one client at a time"):
        await agent.connect()


async def test_the_queue_of_clients_is_full(fake: FakeAgent, session: AgentSession) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(2):  # what the queue of a listen(1) holds
            stream = await trio.open_unix_socket(str(fake.path))
            nursery.start_soon(_hold, stream)
        with pytest.raises(AgentUnresponsive, match="queue of clients"):
            await GuestAgent(fake.path).connect()
        nursery.cancel_scope.cancel()


async def _hold(stream: trio.SocketStream) -> None:
    async with stream:
        await trio.sleep_forever()


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(b"x" * (LINE_LIMIT_BYTES + 70000), id="one line without end"),
        pytest.param(b'{"return": 1}\n' * 700000, id="lines without end"),
    ],
)
async def test_a_flood_instead_of_the_sync(fake: FakeAgent, flood: bytes) -> None:
    fake.stale = flood
    with pytest.raises(AgentUnresponsive, match=r"a line of more than|a great deal"):
        await GuestAgent(fake.path).connect()


async def test_the_agent_says_no(fake: FakeAgent, session: AgentSession) -> None:
    fake.refuses[FREEZE] = "disabled \x1b[31mby\nits owner" + "!" * 1000
    with pytest.raises(AgentRefused, match="disabled") as caught:
        await agent_commands.freeze(session, limit_s=5)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not await agent_commands.is_frozen(session), "the conversation goes on"


async def test_no_answer_in_time(
    fake: FakeAgent, session: AgentSession, mock_clock: MockClock
) -> None:
    fake.mute.add(FREEZE)
    with pytest.raises(AgentSilent, match="within 5 s") as caught:
        await agent_commands.freeze(session, limit_s=5)
    assert caught.value.effect is Effect.UNKNOWN
    with pytest.raises(AgentSilent, match="was not sent"):
        await agent_commands.is_frozen(session)
    assert fake.done == [FREEZE], "what comes late would be taken for the next one's answer"


@pytest.mark.parametrize(
    "nonsense",
    [
        b'{"return": "two"}\n',
        b'{"return": -1}\n',
        b'{"return": true}\n',
        b'{"return": 1e400}\n',
        b'{"return": ' + b"9" * 5000 + b"}\n",
        b'{"error": "no"}\n',
        b'{"error": {"desc": 5}}\n',
        b"[]\n",
        b"\xff\xfe\n",
        b"[" * 100000 + b"\n",
        b'{"return": ' * 50000 + b"\n",
        b"z" * (LINE_LIMIT_BYTES + 70000),
    ],
    ids=lambda nonsense: repr(nonsense[:20]),
)
async def test_answers_nonsense(fake: FakeAgent, session: AgentSession, nonsense: bytes) -> None:
    fake.says[FREEZE] = nonsense
    with pytest.raises(AgentSilent, match="nonsense") as caught:
        await agent_commands.freeze(session, limit_s=5)
    assert caught.value.effect is Effect.UNKNOWN


async def test_goes_away(fake: FakeAgent, session: AgentSession) -> None:
    fake.hangs_up.add(FREEZE)
    with pytest.raises(AgentSilent, match="closed"):
        await agent_commands.freeze(session, limit_s=5)


async def test_a_cancelled_command_ends_the_conversation(
    fake: FakeAgent, session: AgentSession, mock_clock: MockClock
) -> None:
    fake.mute.add(STATUS)
    with trio.move_on_after(1) as scope:
        await agent_commands.is_frozen(session)
    assert scope.cancelled_caught
    with pytest.raises(AgentSilent, match="was not sent"):
        await agent_commands.is_frozen(session)


async def test_thaw_of_what_is_not_frozen_may_be_refused(
    fake: FakeAgent, session: AgentSession
) -> None:
    fake.refuses[THAW] = "not frozen"
    assert await agent_commands.thaw(session) == 0
    fake.frozen = 1
    with pytest.raises(AgentRefused, match="not frozen"):
        await agent_commands.thaw(session)


async def test_file_systems_are_read(fake: FakeAgent, session: AgentSession) -> None:
    fake.says[FSINFO] = (
        b'{"return": [{"name": "vda1", "mountpoint": "/\\u001b[2J", "type": "ext4", "new": {}, '
        b'"disk": [{"dev": "/dev/vda1", "bus": 0}, {}], "total-bytes": 10, "used-bytes": 5}]}\n'
    )
    [found] = await agent_commands.read_filesystems(session)
    assert (found.mountpoint, found.devices, found.total_bytes) == ("/?[2J", ("/dev/vda1",), 10)


async def test_one_user_at_a_time(fake: FakeAgent, mock_clock: MockClock) -> None:
    agent = GuestAgent(fake.path)
    taken = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_keep, agent, taken)
        await taken.wait()
        assert agent.is_in_use
        with pytest.raises(VmBusy, match="in use"):
            async with agent.alone():
                pytest.fail("it is somebody else's")
        nursery.cancel_scope.cancel()
    assert not agent.is_in_use


async def _keep(agent: GuestAgent, taken: trio.Event) -> None:
    async with agent.alone():
        taken.set()
        await trio.sleep_forever()


def test_texts_of_the_guest_are_harmless() -> None:
    assert in_words("plain") == "plain"
    assert in_words("a\r\n\x1b]0;x\x07\u202eb\x00") == "a???]0;x??b?"
    assert in_words("y" * 1000) == "y" * 300 + "..."


@pytest.mark.parametrize(
    ("filename", "taken"),
    [
        ("disconnected:unix:/run/a,server=on", False),
        ("unix:/run/a,server=on", True),
        ("unix:/run/a", True),
    ],
)
def test_qemu_tells_who_is_connected(filename: str, *, taken: bool) -> None:
    chardev = ChardevInfo(label="a", filename=filename, frontend_open=True)
    assert chardev.is_at(Path("/run/a"))
    assert not chardev.is_at(Path("/run/b"))
    assert chardev.is_taken is taken
