"""Taking snapshots, and failing to."""

from functools import partial
from typing import Any
from unittest import mock

from qsnapd.errors import StoreError
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.qmp.block import BlockCommit, BlockdevDel
from qsnapd.qmp.commands import Command
from tests.crashes.promises import Outcome
from tests.crashes.scene import Scene
from tests.crashes.work import Work, take
from tests.real.cases import VM

WORDS = "the test fails here"


async def _has_one(scene: Scene) -> None:
    await scene.write(1, 0, blocks=8)
    await take(scene, "a")
    await scene.write(2, 1)


def _taken(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus("s", current="s"),)


def _taking(**more: object) -> Work:
    async def act(scene: Scene) -> None:
        await take(scene, "s", **more)

    return Work(act, _taken, _has_one)


async def _with_memory_elsewhere(scene: Scene) -> None:
    await take(scene, "s", strategy=Strategy.STOPPED, memory_file=str(scene.folder / "memory.s"))


# --- without metadata ----------------------------------------------------------------------------


async def _nothing_yet(scene: Scene) -> None:
    await scene.write(1, 0, blocks=8)
    scene.marks = {
        "memory": scene.folder / "memory.s",
        "vda moved": scene.vm.folder / "disk0.after-s.qcow2",
        "sda moved": scene.vm.folder / "disk1.after-s.qcow2",
    }


def _moved(now: Outcome) -> tuple[Outcome, ...]:
    return (now.plus(current=None, marks=("memory", "vda moved", "sda moved")),)


async def _without_metadata(scene: Scene) -> None:
    memory = str(scene.folder / "memory.s")
    await take(scene, "s", strategy=Strategy.STOPPED, keep_metadata=False, memory_file=memory)


# --- undone --------------------------------------------------------------------------------------


async def _write_on(scene: Scene, command: Command[Any]) -> None:
    """Let the guest write when its disks are about to be merged back, and when they are back."""
    if isinstance(command, BlockCommit):
        await scene.write(23, 3)
    elif isinstance(command, BlockdevDel):
        await scene.write(24, 4)


async def _fail(scene: Scene, **more: object) -> None:
    """Fail when the disks have moved."""
    request = CreateRequest.model_validate({"name": "s", **more})

    def fail(*_: object) -> None:
        raise StoreError(WORDS)

    with mock.patch("qsnapd.snapshot.taking.create.describe", fail):
        try:
            await scene.rig.create(VM, request)
        except StoreError as exc:
            if WORDS not in str(exc):
                raise


async def _fail_with_memory_elsewhere(scene: Scene) -> None:
    await _fail(scene, strategy=Strategy.STOPPED, memory_file=str(scene.folder / "memory.s"))


WORKS = {
    "disk-only": _taking(disk_only=True),
    "stopped mapped-ram": _taking(
        strategy=Strategy.STOPPED, image_format=ImageFormat.MAPPED_RAM
    ),
    "stopped stream": _taking(strategy=Strategy.STOPPED, image_format=ImageFormat.STREAM),
    "background": _taking(strategy=Strategy.BACKGROUND),
    "precopy": _taking(strategy=Strategy.PRECOPY),
    "memory elsewhere": Work(_with_memory_elsewhere, _taken, _has_one),
    "without metadata": Work(_without_metadata, _moved, _nothing_yet),
    "disk-only, undone": Work(
        partial(_fail, disk_only=True), prepare=_has_one, meanwhile=_write_on
    ),
    "checkpoint, undone": Work(
        _fail_with_memory_elsewhere, prepare=_has_one, meanwhile=_write_on
    ),
}
