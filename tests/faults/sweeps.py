"""Doing the same job again and again, each time with something else going wrong.

A sweep returns what it found instead of asserting, so that a test can also show that it
finds a bug planted on purpose.
"""

import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio
import trio.testing

from qsnapd.errors import QsnapError
from qsnapd.model.snapshot import Manifest
from tests.faults.fake_transport import Fault
from tests.faults.scene import Case, Scene, open_scene

RUN_LIMIT_S = 3000.0
"""By the test's clock: nothing waits for ever."""

Attempt = Callable[[Scene, int], Awaitable[tuple[list[str], bool]]]
"""One run; returns what was wrong, and whether it came as far as number *n*."""
Work = Callable[[Scene], Awaitable[Manifest]]
"""What is cancelled or hit by a fault; by default the case's checkpoint."""


class CancelAt(trio.abc.Instrument):
    """Cancels its scope just before the *n*-th step of the task that made it."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.scope = trio.CancelScope()
        self._task = trio.lowlevel.current_task()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


def sweep(case: Case, attempt: Attempt) -> list[str]:
    """Attempt with 1, 2, 3 ... until a run ends before its number; return what went wrong."""
    found: list[str] = []

    async def run(n: int) -> bool:
        async with open_scene(case) as scene:
            with trio.fail_after(RUN_LIMIT_S):
                complaints, reached = await attempt(scene, n)
        found.extend(f"at {n}: {complaint}" for complaint in complaints)
        return reached

    for n in itertools.count(1):
        clock = trio.testing.MockClock(autojump_threshold=0)
        if not trio.run(partial(run, n), clock=clock):
            break
    return found


def cancel_sweep(case: Case, work: Work = Scene.take_one) -> list[str]:
    """Cancel the work before each of its steps in turn."""

    async def attempt(scene: Scene, n: int) -> tuple[list[str], bool]:
        probe, manifest = CancelAt(n), None
        trio.lowlevel.add_instrument(probe)
        with probe.scope:
            manifest = await work(scene)
        trio.lowlevel.remove_instrument(probe)
        return scene.complaints(manifest), probe.left <= 0

    return sweep(case, attempt)


def fault_sweep(case: Case, fault: Fault, work: Work = Scene.take_one) -> list[str]:
    """Let each QMP command in turn meet *fault*; what stays undone, the next daemon does."""

    async def attempt(scene: Scene, n: int) -> tuple[list[str], bool]:
        scene.transport.faults[n] = fault
        sent, manifest = scene.transport.sent, None
        with suppress(QsnapError):
            manifest = await work(scene)
        reached = len(sent) >= n
        if scene.store.journal.read() is not None:
            await scene.attach()
            await scene.recover()
            manifest = scene.store.snapshots().get("s1")
        where = f" ({sent[n - 1]})" if reached else ""
        return [f"{complaint}{where}" for complaint in scene.complaints(manifest)], reached

    return sweep(case, attempt)


def recovery_sweep(case: Case, lost_at: str) -> list[str]:
    """Lose QEMU at the command *lost_at*, then again at each command of the recovery."""

    async def attempt(scene: Scene, n: int) -> tuple[list[str], bool]:
        scene.transport.faults[lost_at] = Fault.LOST_AFTER
        with suppress(QsnapError):
            await scene.take_one()
        await scene.attach()
        scene.transport.faults[n] = Fault.LOST_AFTER
        with suppress(QsnapError):
            await scene.recover()
        reached = scene.transport.lost
        await scene.attach()
        await scene.recover()
        return scene.complaints(scene.store.snapshots().get("s1")), reached

    return sweep(case, attempt)


def death_sweep(case: Case) -> list[str]:
    """Let QEMU end at each command in turn."""

    async def attempt(scene: Scene, n: int) -> tuple[list[str], bool]:
        scene.transport.faults[n] = Fault.LOST_AFTER
        with suppress(QsnapError):
            await scene.take_one()
        reached = scene.transport.lost
        await scene.recover_offline()
        return scene.offline_complaints(), reached

    return sweep(case, attempt)
