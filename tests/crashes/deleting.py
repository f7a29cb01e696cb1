"""Deleting snapshots: the first, the middle and the current one of three."""

from collections.abc import Callable
from functools import partial

from qsnapd.model.request import DeleteRequest
from tests.crashes.promises import Outcome
from tests.crashes.scene import Scene
from tests.crashes.work import Work, take
from tests.real.cases import VM

KEPT_RECORDS = (".forgotten", ".forgotten/b-*", ".forgotten/b-*/*")
"""What is left of b when its record alone is deleted."""


async def _has_three(scene: Scene) -> None:
    await scene.write(1, 0, blocks=8)
    for number, name in enumerate("abc"):
        await take(scene, name)
        await scene.write(2 + number, number, blocks=2)


async def _has_three_and_is_shut_off(scene: Scene) -> None:
    await _has_three(scene)
    await scene.shut_off()


async def delete(scene: Scene, name: str, *, metadata_only: bool = False) -> None:
    request = DeleteRequest(name=name, metadata_only=metadata_only)
    await (await scene.rig.host.delete(VM, request)).wait()


def _gone(name: str, current: str) -> Callable[[Outcome], tuple[Outcome, ...]]:
    return lambda now: (now.minus(name, current=current),)


def _under_one_name_or_the_other(scene: Scene, before: Outcome) -> None:
    """Merged live, the newest data goes into the image below; offline that comes into it."""
    gone = scene.outcome()
    pairs = zip(scene.heads[before], scene.heads.get(gone, ((), ())), strict=True)
    scene.heads[gone] = tuple((*first, *second) for first, second in pairs)


def _deleting(name: str, current: str) -> Work:
    act, ends = partial(delete, name=name), _gone(name, current)
    return Work(act, ends, _has_three, _under_one_name_or_the_other)


def _deleting_offline(name: str, current: str) -> Work:
    act, ends = partial(delete, name=name), _gone(name, current)
    return Work(act, ends, _has_three_and_is_shut_off, _under_one_name_or_the_other)


async def _may_be_forgotten(scene: Scene) -> None:
    await _has_three(scene)
    scene.tolerated += KEPT_RECORDS


WORKS = {
    "delete the first": _deleting("a", "c"),
    "delete the middle one": _deleting("b", "c"),
    "delete the current one": _deleting("c", "b"),
    "delete the first offline": _deleting_offline("a", "c"),
    "delete the middle one offline": _deleting_offline("b", "c"),
    "delete the current one offline": _deleting_offline("c", "b"),
    "forget": Work(
        partial(delete, name="b", metadata_only=True), _gone("b", "c"), _may_be_forgotten
    ),
}
