"""Looking at VMs: what is known of them, and what their stores say, where those answer."""

import trio

from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import DiskStalled, StoreError
from qsnapd.model.vm import VmInfo
from qsnapd.store.snapshots import VmStore
from qsnapd.threads import in_thread

STORE_LIMIT_S = 2.0
"""How long a look waits for a store."""


class Looks:
    """At the VMs of one daemon."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._stalled: dict[str, DiskStalled] = {}
        """The last look into the store of these VMs has not come to an end yet, or only since."""

    async def look_at_all(self) -> tuple[VmInfo, ...]:
        """See `Host.look_at_all`."""
        infos: dict[str, VmInfo] = {}

        async def look(name: str) -> None:
            infos[name] = await self.look(name)

        names = sorted(self._fleet)
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(look, name)
        return tuple(infos[name] for name in names)

    async def look(self, name: str) -> VmInfo:
        """See `Host.look`."""
        supervisor, stalled = self._fleet.find(name), self._stalled.get(name)
        try:
            if stalled is not None and not stalled.over.is_set():
                raise stalled  # one thread that waits for it is enough
            kept = await in_thread(_kept, supervisor.store, limit_s=STORE_LIMIT_S)
        except StoreError as exc:
            if isinstance(exc, DiskStalled):
                self._stalled[name] = exc
            info = look_past_store(supervisor)
            return info.model_copy(update={"problem": info.problem or str(exc)})
        return look_past_store(supervisor).model_copy(update=kept)


def look_past_store(supervisor: Supervisor) -> VmInfo:
    """What is known of a VM; no file is read."""
    condition = supervisor.tracker.condition
    vm = supervisor.attached
    return VmInfo(
        name=supervisor.name,
        state=condition.state.text,
        state_number=condition.state,
        reason=condition.reason_text,
        reason_number=condition.reason_number,
        connected=vm is not None,
        problem=supervisor.problem,
        qmp=str(supervisor.qmp),
        pid=vm.identity.pid if vm else None,
        uuid=vm.uuid if vm else None,
        qemu_version=vm.version.text if vm else None,
        machine=vm.machine_type if vm else None,
        ram_bytes=vm.ram_bytes if vm else None,
        vcpus=vm.vcpus if vm else None,
    )


def _kept(store: VmStore) -> dict[str, object]:
    return {"snapshots": len(store.snapshots()), "current_snapshot": store.current()}
