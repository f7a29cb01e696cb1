"""Changes of what is kept of snapshots: names, words, which is the current one."""

from qsnapd.model.snapshot import Strategy
from tests.crashes.deleting import KEPT_RECORDS, delete
from tests.crashes.promises import Outcome
from tests.crashes.scene import Scene
from tests.crashes.work import Work, take
from tests.real.cases import VM


async def _has_two(scene: Scene) -> None:
    """The current one has memory, and is the parent of the other."""
    await scene.write(1, 0, blocks=8)
    await take(scene, "a", strategy=Strategy.STOPPED)
    await take(scene, "b")
    await scene.rig.host.set_current(VM, "a")


def _renamed(now: Outcome) -> tuple[Outcome, ...]:
    return (now.minus("a", current="z").plus("z", current="z"),)


async def _rename(scene: Scene) -> None:
    await scene.rig.host.rename_snapshot(VM, "a", "z")
    assert scene.rig.host.snapshot(VM, "b").parent == "z"


def _copied(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus("z", current="a"),)


async def _copy(scene: Scene) -> None:
    await scene.rig.host.copy_snapshot(VM, "a", "z")


async def _edit(scene: Scene) -> None:
    old = scene.rig.host.snapshot(VM, "a")
    new = old.model_copy(update={"description": "x" * 9000})
    await scene.rig.host.redefine(VM, new.model_dump_json(), current=False)


def _goes_on_from_b(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus(current="b"),)


async def _set_current(scene: Scene) -> None:
    await scene.rig.host.set_current(VM, "b")


async def _has_forgotten_one(scene: Scene) -> None:
    await scene.write(1, 0, blocks=8)
    await take(scene, "a")
    await take(scene, "b", strategy=Strategy.STOPPED)
    await scene.learn()
    await delete(scene, "b", metadata_only=True)
    scene.tolerated += (*KEPT_RECORDS, "*.after-a.qcow2", "*.after-b.qcow2")


def _there_again(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus("b", current="a"),)


async def _take_in_again(scene: Scene) -> None:
    old = scene.manifests["b"]
    await scene.rig.host.redefine(VM, old.model_dump_json(), current=False)


WORKS = {
    "rename": Work(_rename, _renamed, _has_two),
    "copy": Work(_copy, _copied, _has_two),
    "edit": Work(_edit, prepare=_has_two),
    "set current": Work(_set_current, _goes_on_from_b, _has_two),
    "define again": Work(_take_in_again, _there_again, _has_forgotten_one),
}
