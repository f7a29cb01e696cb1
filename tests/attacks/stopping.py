"""A guest that QEMU stops in the midst of a job, because the disk below its overlay is full."""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import QsnapError
from qsnapd.faults import Action, Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import Forge, Forged
from tests.attacks.lane import Lane, open_lane, outcome, require_as_before
from tests.attacks.media import MIB, Kind, Medium, open_medium
from tests.attacks.misbehaving import stands
from tests.attacks.planted import spelled
from tests.parts import Qemu
from tests.real.cases import VM

SIZE_BYTES = 512 * MIB


@dataclass(frozen=True)
class IoError:
    """The guest stands still by its own doing, until its user has made room."""

    strategy: Strategy | None
    """None: of the disks alone."""

    def __str__(self) -> str:
        return f"I/O error, {self.strategy or 'disk-only'}"

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        assert lane.overlays is not None, "its overlays may lie on a file system of their own"
        medium, name = lane.overlays, lane.new_name("s")
        async with lane.daemon(spelled([(Point.CAPTURE_PIVOTED, Action.STOP)])) as daemon:
            await lane.settled(daemon)
            before = await lane.look()
            overlay = {"target": "vda", "file": str(medium.path / f"{name}.qcow2")}
            kind = {"strategy": self.strategy} if self.strategy else {"disk_only": True}
            job = partial(lane.create, daemon, name, disks=[overlay], **kind)
            error = await self._filled(medium, job, daemon)
            await lane.settled(daemon, state="paused")
            vm = (await daemon.call("GetVm", vm=VM))["vm"]
            assert vm["reason"] == "I/O error", vm
            medium.clear()
            await daemon.call("Resume", vm=VM)
            await lane.settled(daemon)
            if error is not None:
                require_as_before(before, await lane.look(), error)
            await lane.guest_is_well(since=len(lane.vm.log_lines()))
            assert (name in await lane.listed(daemon)) is (error is None), error
            if error is None and self.strategy is not None:
                await lane.restores(daemon, name)
            await lane.goes_on(daemon, self.strategy or Strategy.STOPPED)
            await daemon.end()

    async def _filled(
        self, medium: Medium, job: Callable[[], Awaitable[object]], daemon: Forged
    ) -> QsnapError | None:
        error: QsnapError | None = None

        async def do() -> None:
            nonlocal error
            error = await outcome(job)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(do)
            await stands(daemon)
            medium.fill(leaving_bytes=0)
            daemon.signal(signal.SIGCONT)
        return error


def io_errors() -> list[IoError]:
    return [IoError(strategy) for strategy in (*Strategy, None)]


@asynccontextmanager
async def open_filling_lane(forge: Forge, qemu: Qemu, folder: Path) -> AsyncIterator[Lane]:
    """A lane with room for overlays elsewhere, that can be used up."""
    async with (
        open_medium(Kind.EXT4, folder, SIZE_BYTES) as medium,
        open_lane(forge, qemu, folder) as lane,
    ):
        lane.overlays = medium
        yield lane
