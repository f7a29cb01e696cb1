"""Snapshots that leave for another host, or come from one."""

from functools import partial
from pathlib import Path

from qsnapd.model.snapshot import Strategy
from qsnapd.model.transfer import ExportRequest, ImportRequest, TransferProgress
from tests.crashes.promises import Outcome
from tests.crashes.scene import Scene
from tests.crashes.work import Work, take
from tests.real.cases import VM

EXPORTED = ("export", "export/*")


def _tell(progress: TransferProgress) -> None:
    """Nobody wants to know how far it is."""


async def _has_two(scene: Scene) -> None:
    await scene.write(1, 0, blocks=8)
    await take(scene, "a")
    await scene.write(2, 1)
    await take(scene, "b", strategy=Strategy.STOPPED)


def _folder(scene: Scene) -> Path:
    return scene.folder / "export"


async def _export(scene: Scene, *, chained: bool) -> None:
    request = ExportRequest(name="b", directory=str(_folder(scene)), chained=chained)
    await scene.rig.host.export(VM, request, None, _tell)


async def _may_be_exported(scene: Scene) -> None:
    await _has_two(scene)
    scene.marks["export"] = _folder(scene) / "export.json"
    scene.tolerated += EXPORTED  # without its last file it is none, and who asked removes it


def _exported(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus(current="b", marks=("export",)),)


async def _has_export(scene: Scene, *, chained: bool) -> None:
    await _has_two(scene)
    await _export(scene, chained=chained)
    (scene.folder / "disks of others").mkdir(mode=0o700)
    scene.tolerated += (*EXPORTED, "disks of others", ".disks", "i/.import.json")


def _imported(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus("i", current="b"),)


async def _import(scene: Scene, *, elsewhere: bool) -> None:
    disks = str(scene.folder / "disks of others") if elsewhere else None
    request = ImportRequest(directory=str(_folder(scene)), name="i", disk_directory=disks)
    await scene.rig.host.take_in(VM, request, None, _tell)


WORKS = {
    "export": Work(partial(_export, chained=True), _exported, _may_be_exported),
    "import": Work(
        partial(_import, elsewhere=False), _imported, partial(_has_export, chained=False)
    ),
    "import elsewhere": Work(
        partial(_import, elsewhere=True), _imported, partial(_has_export, chained=True)
    ),
}
