"""Starting a QEMU through systemd: in a transient unit, or as the VM's own unit."""

import logging
import os
import pwd
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import Blocked, QsnapError, SessionLost, StoreError, VmError
from qsnapd.model.plan import Launch
from qsnapd.store.pending import Deadline, NewestDisk, Pending, PendingPlan
from qsnapd.vm.argv import parse_options
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.disks import read_disks
from qsnapd.vm.identity import identify
from qsnapd.vm.proc import launch_token
from qsnapd.vm.systemctl import last_words, now, read_unit, systemctl, systemd_run

ENDING_LIMIT_S = 120.0
"""How long a prepared plan holds beyond what its QEMU may take: the old one has to end first."""
NOTICE_LIMIT_S = 10.0
"""How long systemd may take to notice that a unit's process has ended."""
TAKING_LIMIT_S = 20.0
"""How long `qsnapd exec` may take to get to its plan."""
LOOK_EVERY_S = 0.05

_log = logging.getLogger(__name__)


class SystemdRun:
    """Starts each QEMU in a transient unit of its own, `qsnapd-VM-TOKEN.service`."""

    inherits_descriptors = False

    def __init__(self, vm: str, *, patience_s: float, properties: Sequence[str] = ()) -> None:
        self._vm = vm
        self._patience_s = patience_s
        self._properties = tuple(properties)

    async def prepare(self, launch: Launch, *, lasting: bool = False) -> None:
        """Nobody but us starts this VM: there is nothing to arrange."""

    async def abandon(self) -> None:
        """Nothing was arranged."""

    async def keep_off(self) -> None:
        """Nobody starts it unasked."""

    async def start(self, launch: Launch, log: Path) -> "InUnit":
        """Start QEMU in a unit; it has been executed on return. Its words go to the journal.

        Cancellation: the process may have been started; it is left alone.
        Raises: VmError: systemd refuses, or cannot execute the program.
        """
        unit = f"qsnapd-{_in_unit_name(self._vm)}-{launch.token}.service"
        started = InUnit(unit, self._patience_s, launch.token)
        try:
            await trio.to_thread.run_sync(
                systemd_run, *transient_words(unit, self._vm, launch, self._properties)
            )
        except VmError as exc:
            with trio.CancelScope(shield=True):
                words = await trio.to_thread.run_sync(started.failed)
            raise VmError(f"{exc} {words or ''}".strip()) from exc
        return started

    async def follow(self, vm: AttachedVm) -> None:
        """Nobody but us starts this VM."""

    def instruction(self, launch: Launch) -> str | None:
        """Nobody has to do anything."""
        return None


class Unit:
    """Starts the VM's own unit, whose `ExecStart=` is `qsnapd exec VM -- ...`.

    The unit may have `Restart=`: whoever starts it first runs what was prepared, and nobody
    runs it again.
    """

    inherits_descriptors = True

    def __init__(self, vm: str, unit: str, pending: Pending, *, patience_s: float) -> None:
        self._vm = vm
        self._unit = unit
        self._pending = pending
        self._patience_s = patience_s

    async def prepare(self, launch: Launch, *, lasting: bool = False) -> None:
        """Leave *launch* for the unit's next start; see `vm.launcher.Launcher`.

        Raises: Blocked: the unit is not there, does not run `qsnapd exec`, or runs as another
          user. StoreError.
        """
        until = None if lasting else Deadline.after(ENDING_LIMIT_S + self._patience_s)
        plan = PendingPlan(vm=self._vm, launch=launch, until=until)
        await trio.to_thread.run_sync(require_wrapper, self._unit, self._vm, launch.uid)
        await trio.to_thread.run_sync(self._pending.put, plan)

    async def abandon(self) -> None:
        """Withdraw what was prepared. Never raises: a failure is logged."""
        try:
            await trio.to_thread.run_sync(self._pending.withdraw)
        except StoreError as exc:
            _log.warning("VM %s: what was planned for its unit may still run: %s", self._vm, exc)

    async def keep_off(self) -> None:
        """Stop the unit, and QEMU with it, if it is up. Raises: VmError."""
        await trio.to_thread.run_sync(systemctl, "stop", "--", self._unit)

    async def start(self, launch: Launch, log: Path) -> "InUnit":
        """Start the unit, unless it has been started again already.

        Preconditions: *launch* is prepared; the old QEMU has ended.
        Cancellation: it may have been started; it is left alone.
        Raises: VmError: systemd refuses.
        """
        started = InUnit(self._unit, self._patience_s, launch.token, self._pending)
        await trio.to_thread.run_sync(self._start)
        return started

    async def follow(self, vm: AttachedVm) -> None:
        """Write down where the VM's disks are, for starts of the unit that nothing is planned for.

        Never raises: a failure is logged.
        """
        try:
            disks = [
                NewestDisk(target=disk.target, chain=disk.chain)
                for disk in await read_disks(vm.session, vm.identity.pid)
                if len(disk.chain) > 1 and disk.format == "qcow2" and disk.left_out is None
            ]
            note = partial(self._pending.note, disks, uid=vm.process.uid, gid=vm.process.gid)
            await trio.to_thread.run_sync(note)
        except QsnapError as exc:
            _log.warning(
                "VM %s: if its unit %s is started now, it may be on the wrong images: %s",
                *(self._vm, self._unit, exc),
            )

    def instruction(self, launch: Launch) -> str | None:
        """Nobody has to do anything."""
        return None

    def _start(self) -> None:
        with suppress(VmError):  # systemd may have forgotten it, which is as good
            # Many reverts in a row are no reason to refuse the next (StartLimitBurst=).
            systemctl("reset-failed", "--", self._unit)
        deadline_s = time.monotonic() + NOTICE_LIMIT_S
        while True:
            systemctl("start", "--no-block", "--", self._unit)
            state = read_unit(self._unit)
            if state.job or self._pending.read() is None or time.monotonic() > deadline_s:
                return  # it is on its way, or it was, or `failed` will tell
            if state.main_pid and _lives(state.main_pid):
                return
            # systemd has not noticed yet that the old QEMU has ended, so it saw no need to start.
            time.sleep(LOOK_EVERY_S)


@dataclass(frozen=True)
class InUnit:
    """A QEMU that systemd is starting."""

    unit: str
    patience_s: float
    token: str
    pending: Pending | None = None
    """The plan it was to take, if the unit is the VM's own."""
    since: float = field(default_factory=now)
    began_s: float = field(default_factory=time.monotonic)

    def failed(self) -> str | None:
        """Why it will not come up, in QEMU's words if it has left any; None as long as it may."""
        try:
            state = read_unit(self.unit)
            if state.active in ("active", "reloading") or state.job:
                return self._not_taken()
            if state.active in ("activating", "deactivating") and state.sub != "auto-restart":
                return None
            words = last_words(self.unit, self.since) or f"{self.unit} is {state.why}"
            if self.pending is None and state.active == "failed":
                systemctl("reset-failed", "--", self.unit)  # nobody else wants to see it
        except QsnapError as exc:
            return str(exc)
        return words

    def kill(self) -> None:
        """Stop the unit if it runs what it was to run, so that it is not started again."""
        try:
            if self.pending is not None:
                self.pending.withdraw()
            state = read_unit(self.unit)
            mine = self.pending is None or (
                state.main_pid and launch_token(state.main_pid) == self.token
            )
            if mine and state.active not in ("inactive", "failed"):
                systemctl("stop", "--", self.unit)
        except SessionLost:
            pass  # it has just ended
        except QsnapError as exc:
            _log.warning("what was started in %s may go on: %s", self.unit, exc)

    def _not_taken(self) -> str | None:
        if self.pending is None or time.monotonic() < self.began_s + TAKING_LIMIT_S:
            return None
        plan = self.pending.read()
        if plan is None or plan.launch.token != self.token:
            return None
        return (
            f"{self.unit} is active, but has not run what it should: its ExecStart= must be "
            f"`qsnapd exec {plan.vm} -- ...`, and the VM's own QEMU must have run in it"
        )


def transient_words(
    unit: str, vm: str, launch: Launch, properties: Sequence[str] = ()
) -> Iterator[str]:
    """What follows `systemd-run` to start *launch* as *unit*."""
    daemonizes = any(option.name == "daemonize" for option in parse_options(launch.argv[1:]))
    yield f"--unit={unit}"
    yield f"--description=QEMU of VM {vm}, started by qsnapd"
    yield f"--service-type={'forking' if daemonizes else 'exec'}"
    if os.geteuid() == 0:
        yield f"--uid={launch.uid}"
        yield f"--gid={launch.gid}"
        if launch.groups:
            yield f"--property=SupplementaryGroups={' '.join(map(str, launch.groups))}"
    yield f"--working-directory={launch.cwd}"
    # PWD: `-daemonize` leaves "/" as the only trace of where it was started
    for name, value in (dict(launch.environment) | {"PWD": launch.cwd}).items():
        yield f"--setenv={name}={value}"
    yield from (f"--property={given}" for given in properties)
    yield "--"
    # systemd puts variables in place of $NAME in words; "%" means nothing to it here
    yield from (word.replace("$", "$$") for word in (launch.executable, *launch.argv[1:]))


def require_wrapper(unit: str, vm: str, uid: int) -> None:
    """Refuse a unit that would not run a plan of user *uid*. Blocks.

    Raises: Blocked: it is not there, its ExecStart= is no `qsnapd exec VM`, or its User= is
      somebody else. VmError.
    """
    state = read_unit(unit)
    if state.load != "loaded":
        raise Blocked(
            f"VM {vm} is started by its unit {unit}, of which systemd says: {state.load}. Nothing "
            "was touched; is the name in the configuration right?"
        )
    words = state.exec_start.split()
    if "exec" not in words or vm not in words[words.index("exec") :]:
        raise Blocked(
            f"{unit} would not start what qsnapd wants started: its ExecStart= must be "
            f"`/usr/bin/qsnapd exec {vm} -- ` followed by the command line it has now. Nothing "
            "was touched"
        )
    user = _uid(state.user) if state.user else os.geteuid()
    if user not in (uid, 0):
        raise Blocked(
            f"{unit} runs as user {user}, and VM {vm}'s QEMU ran as user {uid}, which it cannot "
            f"become: set User={uid} in the unit. Nothing was touched"
        )


def _uid(user: str) -> int | None:
    try:
        return int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def _in_unit_name(vm: str) -> str:
    """*vm* with what must not be in a unit's name as systemd escapes it."""
    return re.sub(r"[^A-Za-z0-9:_.-]", lambda found: _escaped(found[0]), vm)


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def _lives(pid: int) -> bool:
    try:
        identify(pid)
    except SessionLost:
        return False
    return True
