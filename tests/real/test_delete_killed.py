"""The daemon or QEMU is killed in the middle of a deletion: it is finished, and nothing is lost."""

from pathlib import Path

import pytest
import trio

from qsnapd.errors import QsnapError
from qsnapd.model.request import CreateRequest, DeleteRequest
from qsnapd.qmp.block import (
    BlockCommit,
    BlockdevDel,
    JobComplete,
    JobDismiss,
    JobFinalize,
)
from qsnapd.qmp.commands import Command
from tests.hardware import Disk
from tests.harness import Vm, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.real.cases import LAZY, VM, each_qemu, open_lazy
from tests.real.disk_contents import content, contents, write, write_by
from tests.real.steering import Gate, steered
from tests.real.test_killed import END_LIMIT_S, open_attached
from tests.rig import Rig
from tests.system.processes import Daemon, reconcile

SMALL = (Disk("qcow2", "virtio", "-blockdev", 4), Disk("raw", "scsi", "-drive", 4))
MOMENTS = ("created", "running", "ready", "pending", "concluded")
"""The status of a block job, as QEMU tells it."""


async def kill_at(daemon: Daemon, monitor: Monitor, name: str, moment: str) -> None:
    await monitor.execute("query-status")  # reads what is left of earlier events
    monitor.events.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(daemon.ctl, f"snapshot-delete {VM} {name}", 1)
        while (await monitor.wait_event("JOB_STATUS_CHANGE"))["data"]["status"] != moment:
            pass
        daemon.process.kill()
        with trio.fail_after(END_LIMIT_S):
            await daemon.process.wait()


async def until_only(daemon: Daemon, *names: str) -> None:
    """Wait until those are the snapshots, and no job runs."""
    with trio.fail_after(END_LIMIT_S):
        while sorted(s["name"] for s in await daemon.json(f"snapshot-list {VM}")) != sorted(
            names
        ) or await daemon.json(f"domjobinfo {VM}"):
            pass  # each question takes a moment


@each_qemu
@pytest.mark.parametrize("moment", MOMENTS)
async def test_daemon_killed(qemu: Qemu, moment: str, tmp_path: Path) -> None:
    """While the middle one of three snapshots is deleted, and then while the newest is."""
    async with (
        open_vm(qemu, LAZY, disks=SMALL, memory_mib=64) as vm,
        vm.monitor() as monitor,
    ):
        async with open_attached(tmp_path, vm, qemu) as daemon:
            for number, snapshot in enumerate("abc"):
                await write_by(monitor, 1 + number, number, blocks=3)
                await daemon.ctl(f"snapshot-create-as {VM} {snapshot} --disk-only")
            await write_by(monitor, 9, 1)
            frozen = await shown(qemu, daemon, "a")
            now = await shows(qemu, daemon)
        left = set("abc")
        for name in "bc":
            if name == "b" and moment == "ready":
                continue  # of active layers only
            left.remove(name)
            async with open_attached(tmp_path, vm, qemu) as daemon:
                await kill_at(daemon, monitor, name, moment)
                await reconcile(daemon)
            assert not [job["id"] for job in await monitor.execute("query-jobs")]
            async with open_attached(tmp_path, vm, qemu) as daemon:
                await until_only(daemon, *left)
                await write_by(monitor, 9, 1)  # its requests are not held back
                assert await shown(qemu, daemon, "a") == frozen
                assert await shows(qemu, daemon) == now
                await daemon.ctl(f"snapshot-fsck {VM}")


async def shown(qemu: Qemu, daemon: Daemon, name: str) -> list[str]:
    disks = (await daemon.json(f"snapshot-info {VM} {name}"))["disks"]
    return [content(qemu, disk["frozen"], disk["frozen_format"]) for disk in disks]


async def shows(qemu: Qemu, daemon: Daemon) -> list[str]:
    disks = await daemon.json(f"domblklist {VM}")
    return [content(qemu, d["path"], d["format"]) for d in disks if d["left_out"] is None]


STEPS: tuple[type[Command[object]], ...] = (
    BlockCommit,
    JobComplete,
    JobFinalize,
    JobDismiss,
    BlockdevDel,
)


@each_qemu
async def test_qemu_killed(qemu: Qemu, tmp_path: Path) -> None:
    """What goes on offline ends where it would have ended."""
    for step in STEPS:
        async with open_lazy(qemu, tmp_path / step.__name__, disks=SMALL) as (vm, rig):
            await write(vm, 1, 0, blocks=8)
            for number, name in enumerate("ab"):
                await rig.create(VM, CreateRequest(name=name, disk_only=True))
                await write(vm, 2 + number, number, blocks=2)
            before = await contents(qemu, [rig.host.snapshot(VM, "a")])
            shows = await present(qemu, rig)
            await kill_qemu_at(step, rig, vm)
            assert await contents(qemu, rig.host.snapshots(VM)) == before
            # The newest image, under one name or the other: each disk has one more than a's.
            images = sorted(vm.folder.glob("*.after-*"))
            assert len(images) == len(vm.disks), step
            assert {content(qemu, image, "qcow2") for image in images} == set(shows), step
            assert (await rig.host.fsck(VM, repair=False)).clean


async def present(qemu: Qemu, rig: Rig) -> tuple[str, ...]:
    return tuple(
        content(qemu, disk.path or "", "raw" if disk.format == "raw" else "qcow2")
        for disk in await rig.host.disks(VM)
        if disk.left_out is None
    )


async def kill_qemu_at(step: type[Command[object]], rig: Rig, vm: Vm) -> None:
    """Delete the snapshot b, and kill QEMU before that command; returns when b is gone."""
    gate = Gate(step)
    supervisor = rig.supervisors[VM]
    with steered(supervisor, before=gate):
        job = await rig.host.delete(VM, DeleteRequest(name="b"))
        await gate.reached()
        await vm.kill()
        gate.open()
        with trio.fail_after(END_LIMIT_S), pytest.raises(QsnapError):
            await job.wait()
    with trio.fail_after(END_LIMIT_S):
        while [m.name for m in rig.host.snapshots(VM)] != ["a"] or supervisor.job:  # noqa: ASYNC110
            await trio.sleep(0.05)
