"""qsnapd's own host around real VMs, in the test's process: everything but the socket."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.host import LocalHost
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.model.request import CloneRequest, CreateRequest, RevertRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.qmp.agent import GuestAgent
from qsnapd.store.layout import Store
from qsnapd.vm.provisions import Provisions
from qsnapd.vm.spawn import Spawn
from tests.harness import Agent, Vm
from tests.parts import Qemu

ATTACH_LIMIT_S = 20.0


class Rig:
    """A host while `open_rig` holds it."""

    def __init__(self, host: LocalHost, supervisors: Mapping[str, Supervisor]) -> None:
        self.host = host
        self.supervisors = supervisors

    async def create(self, vm: str, request: CreateRequest) -> Manifest:
        """Take a checkpoint and wait for it."""
        return await (await self.host.create(vm, request)).wait()

    async def revert(self, vm: str, request: RevertRequest) -> Manifest:
        return await (await self.host.revert(vm, request)).wait()

    async def clone(self, vm: str, request: CloneRequest) -> Manifest:
        return await (await self.host.clone(vm, request)).wait()


@asynccontextmanager
async def open_rig(qemu: Qemu, state_dir: Path, **vms: Vm) -> AsyncIterator[Rig]:
    """Attach to those of *vms* that run, by name, and hold on to them for the block."""
    events = EventHub()
    with Store(state_dir) as store:
        async with trio.open_nursery() as watching:
            fleet = Fleet(
                *(store, events.publish, watching),
                qemu_img=str(qemu.img),
                clone_launcher=lambda source, clone: Spawn(),
            )
            for name, vm in vms.items():
                agent = GuestAgent(vm.agent) if isinstance(vm.guest, Agent) else None
                provisions = Provisions(agent=agent)
                fleet.add(name, vm.qmp, Spawn(), provisions=provisions, configured=True)
            await fleet.open_clones()
            with trio.fail_after(ATTACH_LIMIT_S):
                for supervisor in [fleet[name] for name, vm in vms.items() if vm.pids()]:
                    await supervisor.wait_attached()
            async with trio.open_nursery() as jobs:
                host = LocalHost(fleet, events, jobs, qemu_img=str(qemu.img))
                yield Rig(host, fleet)
            watching.cancel_scope.cancel()
