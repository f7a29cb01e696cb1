"""What a QEMU can do that a snapshot needs, found out by asking one: it takes about 100 ms.

Started as its user, paused, with nothing of the recorded command line but what decides
machine and CPU. -smp is not part of that: no feature that `read_cpu` tells depends on it, and
64 CPUs take 200 ms to make.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from qsnapd.errors import CommandRefused, VmError
from qsnapd.model.snapshot import Machine, Process
from qsnapd.qmp.commands import QomGetText, QueryMachines, QueryVersion, VersionInfo
from qsnapd.qmp.migration import MigrateSetCapabilities, QueryMigrateCapabilities
from qsnapd.qmp.session import QmpSession
from qsnapd.vm.argv import Fields, Option, parse_options
from qsnapd.vm.cpu import read_cpu
from qsnapd.vm.throwaway import open_throwaway

PROBE_LIMIT_S = 30.0

_STILL = (
    Option("nodefaults"),
    Option("no-user-config"),
    Option("display", "none"),
    Option("S"),
)
_SHAPING = frozenset({"cpu", "accel", "enable-kvm", "L", "bios"})
_OF_THE_MACHINE = frozenset(
    {"type", "accel", "kernel-irqchip", "kernel_irqchip", "max-cpus", "smm", "usb", "pcie"}
)
"""Members of -machine that neither name other objects nor cost anything."""
_LAZY_LOAD = {"mapped-ram": True, "postcopy-ram": True}
_ANY_MACHINE = (
    Option("machine", "none,accel=kvm:tcg"),
    *_STILL,
)


@dataclass(frozen=True)
class Probe:
    """What was found out."""

    version: VersionInfo
    machine_type: str
    cpu: str | None
    cpu_features: tuple[str, ...] | None
    capabilities: frozenset[str]
    """Migration capabilities that it knows of."""
    loads_lazily: bool
    """It pages in a mapped-ram image by itself: `mapped-ram` goes together with `postcopy-ram`."""


class UnknownMachine(VmError):
    """This QEMU has no such machine type. Never leaves the package `snapshot`."""


async def probe(executable: str, machine: Machine) -> Probe:
    """Ask *executable*, started for the hardware that *machine* was.

    On return, also if cancelled: no process is left.
    Raises: UnknownMachine. VmError: it does not start or does not answer, in QEMU's words.
    """
    process = machine.process
    options = [*_STILL, *shaping_options(parse_options(process.argv[1:]), machine.type)]
    try:
        with trio.fail_after(PROBE_LIMIT_S):
            async with open_throwaway(process, executable, options, cwd=process.cwd) as qemu:
                return await _ask(qemu.session)
    except trio.TooSlowError:
        raise VmError(f"{executable} did not answer within {PROBE_LIMIT_S:g} s") from None
    except VmError as exc:
        failure = exc
    known = await _machines(process, executable)
    if known is not None and machine.type not in known:
        raise UnknownMachine(f"{executable} has no machine type {machine.type}") from failure
    raise failure


async def _ask(session: QmpSession) -> Probe:
    version = await session.execute(QueryVersion())
    machine_type = await session.execute(QomGetText(path="/machine", property="type"))
    cpu = await read_cpu(session)
    known = frozenset(c.capability for c in await session.execute(QueryMigrateCapabilities()))
    return Probe(
        version=version,
        machine_type=machine_type.removesuffix("-machine"),
        cpu=cpu.type if cpu else None,
        cpu_features=cpu.features if cpu else None,
        capabilities=known,
        loads_lazily=known.issuperset(_LAZY_LOAD) and await _accepts(session, _LAZY_LOAD),
    )


async def _accepts(session: QmpSession, capabilities: dict[str, bool]) -> bool:
    try:
        await session.execute(MigrateSetCapabilities.of(capabilities))
    except CommandRefused:
        return False
    return True


async def _machines(process: Process, executable: str) -> frozenset[str] | None:
    """The machine types that *executable* knows; None if it does not start at all."""
    try:
        with trio.fail_after(PROBE_LIMIT_S):
            async with open_throwaway(process, executable, _ANY_MACHINE) as qemu:
                machines = await qemu.session.execute(QueryMachines())
    except (VmError, trio.TooSlowError):
        return None
    return frozenset(machine.name for machine in machines)


def shaping_options(options: Sequence[Option], machine_type: str) -> Iterator[Option]:
    """Those of *options* that decide machine and CPU, with the type as it was resolved."""
    fields = Fields({"type": machine_type})
    for option in options:
        match option.name:
            case "machine" | "M":
                given = Fields.parse(option.value or "", first_key="type")
                fields.update({k: v for k, v in given.items() if k in _OF_THE_MACHINE})
            case "global" if _is_about_cpus(option.value or ""):
                yield option
            case name if name in _SHAPING:
                yield option
    fields["type"] = machine_type
    yield Option("machine", str(Fields(fields)))


def _is_about_cpus(value: str) -> bool:
    fields = Fields.parse(value)
    driver = fields.get("driver") or value.partition("=")[0].rpartition(".")[0]
    return str(driver).endswith("-cpu")
