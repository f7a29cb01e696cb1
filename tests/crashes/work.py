"""A job on a VM, as far as it must be known to lose power in it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qsnapd.model.request import CreateRequest
from qsnapd.qmp.commands import Command
from tests.crashes.promises import Outcome
from tests.crashes.scene import Scene
from tests.real.cases import VM

Hook = Callable[[Scene, Command[Any]], Awaitable[None]]


async def _nothing(scene: Scene) -> None:
    pass


def _as_learnt(scene: Scene, before: Outcome) -> None:
    pass


@dataclass(frozen=True)
class Work:
    """What comes before it, itself, and what may come of it."""

    act: Callable[[Scene], Awaitable[None]]
    ends: Callable[[Outcome], tuple[Outcome, ...]] = lambda now: (now,)
    """Beside that nothing has come of it: what may be there, once all is mended."""
    prepare: Callable[[Scene], Awaitable[None]] = _nothing
    settle: Callable[[Scene, Outcome], None] = _as_learnt
    """Tell the scene where the disks are then, if that is not where they are found afterwards."""
    goes_on: bool = True
    """Whether the guest, if there is one afterwards, is the one from before."""
    meanwhile: Hook | None = None
    """Hears of each command that qsnapd is about to send to QEMU."""


async def record(scene: Scene, work: Work) -> None:
    """Do it, and record it; the guest writes before and after, if there is one."""
    await work.prepare(scene)

    async def before(command: Command[Any]) -> None:
        if work.meanwhile is not None:
            await work.meanwhile(scene, command)

    async with scene.recorded(before):
        if scene.runs:
            await scene.write(30, 12, flush=False)
        now = scene.outcome()
        scene.expect(now, *work.ends(now), words="it is asked for")
        await work.act(scene)
        scene.done()
        if scene.runs and work.goes_on:
            await scene.write(31, 13)
    work.settle(scene, now)


async def take(scene: Scene, name: str, **more: object) -> None:
    """Take a snapshot, by default of the disks alone."""
    kind = more or {"disk_only": True}
    await scene.rig.create(VM, CreateRequest.model_validate({"name": name, **kind}))
