"""Putting a VM back to a snapshot, and making another one of it."""

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest import mock

import trio

from qsnapd.errors import SessionLost, VmError, WrongState
from qsnapd.model.plan import RevertPlan
from qsnapd.model.request import CloneRequest, Memory, RevertRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.commands import Quit
from qsnapd.snapshot.restoring.revert import Revert
from qsnapd.store.registry import read_registration
from qsnapd.vm.process import wait_gone
from tests.crashes.promises import Outcome
from tests.crashes.scene import QUIT_LIMIT_S, NoQemu, Scene
from tests.crashes.work import Work, take
from tests.real.cases import VM

KEPT = "before-a-token"
CLONE = "web2"


async def _has_one(scene: Scene, **kind: object) -> None:
    await scene.write(1, 0, blocks=8)
    await take(scene, "a", **kind)
    await scene.write(2, 1)


async def _will_be_left_off(scene: Scene) -> None:
    await _has_one(scene)
    scene.marks["to be started"] = scene.state_dir / VM / ".next-start.json"


def _left_off(now: Outcome) -> tuple[Outcome, ...]:
    """Its state may be kept, and the VM go on; else it is to start from the snapshot."""
    kept = now.plus(KEPT, current=KEPT)
    return kept, now.plus(KEPT, current="a", marks=("to be started",))


def _put_back(now: Outcome) -> tuple[Outcome, ...]:
    return now.plus(KEPT, current=KEPT), now.plus(KEPT, current="a")


async def _revert(scene: Scene, memory: Memory | None = None) -> None:
    await scene.rig.revert(VM, RevertRequest(name="a", memory=memory))


def _on_which_disks(scene: Scene, before: Outcome) -> None:
    after = scene.outcome()
    [kept] = [m for m in scene.manifests.values() if m.name != "a"]
    overlays = [disk.overlay for disk in kept.disks]
    scene.heads[before.plus(KEPT, current=KEPT)] = tuple((Path(o),) for o in overlays if o)
    scene.shows[after] = scene.shown["a"]
    entry = scene.store.next_start.read()
    if entry is not None:
        assert isinstance(entry.plan, RevertPlan)
        scene.heads[after] = tuple((Path(overlay.path),) for overlay in entry.plan.overlays)


async def _turn_back(scene: Scene) -> None:
    """Give up when the state is kept already; that is taken back then."""

    async def fail(*_: object) -> NoReturn:
        await scene.learn()
        raise WrongState("the test turns back here")

    with mock.patch.object(Revert, "_commit_to_it", fail), suppress(WrongState):
        await _revert(scene)


def _kept_at_most(now: Outcome) -> tuple[Outcome, ...]:
    return now, now.plus(KEPT, current=KEPT)


def _may_be_cloned(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus(current="a", marks=("clone",)),)


async def _will_be_cloned(scene: Scene) -> None:
    await _has_one(scene, strategy=Strategy.STOPPED)
    place = scene.state_dir / CLONE
    scene.marks["clone"] = place / ".vm.json"
    scene.tolerated.append(f"state/{CLONE}")


async def _clone(scene: Scene) -> None:
    await scene.rig.clone(VM, CloneRequest(name="a", clone=CLONE))


async def _clone_in_vain(scene: Scene) -> None:
    with mock.patch("tests.rig.Spawn", NoQemu), suppress(VmError):
        await _clone(scene)


def _disks_of_clone(scene: Scene, before: Outcome) -> None:
    scene.needs["clone"] = _overlays_of_clone(scene)


def _overlays_of_clone(scene: Scene) -> list[Path]:
    registration = read_registration(scene.rig.supervisors[CLONE].store)
    assert registration is not None
    return [Path(file.path) for file in registration.overlays]


async def _has_clone(scene: Scene) -> None:
    await _will_be_cloned(scene)
    await _clone(scene)
    clone = scene.rig.supervisors[CLONE]
    running = clone.require_attached()
    with suppress(SessionLost):  # it may end first
        await running.session.execute(Quit())
    with trio.fail_after(QUIT_LIMIT_S):
        await clone.wait_detached()
        await wait_gone(running.identity)
    scene.goes_with["clone"] = _overlays_of_clone(scene)


def _undefined(now: Outcome) -> tuple[Outcome, ...]:
    return (Outcome(now.names, now.current),)


async def _undefine(scene: Scene) -> None:
    await scene.rig.host.undefine(CLONE, remove_storage=True)


WORKS = {
    "revert to disks": Work(_revert, _left_off, _will_be_left_off, _on_which_disks),
    "revert to memory": Work(
        partial(_revert, memory=Memory.EAGER),
        _put_back,
        partial(_has_one, strategy=Strategy.STOPPED),
        _on_which_disks,
        goes_on=False,
    ),
    "revert lazily": Work(
        partial(_revert, memory=Memory.LAZY),
        _put_back,
        partial(_has_one, strategy=Strategy.STOPPED),
        _on_which_disks,
        goes_on=False,
    ),
    "revert, taken back": Work(_turn_back, _kept_at_most, _has_one),
    "clone": Work(_clone, _may_be_cloned, _will_be_cloned, _disks_of_clone),
    "clone, in vain": Work(_clone_in_vain, prepare=_will_be_cloned),
    "undefine": Work(_undefine, _undefined, _has_clone),
}
