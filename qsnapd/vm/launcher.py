"""Who starts a VM's QEMU: the daemon itself, systemd, or a person.

All of them start exactly the `Launch` they are given, with its environment, in which
`TOKEN_VARIABLE` makes the process known whoever started it.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from qsnapd.model.plan import Launch
from qsnapd.store.pending import Pending
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.spawn import PATIENCE_S as USUAL_PATIENCE_S
from qsnapd.vm.spawn import Spawn
from qsnapd.vm.systemd import SystemdRun, Unit

LauncherKind = Literal["spawn", "systemd-run", "unit", "manual"]
PATIENCE_S: Mapping[LauncherKind, float] = {
    "spawn": USUAL_PATIENCE_S,
    "systemd-run": USUAL_PATIENCE_S,
    "unit": USUAL_PATIENCE_S,
    "manual": 3600.0,
}
"""How long a QEMU may take to answer, unless the configuration says."""


class Started(Protocol):
    """A QEMU on its way, until it answers on its monitor. Both methods block."""

    @property
    def patience_s(self) -> float:
        """How long it may take to answer."""

    def failed(self) -> str | None:
        """Why it will not come up, in words; None as long as it may."""

    def kill(self) -> None:
        """See to it that it does not run, nor is started again. Idempotent; never raises."""


class Launcher(Protocol):
    """Starts the QEMU of one VM."""

    @property
    def inherits_descriptors(self) -> bool:
        """Whether QEMU gets the descriptors (`fd=`) again that it was started with before."""

    async def prepare(self, launch: Launch, *, lasting: bool = False) -> None:
        """Make *launch* what runs the next time anybody starts this VM, exactly once.

        To be called before the old QEMU is ended, because a service may start the VM again
        the moment it has. May be called again: the last plan counts. *lasting*: the plan
        waits for whoever starts the VM, be it after a reboot; else it is void after that,
        or after a while, because nobody would load the memory that its QEMU waits for.

        On failure: nothing will run. Cancellation: `abandon` is the caller's.
        Raises: VmError, StoreError: this VM cannot be started in this way; says why.
        """

    async def abandon(self) -> None:
        """Withdraw what was prepared, if it has not run yet. Idempotent; never raises."""

    async def keep_off(self) -> None:
        """See to it that the VM, if it runs, is not started again as soon as it has ended.

        It may be ended by that. Raises: VmError.
        """

    async def start(self, launch: Launch, log: Path) -> Started:
        """Start QEMU, or find that somebody else has just started what was prepared.

        *log*: a file for what it complains of, where nothing better is at hand.
        Cancellation: the process may have been started; it is left alone.
        Raises: VmError: it cannot be started.
        """

    async def follow(self, vm: AttachedVm) -> None:
        """Take notice of where the VM's disks are now: to be called whenever they have moved.

        Never raises: a failure is logged.
        """

    def instruction(self, launch: Launch) -> str | None:
        """The command line that a person must run now; None if nobody has to."""


class Manual:
    """A person, or a tool of theirs, starts the VM with the command line that we show."""

    inherits_descriptors = True

    def __init__(self, *, patience_s: float) -> None:
        self._patience_s = patience_s

    async def prepare(self, launch: Launch, *, lasting: bool = False) -> None:
        """Nobody starts this VM unless told to: there is nothing to arrange."""

    async def abandon(self) -> None:
        """Nothing was arranged."""

    async def keep_off(self) -> None:
        """Nobody starts it unasked."""

    async def start(self, launch: Launch, log: Path) -> "Awaited":
        """Do nothing: the caller shows `instruction` and waits for the monitor."""
        return Awaited(self._patience_s)

    async def follow(self, vm: AttachedVm) -> None:
        """A person starts this VM, and sees to its disks (`qsnapctl domblklist`)."""

    def instruction(self, launch: Launch) -> str | None:
        """What to run, for a shell."""
        told = [f"{name}={value}" for name, value in launch.environment if name.startswith("QSNAP")]
        there = f"cd {shlex.quote(launch.cwd)} && "
        return there + shlex.join(["env", *told, launch.executable, *launch.argv[1:]])


class Awaited:
    """A QEMU that somebody is going to start."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s

    def failed(self) -> str | None:
        """Who starts it sees that for themselves."""
        return None

    def kill(self) -> None:
        """It is theirs."""


def launcher_of(
    kind: LauncherKind,
    vm: str,
    *,
    unit: str | None,
    pending: Pending,
    patience_s: float,
    properties: Sequence[str] = (),
) -> Launcher:
    """Return the launcher of *vm*.

    *unit*: its systemd unit, if *kind* is "unit". *properties*: of a transient one's.
    """
    match kind:
        case "spawn":
            return Spawn(patience_s=patience_s)
        case "systemd-run":
            return SystemdRun(vm, patience_s=patience_s, properties=properties)
        case "manual":
            return Manual(patience_s=patience_s)
        case "unit":
            assert unit is not None, "the configuration sees to that"
            return Unit(vm, unit, pending, patience_s=patience_s)
