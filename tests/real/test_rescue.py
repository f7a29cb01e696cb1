"""A QEMU that freezes its guest when a background snapshot fails: the guest comes back.

That is forced fifty times, in each of the ways together; QSNAPD_LONG=1: two hundred times.
"""

import json
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio

from qsnapd.errors import (
    Effect,
    GuestLeftPaused,
    JobCancelled,
    NothingToRescue,
    QsnapError,
    RescueDenied,
)
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.snapshot.taking import memory, rescuing
from qsnapd.vm.identity import ProcessIdentity, identify
from qsnapd.vm.rescue import protected_memory, release_memory
from tests.harness import Slots, Vm, open_vm
from tests.long import LONG
from tests.monitor import Monitor
from tests.parts import SYSTEM_QEMU, find_qemu
from tests.real.cases import TWO_DISKS, VM, Case
from tests.real.footprint import look
from tests.rig import Rig, open_rig
from tests.system.processes import Daemon, open_daemon, reconcile
from tests.tallies import Record, count

FORCED = 200 if LONG else 50
LOST_AT_MOST = 0.04
OLD = Case(find_qemu(SYSTEM_QEMU), Strategy.BACKGROUND, ImageFormat.STREAM)
DIRTYING = Slots(memory_mib=16, dirty_mib_s=50, disk_pause_us=50)
LIMIT_S = 60.0
LOOK_S = 0.3


@dataclass
class Tally:
    """What came of the runs."""

    runs: int = 0
    too_late: int = 0
    """The save had completed already."""
    hung: int = 0
    """The monitor answered no more."""
    frozen: int = 0
    """It did, and a virtual CPU slept all the same."""
    lost: list[str] = field(default_factory=list)
    """The guest did not run again."""

    @property
    def forced(self) -> int:
        return self.hung + self.frozen

    def note(self, symptom: str | None, *, too_late: bool) -> None:
        self.runs += 1
        assert self.runs < 3 * FORCED, f"it can hardly be forced: {self}"
        self.too_late += too_late
        self.hung += symptom == "hung"
        self.frozen += symptom == "frozen"


def symptom_of(vm: Vm, identity: ProcessIdentity) -> str | None:
    """Look past qsnapd at what became of QEMU. Blocks for a moment."""
    before = asleep(identity.pid)
    time.sleep(LOOK_S)
    stays_asleep = bool(before & asleep(identity.pid))
    if not answers(vm.folder / "qmp2"):
        return "hung"
    return "frozen" if stays_asleep else None


def asleep(pid: int) -> set[str]:
    """Threads of a process that wait for a userfaultfd at this moment."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            if (task / "wchan").read_text() == "handle_userfault":
                found.add(task.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def answers(monitor: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(str(monitor))
            replies = sock.makefile("rb")
            replies.readline()
            for command in ("qmp_capabilities", "query-status"):
                sock.sendall(json.dumps({"execute": command}).encode() + b"\n")
                while b'"return"' not in replies.readline():
                    pass
        except OSError:
            return False
        return True


@contextmanager
def examined(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """Yield what became of QEMU each time that qsnapd was about to free its guest."""
    seen: list[str | None] = []

    def look_first(identity: ProcessIdentity) -> object:
        if protected_memory(identity):
            seen.append(symptom_of(vm, identity))
        return release_memory(identity)

    with monkeypatch.context() as patch:
        patch.setattr(rescuing, "release_memory", look_first)
        yield seen


def slow_drain(monkeypatch: pytest.MonkeyPatch, *, breaks_after: int | None = None) -> None:
    """Let the drain take its time for each chunk, and go away after so many of them."""

    def read(drain: memory.Drain) -> None:
        chunks = 0
        while chunks != breaks_after and (chunk := os.read(drain._reader, memory.CHUNK_BYTES)):
            drain._pass_on(chunk)
            chunks += 1
            time.sleep(0.01)
        os.close(drain._reader)
        drain._pass_on(b"")

    monkeypatch.setattr(memory.Drain, "_read", read)


@asynccontextmanager
async def open_dirtying() -> AsyncIterator[Vm]:
    async with open_vm(OLD.qemu, DIRTYING, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        yield vm


async def require_well(vm: Vm) -> None:
    """The guest works on all it had, and no memory of it is held."""
    await vm.wait_checked(limit_s=LIMIT_S)
    assert vm.slots_report().fine
    assert protected_memory(identify(vm.pid)) == ()


async def guest_saves(monitor: Monitor) -> None:
    """Wait until QEMU saves, and has let its guest run on."""
    await monitor.wait_event("RESUME")


async def fail_once(rig: Rig, name: str, how: Callable[[], Awaitable[None]]) -> QsnapError | None:
    """Take a checkpoint in the background that fails by *how*; return why there is none."""
    job = await rig.host.create(VM, OLD.request(name))
    error: QsnapError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(how)
        try:
            await job.wait()
        except QsnapError as exc:
            error = exc
        nursery.cancel_scope.cancel()
    return error


async def require_saving(rig: Rig) -> None:
    """This QEMU can save memory in each way, which by itself it could not."""
    for strategy in Strategy:
        await rig.create(VM, OLD.request(f"after-{strategy}", strategy=strategy))


async def test_nothing_happens_to_a_healthy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at rest, nor while it saves, nor when that is cancelled as it should be."""
    async with open_dirtying() as vm, open_rig(OLD.qemu, tmp_path, **{VM: vm}) as rig:
        with pytest.raises(NothingToRescue):
            release_memory(identify(vm.pid))
        with monkeypatch.context() as patch, examined(vm, monkeypatch) as seen:
            await rig.create(VM, OLD.request("kept"))
            slow_drain(patch)
            async with vm.monitor() as monitor:

                async def cancel() -> None:
                    await guest_saves(monitor)
                    assert protected_memory(identify(vm.pid))
                    rig.host.abort(VM)

                error = await fail_once(rig, "cancelled", cancel)
        assert isinstance(error, JobCancelled)
        assert seen == []
        await require_well(vm)


async def test_guest_waits_for_one_who_may_free_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may not trace QEMU says so; the guest comes back as soon as somebody may."""
    denied = trio.Event()
    token = trio.lowlevel.current_trio_token()
    allowed = threading.Event()

    def deny(identity: ProcessIdentity) -> object:
        if protected_memory(identity) and not allowed.is_set():
            token.run_sync_soon(denied.set)
            raise RescueDenied("run it as root")
        return release_memory(identity)

    async with open_dirtying() as vm, open_rig(OLD.qemu, tmp_path, **{VM: vm}) as rig:
        slow_drain(monkeypatch, breaks_after=3)
        monkeypatch.setattr(rescuing, "release_memory", deny)
        error = await fail_once(rig, "lost", denied.wait)
        assert isinstance(error, GuestLeftPaused)
        assert error.effect is Effect.GUEST_PAUSED
        assert "run it as root" in str(error)
        with rig.host.subscribe() as events, trio.fail_after(LIMIT_S):
            allowed.set()
            while (event := await events.receive()).event != "recovered":
                pass
        assert "freed" in event.detail
        await require_well(vm)
        assert rig.host.vm(VM).problem is None


class InOneProcess:
    """The save fails while the daemon lives: its drain breaks, or somebody cancels it."""

    def __init__(self, state_dir: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally) -> None:
        self._state_dir = state_dir
        self._monkeypatch = monkeypatch
        self._chance = random.Random(0)
        self._tally = tally

    async def work(self, forced: int) -> None:
        """Fail so often, on one VM as long as its guest lives."""
        enough = self._tally.forced + forced
        while self._tally.forced < enough and len(self._tally.lost) <= enough:
            state_dir = self._state_dir / f"{self._tally.runs}"
            async with open_dirtying() as vm, open_rig(OLD.qemu, state_dir, **{VM: vm}) as rig:
                try:
                    while self._tally.forced < enough:
                        await self._once(vm, rig, state_dir)
                    await require_saving(rig)
                except (AssertionError, trio.TooSlowError, QsnapError) as exc:
                    self._tally.lost.append(repr(exc))

    async def _once(self, vm: Vm, rig: Rig, state_dir: Path) -> None:
        before = await look(vm, state_dir)
        error, seen = await self._fail(vm, rig, f"lost{self._tally.runs}")
        self._tally.note(seen[0] if seen else None, too_late=error is None)
        await require_well(vm)
        if error is None:
            return
        assert error.effect is Effect.ROLLED_BACK, error
        assert not seen or "freed" in str(error), error
        assert rig.host.vm(VM).state == "running"
        assert await look(vm, state_dir) == before

    async def _fail(
        self, vm: Vm, rig: Rig, name: str
    ) -> tuple[QsnapError | None, list[str | None]]:
        chance, breaks = self._chance, self._tally.runs % 2 == 0
        with self._monkeypatch.context() as patch, examined(vm, self._monkeypatch) as seen:
            if breaks:
                slow_drain(patch, breaks_after=chance.randrange(1, 10))
                return await fail_once(rig, name, trio.sleep_forever), seen
            slow_drain(patch)
            async with vm.monitor() as monitor:

                async def cancel() -> None:
                    await guest_saves(monitor)
                    await trio.sleep(chance.uniform(0, 0.1))
                    await monitor.execute("migrate_cancel")

                return await fail_once(rig, name, cancel), seen


async def kill_while_saving(daemon: Daemon, vm: Vm, name: str, after_s: float) -> bool:
    """Take a checkpoint and kill the daemon that drains it; returns whether it was in time."""
    async with vm.monitor() as monitor, trio.open_nursery() as nursery:
        what = f"snapshot-create-as {VM} {name} --strategy background"
        nursery.start_soon(partial(trio.run_process, daemon.command(what), check=False))
        with trio.fail_after(LIMIT_S):
            await guest_saves(monitor)
            await trio.sleep(after_s)
            daemon.process.kill()
            await daemon.process.wait()
    return (Path(daemon.config).parent / "state" / VM / ".journal.json").exists()


async def work_with_daemons(folder: Path, forced: int, tally: Tally) -> None:
    """Kill the daemon so often; what it leaves is found by the next, or by what systemd runs."""
    chance, enough = random.Random(1), tally.forced + forced
    while tally.forced < enough and len(tally.lost) <= enough:
        place = folder / f"{tally.runs}"
        place.mkdir()
        async with open_dirtying() as vm:
            try:
                while tally.forced < enough:
                    await _kill_once(place, vm, tally, chance.uniform(0, 0.1))
                async with open_daemon(place, {VM: vm}, OLD.qemu.img) as daemon:
                    await daemon.wait_attached(VM)
                    await daemon.ctl(f"snapshot-create-as {VM} afterwards")
            except (AssertionError, trio.TooSlowError, ExceptionGroup) as exc:
                tally.lost.append(repr(exc))


async def _kill_once(folder: Path, vm: Vm, tally: Tally, after_s: float) -> None:
    name, by_systemd = f"lost{tally.runs}", tally.runs % 2 == 0
    async with open_daemon(folder, {VM: vm}, OLD.qemu.img) as daemon:
        await daemon.wait_attached(VM)
        in_time = await kill_while_saving(daemon, vm, name, after_s)
        identity = identify(vm.pid)
        symptom = await trio.to_thread.run_sync(symptom_of, vm, identity)
        tally.note(symptom if protected_memory(identity) else None, too_late=not in_time)
        if by_systemd:
            await reconcile(daemon)
            await require_well(vm)
    async with open_daemon(folder, {VM: vm}, OLD.qemu.img) as daemon:
        await daemon.wait_attached(VM)
        await require_well(vm)
        assert await daemon.ctl(f"domstate {VM}") == "running\n"
        listed = {snapshot["name"] for snapshot in await daemon.json(f"snapshot-list {VM}")}
        assert (name in listed) is not in_time
        disks = {disk["path"] for disk in await daemon.json(f"domblklist {VM}")}
        assert (disks == set(map(str, vm.disks))) is in_time


async def test_guest_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    tally = Tally()
    await InOneProcess(tmp_path / "state", monkeypatch, tally).work(FORCED - FORCED // 3)
    await work_with_daemons(tmp_path, FORCED // 3, tally)
    numbers = {
        "failed": tally.runs,
        "monitor hung": tally.hung,
        "guest frozen": tally.frozen,
        "not freed": len(tally.lost),
    }
    count(record_property, "background snapshots that fail", f"QEMU {SYSTEM_QEMU}", numbers)
    assert tally.forced >= FORCED
    assert len(tally.lost) <= LOST_AT_MOST * tally.forced, tally.lost
