"""Faults at every point that cloning passes."""

from dataclasses import dataclass
from functools import partial

import trio

from qsnapd.faults import Point
from qsnapd.model.snapshot import Strategy
from tests.attacks.forge import Forged
from tests.attacks.lane import LOOK_AGAIN_S, SETTLE_LIMIT_S, Lane, outcome
from tests.attacks.planted import Planted, died, each, spelled
from tests.harness import Vm
from tests.real.cases import VM

SOURCE = "source"
CLONE = "clone"
_STAYS = (f"serial.{CLONE}", ".leases.json")
"""What the clone has said, and the record of who runs on what."""
_POINTS = (
    Point.CLONE_PLANNED,
    Point.CLONE_FILES_MADE,
    Point.REVERT_STARTED,
    Point.REVERT_LOADED,
    Point.CLONE_LOADED,
    Point.CLONE_REGISTERED,
    Point.CLONE_RUNS,
    Point.CLONED,
)


@dataclass(frozen=True)
class Cloning(Planted):
    """One clone that goes wrong."""

    async def attack(self, lane: Lane) -> None:
        """Do it once. Raises: AssertionError: what is wrong afterwards."""
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            if SOURCE not in await lane.listed(daemon):
                await lane.create(daemon, SOURCE, strategy=self.strategy)
            await daemon.end()
        clone = _clone_of(lane.vm)
        try:
            await self._attack(lane, clone)
        finally:
            with trio.move_on_after(SETTLE_LIMIT_S, shield=True):
                await clone.kill()

    async def _attack(self, lane: Lane, clone: Vm) -> None:
        async with lane.daemon(spelled(self.faults.first)) as daemon:
            await lane.settled(daemon)
            before = await lane.look()
            request = {"name": SOURCE, "clone": CLONE, "memory": "eager"}
            make = partial(daemon.call, "CloneSnapshot", vm=VM, request=request)
            error = await outcome(make)
            if self.faults.kills:
                await died(daemon)
            else:
                await daemon.end()
        await self.faults.strike_later(lane)
        async with lane.daemon() as daemon:
            await lane.settled(daemon)
            if await _exists(daemon):
                await _settled(daemon)
                assert len(clone.pids()) == 1
                await clone.kill()
                await _forget(daemon)
            else:
                assert error is not None, "reported as cloned, and is not there"
                assert clone.pids() == []
            now = await lane.look()
            made = {path for path in now.files - before.files if path.name not in _STAYS}
            assert not made, f"left over: {made}"
            await lane.guest_is_well(since=len(lane.vm.log_lines()))
            await lane.tidy(daemon)
            await daemon.end()


def cloning(strategy: Strategy) -> list[Cloning]:
    return [Cloning(strategy, faults) for faults in each(_POINTS)]


def _clone_of(vm: Vm) -> Vm:
    clone = Vm(vm.folder, vm.guest, vm.argv, vm.disks)
    clone.qmp = vm.folder / f"qmp.{CLONE}"
    return clone


async def _exists(daemon: Forged) -> bool:
    vms = (await daemon.call("ListVms"))["vms"]
    return CLONE in [vm["name"] for vm in vms]


async def _settled(daemon: Forged) -> None:
    with trio.fail_after(SETTLE_LIMIT_S):
        while (await daemon.call("GetVm", vm=CLONE))["vm"]["state"] != "running":  # noqa: ASYNC110
            await trio.sleep(LOOK_AGAIN_S)


async def _forget(daemon: Forged) -> None:
    with trio.fail_after(SETTLE_LIMIT_S):
        while (await daemon.call("GetVm", vm=CLONE))["vm"]["connected"]:  # noqa: ASYNC110
            await trio.sleep(LOOK_AGAIN_S)
    await daemon.call("UndefineVm", vm=CLONE, remove_storage=True)
