"""What QEMU, its guest, or somebody else on another monitor does in the midst of a job."""

import os
import re
import shutil
import signal
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

import trio

from tests.attacks.forge import Forged
from tests.attacks.lane import LOOK_AGAIN_S, SETTLE_LIMIT_S, Lane
from tests.monitor import Monitor, QmpError
from tests.real.cases import VM

REPLY_LIMIT_S = 2.5
"""As long as a daemon under attack waits for QEMU."""
HUNG_S = 6.0
HUNG_BRIEFLY_S = 1.0
RESUME_LIMIT_S = 10.0
OTHER = ("-name", "other", "-uuid", "0b5e55ed-0000-4000-8000-000000000001", "-m", "16")


class Deed(StrEnum):
    """One kind of misbehaviour."""

    HUNG_BRIEFLY = "hung for a moment"
    HUNG = "hung"
    KILLED = "killed"
    QUIT = "quit by another monitor"
    RESTARTED = "killed, and started again at once"
    STARTED_AS_BEFORE = "killed, and started at once on the images of before"
    REPLACED = "killed, and another VM started there"
    STOPPED = "stop on another monitor"
    CONTINUED = "cont on another monitor"
    SAVE_CANCELLED = "migrate_cancel on another monitor"
    RESET = "system_reset on another monitor"
    POWER_BUTTON = "system_powerdown on another monitor"
    PANICKED = "guest panicked"
    REBOOTED = "guest rebooted"
    POWERED_OFF = "guest powered off"

    @property
    def ends_qemu(self) -> bool:
        return self in _ENDING

    @property
    def is_the_guests(self) -> bool:
        """Only a guest that runs can do it."""
        return self in _BY_PORTS


_ENDING = (
    *(Deed.KILLED, Deed.QUIT, Deed.RESTARTED, Deed.STARTED_AS_BEFORE, Deed.REPLACED),
    Deed.POWERED_OFF,
)
_COMMANDS = {
    Deed.QUIT: "quit",
    Deed.STOPPED: "stop",
    Deed.CONTINUED: "cont",
    Deed.SAVE_CANCELLED: "migrate_cancel",
    Deed.RESET: "system_reset",
    Deed.POWER_BUTTON: "system_powerdown",
}
_BY_PORTS = {
    Deed.PANICKED: "outb 0x505 0x1",  # of pvpanic
    Deed.REBOOTED: "outb 0x64 0xfe",  # the keyboard controller's
    Deed.POWERED_OFF: "outw 0x604 0x2000",  # ACPI's, where SeaBIOS puts it
}


def extra_arguments(folder: Path) -> list[str]:
    """What a QEMU needs for the guest's deeds: somebody who writes to its ports."""
    return [
        *("-device", "pvpanic", "-action", "panic=pause"),
        *("-qtest", f"unix:{folder}/ports,server=on,wait=off", "-qtest-log", "none"),
    ]


class Culprit:
    """Does one deed to the VM of a lane."""

    def __init__(self, deed: Deed, lane: Lane) -> None:
        self.deed = deed
        self._lane = lane
        self._images: Sequence[Path] = lane.newest_images()
        self._pids: list[int] = []
        self.stopped_it = False
        """A guest that ran stands still since, by its user's wish or its own doing."""

    async def strike(self) -> None:
        """Do it, while the daemon stands at its point; or begin to."""
        lane, vm = self._lane, self._lane.vm
        self._pids = vm.pids()
        match self.deed:
            case Deed.HUNG | Deed.HUNG_BRIEFLY:
                for pid in self._pids:
                    os.kill(pid, signal.SIGSTOP)
            case Deed.KILLED:
                await vm.kill()
            case Deed.RESTARTED:
                await vm.kill()
                await lane.start(await trio.to_thread.run_sync(lane.newest_images))
            case Deed.STARTED_AS_BEFORE:
                await vm.kill()
                await lane.start(self._images)
            case Deed.REPLACED:
                await vm.kill()
                await self._start_other()
            case _ if self.deed in _COMMANDS:
                await self._tell_monitor()

    async def later(self) -> None:
        """Do what comes when the daemon has gone on."""
        match self.deed:
            case Deed.HUNG | Deed.HUNG_BRIEFLY:
                brief = self.deed is Deed.HUNG_BRIEFLY
                await trio.sleep(HUNG_BRIEFLY_S if brief else HUNG_S)
                for pid in self._pids:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGCONT)
            case _ if self.deed.is_the_guests:
                await self._write_port()

    async def _tell_monitor(self) -> None:
        with suppress(EOFError, trio.BrokenResourceError, QmpError):
            async with self._lane.vm.monitor() as monitor:
                ran = (await monitor.execute("query-status"))["running"]
                await monitor.execute(_COMMANDS[self.deed])
                self.stopped_it = ran and self.deed is Deed.STOPPED
        if self.deed is Deed.QUIT:
            await _gone(self._lane)

    async def _write_port(self) -> None:
        """As soon as the guest runs, unless its QEMU ends before."""
        with trio.move_on_after(RESUME_LIMIT_S):
            try:
                async with self._lane.vm.monitor() as monitor:
                    await _running(monitor)
                async with await trio.open_unix_socket(self._lane.folder / "ports") as ports:
                    await ports.send_all(_BY_PORTS[self.deed].encode() + b"\n")
                    await ports.receive_some()
            except (OSError, EOFError, trio.BrokenResourceError):
                return
            self.stopped_it = self.deed is Deed.PANICKED

    async def _start_other(self) -> None:
        vm = self._lane.vm
        argv = [
            *(str(self._lane.qemu.system), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-accel", "tcg", *OTHER),
            *("-chardev", f"socket,id=qmp,path={vm.qmp},server=on,wait=off"),
            *("-mon", "chardev=qmp,mode=control"),
            *("-chardev", f"socket,id=qmp2,path={vm.folder}/qmp2,server=on,wait=off"),
            *("-mon", "chardev=qmp2,mode=control", "-daemonize"),
        ]
        await trio.run_process(argv)

    async def mend(self, daemon: Forged) -> None:
        """Do what the VM's user does once the job has ended: they want their guest to run."""
        lane = self._lane
        if self.deed is Deed.REPLACED:
            await _attached(daemon, "running")
            status = (await lane.vm.execute("query-status"))["status"]
            assert status == "running", f"the other VM is {status}"
            await lane.vm.kill()
        if self.deed is Deed.STARTED_AS_BEFORE:
            await self._give_up_overlays(daemon)
        if self.deed.ends_qemu:
            await lane.start_if_off(daemon)
        elif self.stopped_it and lane.vm.pids() == self._pids:
            await self._let_go(daemon)

    async def _give_up_overlays(self, daemon: Forged) -> None:
        """Put aside each overlay that is told to hold what is missing where the VM runs on now."""
        while (problem := await _settled_or_problem(self._lane, daemon)) is not None:
            found = re.search(r"has left the overlay (\S+), and", problem)
            assert found, problem
            shutil.move(found[1], self._lane.folder)

    async def _let_go(self, daemon: Forged) -> None:
        lane = self._lane
        if self.deed is Deed.PANICKED:
            await lane.settled(daemon, state="crashed")
            await lane.vm.execute("system_reset")
            await lane.settled(daemon, state="paused")
        else:
            await lane.settled(daemon, state="paused")
        await daemon.call("Resume", vm=VM)


async def _settled_or_problem(lane: Lane, daemon: Forged) -> str | None:
    """Wait until all is in order, or the daemon can go no further by itself; says why."""
    with trio.fail_after(SETTLE_LIMIT_S):
        while True:
            vm = (await daemon.call("GetVm", vm=VM))["vm"]
            job = (await daemon.call("GetJob", vm=VM))["job"]
            if vm["problem"] and "overlay" in vm["problem"]:
                return str(vm["problem"])
            if vm["connected"] and not (vm["problem"] or job or lane.journals()):
                return None
            await trio.sleep(LOOK_AGAIN_S)


async def _running(monitor: Monitor) -> None:
    if not (await monitor.execute("query-status"))["running"]:
        await monitor.wait_event("RESUME", limit_s=RESUME_LIMIT_S)


async def _gone(lane: Lane) -> None:
    with trio.fail_after(SETTLE_LIMIT_S):
        while lane.vm.pids():  # noqa: ASYNC110 -- it is not our child
            await trio.sleep(LOOK_AGAIN_S)


async def _attached(daemon: Forged, state: str) -> None:
    with trio.fail_after(SETTLE_LIMIT_S):
        while True:
            vm = (await daemon.call("GetVm", vm=VM))["vm"]
            if vm["connected"] and vm["state"] == state:
                return
            await trio.sleep(LOOK_AGAIN_S)
