"""A revert that is cancelled or fails before the old QEMU is ended has not happened."""

import itertools

import pytest
import trio

from qsnapd.errors import StoreError
from qsnapd.model.job import JobKind
from qsnapd.model.request import RevertRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.model.state import Condition
from qsnapd.snapshot.restoring.preflight import Preflight
from qsnapd.snapshot.restoring.revert import KEPT, Revert
from qsnapd.snapshot.restoring.switch import Switch
from qsnapd.snapshot.taking.room import Room
from qsnapd.snapshot.taking.saves import Saves
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.launch import NOBODY
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.spawn import Spawn
from tests.faults.inline import run_program_here
from tests.faults.scene import VM, Case, Scene, not_as_before, open_scene, qemu_img
from tests.faults.sweeps import CancelAt, sweep

CASE = Case("10.0.2", Strategy.BACKGROUND, disks=2)


class OneVm:
    """The VM's seat, as far as a revert needs it before it ends the old QEMU."""

    name = VM
    starting: Condition | None = None

    def __init__(self, scene: Scene) -> None:
        self.qmp = scene.folder / "qmp"
        self.store = scene.store
        self.tracker = scene.vm.tracker
        self.launcher: Launcher = Spawn()
        self.parent = NOBODY
        self.room = Room(scene.store)
        self.saves = Saves()
        self.attached: AttachedVm | None = scene.vm

    async def wait_attached(self) -> AttachedVm:
        raise AssertionError("no new QEMU is started here")

    async def wait_detached(self) -> None:
        raise AssertionError("the old QEMU is not ended here")

    def while_attached(self, work: object) -> None:
        raise AssertionError("nothing is attached here")


class Switched(Exception):
    """The revert has come to its point of no return."""


async def switch_nothing(*_arguments: object) -> None:
    await trio.lowlevel.checkpoint()
    raise Switched


async def see_nothing_wrong(*_manifest: object, **_options: object) -> Preflight:
    """In place of the preflight, which starts a QEMU to ask it."""
    await trio.lowlevel.checkpoint()
    return Preflight((), (), None)


@pytest.fixture(autouse=True)
def no_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsnapd.snapshot.restoring.revert.preflight", see_nothing_wrong)


async def reverted(scene: Scene, *, discard: bool = True) -> bool:
    """Revert; returns whether it came to the point of no return."""
    revert = Revert(OneVm(scene), scene.new_job(JobKind.REVERT), qemu_img=qemu_img())
    try:
        await revert.run(RevertRequest(name="s1", discard=discard))
    except Switched:
        return True
    return False


async def prepare(scene: Scene) -> None:
    """Have a snapshot to go back to; what is there now must be there afterwards."""
    await scene.take_one()
    scene.before = scene.look()


def test_cancelled_at_any_step_before_the_old_qemu_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Switch, "run", switch_nothing)

    async def attempt(scene: Scene, n: int) -> tuple[list[str], bool]:
        await prepare(scene)
        probe, switched = CancelAt(n), False
        trio.lowlevel.add_instrument(probe)
        with probe.scope:
            switched = await reverted(scene)
        trio.lowlevel.remove_instrument(probe)
        if switched:  # uncancelled, or cancelled too late
            return [], probe.left <= 0
        return not_as_before(scene.before, scene.look()), True

    assert sweep(CASE, attempt) == []


def test_cancelled_at_any_step_while_the_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest runs on as before, whether its state was kept already or not."""
    monkeypatch.setattr(Switch, "run", switch_nothing)

    async def attempt(scene: Scene, n: int) -> tuple[list[str], bool]:
        await prepare(scene)
        probe, switched = CancelAt(n), False
        trio.lowlevel.add_instrument(probe)
        with probe.scope:
            switched = await reverted(scene, discard=False)
        trio.lowlevel.remove_instrument(probe)
        kept = [name for name in scene.store.snapshots() if name.startswith(KEPT)]
        if switched:
            held = [] if not scene.qemu.running and kept else ["the state is not held"]
            return held, probe.left <= 0
        return not_as_before(scene.before, scene.look()), True

    assert sweep(CASE, attempt) == []


def left_by_revert(scene: Scene) -> list[str]:
    """What is wrong after a revert that kept the state and went no further."""
    found = [] if scene.qemu.running else [f"the guest stands still: {scene.qemu.status}"]
    if scene.store.restoring.read() or scene.store.journal.read():
        found.append("a journal still has an entry")
    after_s1 = {name for name in scene.look().files - scene.before.files if ".after-s1" in name}
    return found + [f"left over: {name}" for name in after_s1]


@pytest.mark.parametrize("kept", [True, False])
async def test_the_daemon_dies_before_the_old_qemu_is_ended(
    kept: bool, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """The guest stands, held for its end; the next daemon lets it go."""
    monkeypatch.setattr(Switch, "run", switch_nothing)
    async with open_scene(CASE) as scene:
        await prepare(scene)
        assert await reverted(scene, discard=not kept)
        assert scene.qemu.running is not kept
        await scene.attach()
        await scene.recover()
        assert left_by_revert(scene) == []
        names = [name for name in scene.store.snapshots() if name.startswith(KEPT)]
        assert len(names) == kept


@pytest.mark.parametrize("nth", [1, 2])
async def test_an_overlay_that_cannot_be_made(
    nth: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    calls = itertools.count(1)

    async def run(command: list[str], *, pass_fds: tuple[int, ...], **_options: object) -> object:
        words = [command[0], "no-such-command"] if next(calls) == nth else command
        return await run_program_here(words, pass_fds=pass_fds)

    async with open_scene(CASE) as scene:
        await prepare(scene)
        monkeypatch.setattr(trio, "run_process", run)
        with pytest.raises(StoreError, match="qemu-img could not create"):
            await reverted(scene)
        assert not_as_before(scene.before, scene.look()) == []


async def test_the_daemon_dies_with_everything_prepared(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(Switch, "run", switch_nothing)
    async with open_scene(CASE) as scene:
        await prepare(scene)
        assert await reverted(scene)
        entry = scene.store.restoring.read()
        assert entry is not None
        assert len(entry.made) == CASE.disks
        assert not_as_before(scene.before, scene.look()) != []
        await scene.attach()
        assert "the VM goes on as before" in str(await scene.recover())
        assert not_as_before(scene.before, scene.look()) == []
