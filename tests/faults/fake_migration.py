"""Saving memory in the fake QEMU: every stage of a real save, as slow or as broken as wanted."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from tests.faults.fake_blocks import FakeBlocks
from tests.faults.fake_monitor import Arguments, FakeMonitor, Refusal
from tests.unit import crafted_images as images

RAM_PAGES = 100
RAM_BYTES = RAM_PAGES * images.PAGE
NON_ZERO_PAGES = 5
STEPS = 5


@dataclass(frozen=True)
class SavingScript:
    """How the next save goes; times by the test's clock."""

    setup_s: float = 0.004
    capture_s: float = 0.006
    """From "active" to the moment at which a background snapshot captures the devices."""
    step_s: float = 0.03
    """One of the STEPS in which the pages are saved."""
    self_resume_s: float = 0.002
    """QEMU <= 8.2, background: from the capture until the guest runs by itself."""
    converges: bool = True
    """Precopy: False means that the guest, while it runs, dirties faster than is copied."""
    fails_in: str | None = None
    """The stage in which the save fails: "setup", "active", "saving" or "device"."""
    cancelling_s: float = 0.0
    """How long it stays in "cancelling"."""
    forgets_cancel: bool = False
    """It stays in "cancelling" until `migrate-continue`, as 7.2 does in an unlucky moment."""


class SaveFailed(Exception):
    """The script says that the save fails now."""


class RunStates(Protocol):
    """What a migration needs to know of and do to the guest."""

    status: str
    tick: int

    @property
    def running(self) -> bool: ...

    def live(self) -> None: ...
    def halt(self, status: str) -> None: ...
    def go(self) -> None: ...


@dataclass
class Save:
    """What is known of one save."""

    status: str = "setup"
    error: str | None = None
    transferred_bytes: int = 0
    remaining_bytes: int = RAM_BYTES
    pages: int = 0
    tick: int | None = None
    """What the guest's memory holds, as captured."""
    stopped_guest: bool = False
    """It was QEMU that stopped the guest to switch over; so it resumes it on failure."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    switchover: trio.Event = field(default_factory=trio.Event)


class FakeMigration:
    """The migration of one fake QEMU."""

    def __init__(self, monitor: FakeMonitor, blocks: FakeBlocks, guest: RunStates) -> None:
        self._monitor = monitor
        self._blocks = blocks
        self._guest = guest
        self.script = SavingScript()
        self.save: Save | None = None
        self.harm: str | None = None
        """Something was done to this QEMU that a real one does not always survive."""
        names = ["events", "xbzrle", "multifd", "pause-before-switchover", "background-snapshot"]
        if monitor.major >= 10:
            names.append("mapped-ram")
        self.capabilities = dict.fromkeys(names, False)
        self.parameters: dict[str, Any] = {"max-bandwidth": 1 << 27, "downtime-limit": 300}
        self.parameters.update({"multifd-channels": 2, "multifd-compression": "none"})
        monitor.serve("query-migrate", self._query)
        monitor.serve("query-migrate-capabilities", self._query_capabilities)
        monitor.serve("migrate-set-capabilities", self._set_capabilities)
        monitor.serve("query-migrate-parameters", lambda _: dict(self.parameters))
        monitor.serve("migrate-set-parameters", self._set_parameters)
        monitor.serve("migrate", self._migrate)
        monitor.serve("migrate_cancel", self._cancel)
        monitor.serve("migrate-continue", self._continue)

    @property
    def under_way(self) -> bool:
        ended = ("completed", "failed", "cancelled")
        return self.save is not None and self.save.status not in ended

    def _query(self, _arguments: Arguments) -> object:
        save = self.save
        if save is None:
            return {}
        answer: dict[str, Any] = {"status": save.status}
        if save.error is not None:
            answer["error-desc"] = save.error
        if save.status != "setup":
            answer["ram"] = {
                "transferred": save.transferred_bytes,
                "remaining": save.remaining_bytes,
                "total": RAM_BYTES,
                "normal": save.pages,
                "mbps": 100.0,
            }
        return answer

    def _query_capabilities(self, _arguments: Arguments) -> object:
        return [{"capability": c, "state": state} for c, state in self.capabilities.items()]

    def _set_capabilities(self, arguments: Arguments) -> None:
        if self.under_way:
            raise Refusal("There's a migration process in progress")
        wanted = {c["capability"]: c["state"] for c in arguments["capabilities"]}
        for name in wanted:
            if name not in self.capabilities:
                raise Refusal(f"Parameter 'capability' does not accept value '{name}'")
        then = {**self.capabilities, **wanted}
        if then["background-snapshot"] and (then["multifd"] or then["pause-before-switchover"]):
            raise Refusal("Background-snapshot is not compatible with another capability")
        self.capabilities = then

    def _set_parameters(self, arguments: Arguments) -> None:
        for name in arguments:
            if name not in self.parameters:
                raise Refusal(f"Parameter '{name}' is unexpected")
        self.parameters.update(arguments)

    def _migrate(self, arguments: Arguments) -> None:
        if self.under_way:
            raise Refusal("There's a migration process in progress")
        if self._guest.status == "postmigrate":
            raise Refusal("Can't migrate the vm that was paused due to previous migration")
        protocol, _, name = arguments["uri"].partition(":")
        if protocol == "fd":
            target = self._monitor.take_named(name)
        elif self._monitor.major >= 10:
            target = self._monitor.open_fdset(name, os.O_WRONLY)
        else:
            raise Refusal("unknown migration protocol: " + arguments["uri"])
        self.save = Save()
        self._monitor.start(self._run, self.save, target, dict(self.capabilities))

    def _cancel(self, _arguments: Arguments) -> None:
        if self.save is not None and self.under_way and self.save.status != "cancelling":
            if self.capabilities["multifd"]:
                self.harm = "a multifd save was cancelled"
            if self.capabilities["background-snapshot"] and self._monitor.major < 10:
                self.harm = "a background save of QEMU < 10.0 was cancelled"
            self._enter(self.save, "cancelling")
            self.save.scope.cancel()

    def _continue(self, arguments: Arguments) -> None:
        expected = arguments["state"]
        if self.save is None or self.save.status != expected:
            raise Refusal(f"Migration not in expected state: {expected}")
        self.save.switchover.set()

    def _enter(self, save: Save, status: str) -> None:
        save.status = status
        if self.capabilities["events"]:
            self._monitor.emit("MIGRATION", status=status)

    # --- one save ------------------------------------------------------------------------

    async def _run(self, save: Save, target: int, capabilities: Mapping[str, bool]) -> None:
        how = self._background if capabilities["background-snapshot"] else self._copy
        try:
            with save.scope:
                self._enter(save, "setup")
                await self._stay("setup", self.script.setup_s)
                self._enter(save, "active")
                await how(save, capabilities)
                _write_image(target, capabilities)
                self._blocks.activate(active=capabilities["background-snapshot"])
                self._enter(save, "completed")
            if save.scope.cancelled_caught:
                await trio.sleep(self.script.cancelling_s)
                if self.script.forgets_cancel:
                    await save.switchover.wait()
                self._give_up(save, "cancelled")
        except SaveFailed as exc:
            save.error = str(exc)
            self._give_up(save, "failed")
        finally:
            os.close(target)

    async def _stay(self, stage: str, for_s: float) -> None:
        await trio.sleep(for_s)
        if self.script.fails_in == stage:
            raise SaveFailed(f"planted: no luck in stage {stage}")

    def _give_up(self, save: Save, status: str) -> None:
        self._blocks.activate(active=True)
        if self._guest.status == "finish-migrate":
            self._guest.status = "paused"
            if save.stopped_guest:
                self._guest.go()
        self._enter(save, status)

    async def _background(self, save: Save, _capabilities: Mapping[str, bool]) -> None:
        await self._stay("active", self.script.capture_s)
        guest = self._guest
        was_running = guest.running
        guest.halt("paused")
        save.tick = guest.tick
        if self._monitor.major < 9:
            await trio.sleep(self.script.self_resume_s)
            guest.go()  # whoever had paused it
        elif was_running:
            guest.go()
        for _ in range(STEPS):
            save.pages += RAM_PAGES // STEPS
            save.remaining_bytes -= RAM_BYTES // STEPS
            save.transferred_bytes += RAM_BYTES // STEPS
            await self._stay("saving", self.script.step_s)

    async def _copy(self, save: Save, capabilities: Mapping[str, bool]) -> None:
        guest = self._guest
        await self._stay("active", self.script.step_s)
        steps = 0
        while steps < STEPS or (guest.running and not self.script.converges):
            steps += 1
            save.pages += RAM_PAGES // STEPS
            save.transferred_bytes += RAM_BYTES // STEPS
            save.remaining_bytes = max(images.PAGE, RAM_BYTES - save.transferred_bytes)
            await self._stay("saving", self.script.step_s)
        save.stopped_guest = guest.running
        guest.halt("finish-migrate")
        if capabilities["pause-before-switchover"]:
            self._enter(save, "pre-switchover")
            await save.switchover.wait()
            self._enter(save, "device")
        save.tick = guest.tick
        await self._stay("device", self.script.step_s)
        guest.status = "postmigrate"


def _write_image(target: int, capabilities: Mapping[str, bool]) -> None:
    """Write what QEMU would: the smallest image that qsnapd's verification accepts."""
    if not capabilities.get("mapped-ram"):
        records = [images.page(0, block=images.RAM)]
        records += [images.page(n) for n in range(1, NON_ZERO_PAGES)]
        records += [images.page(n, b"\0") for n in range(NON_ZERO_PAGES, RAM_PAGES)]
        rest = memoryview(images.stream(*records, blocks={images.RAM: RAM_PAGES}))
        while rest:
            rest = rest[os.write(target, rest) :]
        return
    # With background-snapshot QEMU leaves out the bitmaps.
    bitmap = 0 if capabilities["background-snapshot"] else (1 << NON_ZERO_PAGES) - 1
    pages = dict.fromkeys(range(NON_ZERO_PAGES), b"x")
    path = Path(f"/proc/self/fd/{target}")
    os.close(images.mapped(path, pages, bitmap=bitmap, page_count=RAM_PAGES))
