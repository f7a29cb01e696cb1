"""A VM that qsnapd talks to right now: its session, its process, its condition."""

import socket
from dataclasses import dataclass, replace

import trio

from qsnapd.errors import CommandRefused, Effect, VmError
from qsnapd.model.snapshot import Machine, Process, RamBlock
from qsnapd.model.state import Condition
from qsnapd.qmp.commands import (
    CommandInfo,
    Cont,
    QomGetText,
    QueryCommands,
    QueryCpusFast,
    QueryMemdev,
    QueryMemorySizeSummary,
    QueryStatus,
    QueryUuid,
    QueryVersion,
    Stop,
    VersionInfo,
)
from qsnapd.qmp.session import QmpSession
from qsnapd.qmp.transport import QmpTransport
from qsnapd.threads import in_thread
from qsnapd.vm.cpu import read_cpu
from qsnapd.vm.identity import ProcessIdentity, peer_of, read_process
from qsnapd.vm.tracker import Tracker

RESUME_LIMIT_S = 30.0
RESUME_RETRY_S = 0.05

# Run states in which a guest stands still for a reason that `cont` must not override.
NOT_OURS_TO_RESUME = frozenset(
    {"io-error", "guest-panicked", "shutdown", "internal-error", "watchdog", "suspended", "debug"}
)


@dataclass(frozen=True)
class AttachedVm:
    """Valid while the session lasts; made anew for every connection."""

    name: str
    session: QmpSession
    tracker: Tracker
    identity: ProcessIdentity
    process: Process
    version: VersionInfo
    commands: frozenset[str]
    uuid: str
    machine_type: str
    cpu: str | None
    """Its type, once it is asked for."""
    vcpus: int
    ram_bytes: int
    ram_blocks: tuple[RamBlock, ...]
    """Those that QEMU names (`query-memdev`); it saves more, of devices."""
    cpu_features: tuple[str, ...] | None = None
    """Known only `with_cpu`, since asking takes a few milliseconds."""

    async def with_cpu(self) -> "AttachedVm":
        """The same VM, knowing which CPU it shows its guest. Raises: VmError."""
        cpu = await read_cpu(self.session)
        return replace(self, cpu=cpu.type, cpu_features=cpu.features) if cpu else self

    @property
    def at_least_10(self) -> bool:
        """QEMU >= 10.0: background snapshots survive failure and cancel there.

        A version and not a capability, because that behaviour cannot be asked for.
        """
        return self.version.qemu.major >= 10

    def machine(self) -> Machine:
        """What a manifest records of the virtual hardware."""
        return Machine(
            type=self.machine_type,
            cpu=self.cpu,
            cpu_features=self.cpu_features,
            uuid=self.uuid,
            ram_bytes=self.ram_bytes,
            process=self.process,
        )

    async def run_state(self) -> str:
        """QEMU's own word for it (qapi/run-state.json, RunState)."""
        return (await self.session.execute(QueryStatus())).status

    async def confirm_condition(self) -> None:
        """Make up for events that were lost, or are still on their way. Raises: VmError."""
        heard = self.tracker.heard
        status = await self.run_state()
        if self.tracker.heard == heard:
            self.tracker.on_asked(status)

    async def suspend(self) -> None:
        """Stop the guest for the user; true once the STOP event has come.

        A guest that a job holds right now stays paused when the job lets go of it.
        """
        self.tracker.held_by_user = True
        if self.tracker.condition is Condition.PAUSED_SNAPSHOT:
            self.tracker.become(Condition.PAUSED_USER)
            return
        try:
            with self.tracker.pausing(Condition.PAUSED_USER):
                await self.session.execute(Stop())
        except CommandRefused:
            self.tracker.held_by_user = False
            raise

    async def resume(self) -> None:
        """Let the guest run for the user.

        A guest that a job holds right now runs when the job lets go of it.
        """
        was_held, self.tracker.held_by_user = self.tracker.held_by_user, False
        if self.tracker.held_by_job:
            self.tracker.resume_asked = True
            if was_held:
                self.tracker.become(Condition.PAUSED_SNAPSHOT)
            return
        with self.tracker.resuming(Condition.RUNNING_UNPAUSED):
            await self.session.execute(Cont())

    async def ensure_running(self, reason: Condition = Condition.RUNNING_UNPAUSED) -> bool:
        """Make the guest run, unless it stands still for a reason of its own.

        Asks first and after each step: a stopped guest may be "paused", "postmigrate" or
        already on its way. Idempotent. Returns whether it runs now.

        Raises: VmError: QEMU refuses, with its reason; QMP's errors.
        """
        refusal: CommandRefused | None = None
        with trio.move_on_after(RESUME_LIMIT_S), self.tracker.resuming(reason):
            while True:
                status = await self.session.execute(QueryStatus())
                if status.running:
                    return True
                if status.status in NOT_OURS_TO_RESUME:
                    return False
                try:
                    await self.session.execute(Cont())
                except CommandRefused as exc:
                    # e.g. a migration that is just ending: it will allow it in a moment
                    refusal = exc
                    await trio.sleep(RESUME_RETRY_S)
        raise VmError(
            f"the guest does not run again after {RESUME_LIMIT_S:g} s: "
            f"{refusal or 'QEMU accepts cont, and it has no effect'}",
            effect=Effect.GUEST_PAUSED,
        )


async def attach(
    name: str, bridge: QmpTransport, sock: socket.socket, tracker: Tracker
) -> AttachedVm:
    """Find out which process answers on *sock*, and what it is; *tracker* hears its events.

    Raises: SessionLost: it has ended. VmError: it cannot be looked into. QMP's errors.
    """
    identity = await in_thread(peer_of, sock)
    process = await in_thread(read_process, identity)
    session = QmpSession(bridge)
    session.listen(tracker.on_event)
    return await learn(name, session, tracker, identity, process)


async def learn(
    name: str,
    session: QmpSession,
    tracker: Tracker,
    identity: ProcessIdentity,
    process: Process,
) -> AttachedVm:
    """Ask a QEMU for what does not change while it lives."""
    commands: list[CommandInfo] = await session.execute(QueryCommands())
    memory = await session.execute(QueryMemorySizeSummary())
    machine = await session.execute(QomGetText(path="/machine", property="type"))
    cpus = await session.execute(QueryCpusFast())
    return AttachedVm(
        name=name,
        session=session,
        tracker=tracker,
        identity=identity,
        process=process,
        version=await session.execute(QueryVersion()),
        commands=frozenset(command.name for command in commands),
        uuid=(await session.execute(QueryUuid())).uuid,
        machine_type=machine.removesuffix("-machine"),
        cpu=None,
        vcpus=len(cpus),
        ram_bytes=memory.base_bytes + memory.plugged_bytes,
        ram_blocks=tuple(
            RamBlock(id=device.id, size_bytes=device.size_bytes)
            for device in await session.execute(QueryMemdev())
            if device.id
        ),
    )

