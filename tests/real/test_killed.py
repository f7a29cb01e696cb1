"""The daemon or QEMU is killed in the middle of a job: the guest goes on, nothing is left."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.errors import QsnapError
from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.commands import AddFd, Cont
from qsnapd.qmp.migration import Migrate, MigrateContinue, QueryMigrate
from tests.harness import Disk, Vm, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.real.cases import BUSY, STRATEGIES, TWO_DISKS, VM, Case, each_strategy, open_busy
from tests.real.footprint import files, look, look_through
from tests.real.steering import Gate, steered
from tests.system.processes import Daemon, open_daemon, reconcile

END_LIMIT_S = 60.0

MOMENTS = {
    Strategy.STOPPED: ("STOP", "active", "completed"),
    Strategy.PRECOPY: ("active", "pre-switchover", "device", "completed"),
    Strategy.BACKGROUND: ("STOP", "active", "completed"),
}
"""When to kill: at a STOP event, or when the migration has this status."""

each_moment = pytest.mark.parametrize(
    ("case", "moment"),
    [(case, moment) for case in STRATEGIES for moment in MOMENTS[case.strategy]],
    ids=str,
)


async def moment_comes(monitor: Monitor, moment: str) -> None:
    """Wait for it, as QEMU itself tells it."""
    if moment == "STOP":
        await monitor.wait_event("STOP")
        return
    while (await monitor.wait_event("MIGRATION"))["data"]["status"] != moment:
        pass


async def until_attached(daemon: Daemon) -> None:
    with trio.fail_after(END_LIMIT_S):
        while not (await daemon.json(f"dominfo {VM}"))["connected"]:  # noqa: ASYNC110
            await trio.sleep(0.1)


async def kill_at(daemon: Daemon, monitor: Monitor, case: Case, moment: str) -> None:
    """Take a checkpoint, and kill the daemon in the middle of it."""
    what = f"snapshot-create-as {VM} s --strategy {case.strategy}"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon.ctl, what, 1)
        await moment_comes(monitor, moment)
        daemon.process.kill()
        with trio.fail_after(END_LIMIT_S):
            await daemon.process.wait()
