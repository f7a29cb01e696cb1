"""Disks that are left to their storage: the guest is held for that, and never for longer."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qsnapd.errors import HoldFailed, JobCancelled, SnapshotDiffers, TargetRefused
from qsnapd.model.job import Phase
from qsnapd.model.request import CreateRequest, DiskRequest, RevertRequest
from qsnapd.model.snapshot import Consistency
from qsnapd.snapshot.job import Job
from tests.harness import open_vm
from tests.parts import Qemu
from tests.real.cases import (
    BUSY,
    TWO_DISKS,
    VM,
    Case,
    each_qemu,
    each_strategy,
    open_busy,
    open_lazy,
)
from tests.real.footprint import look
from tests.rig import Rig, open_rig

LIMIT_S = 60.0
MANUAL = (DiskRequest(target="sda", snapshot="manual"),)
DISK_ONLY = CreateRequest(name="s1", disk_only=True, disks=MANUAL)


def write_hook(folder: Path, script: str) -> tuple[str, ...]:
    hook = folder / "hook"
    hook.write_text(f"#!/bin/sh\n{script}\n")
    hook.chmod(0o700)
    return (str(hook), "an argument")


def provide(rig: Rig, **what: object) -> None:
    """Let the VM have *what* by its configuration."""
    supervisor = rig.supervisors[VM]
    supervisor.provisions = replace(supervisor.provisions, **what)  # type: ignore[arg-type]


async def holding(job: Job) -> None:
    """Wait until the job holds the guest for its storage."""
    with trio.fail_after(LIMIT_S):
        info = job.info()
        while info.phase is not Phase.HOLDING:
            assert not info.phase.ended, info.error
            info = await job.changed(info)


@each_strategy
async def test_a_person_takes_it_and_resumes(case: Case, tmp_path: Path) -> None:
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        job = await rig.host.create(VM, case.request("s1", disks=MANUAL))
        await holding(job)
        assert job.info().instruction == f"qsnapctl resume {VM}"
        info = rig.host.vm(VM)
        assert (info.state, info.reason) == ("paused", "creating snapshot")
        status = (await vm.execute("query-status"))["status"]
        assert status in ("paused", "finish-migrate")
        copy = tmp_path / "copy"
        await trio.run_process(["cp", str(vm.disks[1]), str(copy)])
        await rig.host.resume(VM)
        taken = await job.wait()
        assert rig.host.vm(VM).state == "running"
        assert taken.manual_disks == ("sda",)
        [left] = taken.left_out
        assert (left.target, left.frozen) == ("sda", str(vm.disks[1]))
        assert [disk.target for disk in taken.disks] == ["vda"]
        assert taken.consistency is Consistency.MEMORY
        assert taken.paused_ms > 0
        await vm.wait_checked()

        # Back to that moment, the storage first: the guest finds all of one instant.
        with pytest.raises(SnapshotDiffers, match="its storage's own snapshot") as differs:
            await rig.revert(VM, RevertRequest(name="s1", discard=True))
        assert differs.value.can_be_forced
        await rig.host.suspend(VM)
        await trio.run_process(["cp", str(copy), str(vm.disks[1])])
        begun = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s1", discard=True, force=True))
        await vm.wait_checked(since=begun)
        assert vm.slots_report(since=begun).fine


@each_qemu
async def test_the_hook_takes_it(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        seen = tmp_path / "seen"
        hook = write_hook(
            tmp_path,
            f'env > {seen}; echo "$0 $1" >> {seen}; cat >> {seen}; cp {vm.disks[1]} {tmp_path}',
        )
        provide(rig, hook=hook)
        taken = await rig.create(VM, DISK_ONLY)
        assert taken.consistency is Consistency.PAUSED
        assert taken.paused_ms > 0
        lines = seen.read_text().splitlines()
        told = {"QSNAPD_VM=vm1", "QSNAPD_SNAPSHOT=s1", f"QSNAPD_DISKS=sda={vm.disks[1]}"}
        assert told <= {*lines}
        assert lines[-1] == " ".join(hook)
        assert not [line for line in lines if line.startswith(("HOME=", "NOTIFY_SOCKET="))]
        assert rig.host.vm(VM).state == "running"
        await vm.wait_checked()
        assert vm.slots_report().fine


HOOKS = [
    ("echo it cannot >&2; exit 3", 30.0, "ended with status 3.*It says: it cannot"),
    ("kill -9 $$", 30.0, "ended with status -9.*It says nothing"),
    ("exec sleep 1000", 0.3, "did not end in that time"),
    ("sleep 1000 & exit 4", 30.0, "ended with status 4"),
    ("yes >&2 & sleep 1000", 0.3, "did not end in that time"),
]


@each_qemu
async def test_a_hook_that_fails(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        for script, limit_s, words in HOOKS:
            provide(rig, hook=write_hook(tmp_path, f"echo $$ > {tmp_path}/pid; {script}"))
            (tmp_path / "pid").touch()
            before = await look(vm, tmp_path)
            with pytest.raises(HoldFailed, match=words) as failed:
                await rig.create(VM, DISK_ONLY.model_copy(update={"hold_limit_s": limit_s}))
            assert failed.value.effect == "rolled-back"
            assert len(str(failed.value)) < 6000
            assert await look(vm, tmp_path) == before
            pid = int((tmp_path / "pid").read_text())
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        provide(rig, hook=("/nowhere/hook",))
        with pytest.raises(TargetRefused, match="no program to be run"):
            await rig.create(VM, DISK_ONLY)
        assert await look(vm, tmp_path) == before
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_strategy
async def test_nobody_says_that_it_is_done(case: Case, tmp_path: Path) -> None:
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        before = await look(vm, tmp_path)
        request = case.request("s1", disks=MANUAL, hold_limit_s=0.2)
        with pytest.raises(HoldFailed, match="nobody resumed the VM"):
            await rig.create(VM, request)
        assert await look(vm, tmp_path) == before
        job = await rig.host.create(VM, request.model_copy(update={"hold_limit_s": 60.0}))
        await holding(job)
        rig.host.abort(VM)
        with pytest.raises(JobCancelled):
            await job.wait()
        assert await look(vm, tmp_path) == before
        assert rig.host.vm(VM).state == "running"
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_a_paused_vm_stays_paused(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        provide(rig, hook=("/bin/true",))
        await rig.host.suspend(VM)
        taken = await rig.create(VM, DISK_ONLY)
        assert (taken.state, taken.consistency) == ("paused", Consistency.PAUSED)
        assert rig.host.vm(VM).reason == "user"
        assert (await look(vm, tmp_path)).status == "paused"


@each_qemu
async def test_suspended_while_held(qemu: Qemu, tmp_path: Path) -> None:
    """What the user wants counts when the hold is over."""
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        gate = tmp_path / "gate"
        os.mkfifo(gate)
        provide(rig, hook=write_hook(tmp_path, f"cat {gate}"))
        job = await rig.host.create(VM, DISK_ONLY)
        await holding(job)
        await rig.host.suspend(VM)
        await trio.to_thread.run_sync(gate.write_text, "done")
        await job.wait()
        assert (await look(vm, tmp_path)).status == "paused"
        assert rig.host.vm(VM).reason == "user"
        await rig.host.resume(VM)
        assert (await look(vm, tmp_path)).status == "running"


# --- disks left out, when the VM is put back -----------------------------------------------


@each_qemu
async def test_a_disk_left_out_takes_force(qemu: Qemu, tmp_path: Path) -> None:
    left_out = (DiskRequest(target="sda", snapshot="no"),)
    async with (
        open_vm(qemu, BUSY, disks=TWO_DISKS) as vm,
        open_rig(qemu, tmp_path, **{VM: vm}) as rig,
    ):
        await vm.wait_line(lambda line: line.startswith("OK"))
        await rig.create(VM, CreateRequest(name="s1", disks=left_out))
        with pytest.raises(SnapshotDiffers, match="sda: it was left out") as differs:
            await rig.revert(VM, RevertRequest(name="s1"))
        assert differs.value.can_be_forced
        assert rig.host.vm(VM).state == "running"
        await rig.revert(VM, RevertRequest(name="s1", force=True, state="paused"))
        chains = (await look(vm, tmp_path)).chains
        [raw] = [chain for chain in chains.values() if str(vm.disks[1]) in chain]
        assert raw[1:] == (str(vm.disks[1]),)
        kept = next(m for m in rig.host.snapshots(VM) if m.name.startswith("before-"))
        assert [disk.target for disk in kept.left_out] == ["sda"]
        assert [disk.target for disk in kept.disks] == ["vda"]


@each_qemu
async def test_an_image_frozen_since_is_not_written_to(qemu: Qemu, tmp_path: Path) -> None:
    left_out = (DiskRequest(target="sda", snapshot="no"),)
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s1", disks=left_out))
        await rig.create(VM, CreateRequest(name="s2", disk_only=True))
        with pytest.raises(SnapshotDiffers, match="frozen image of snapshot s2") as differs:
            await rig.revert(VM, RevertRequest(name="s1", force=True))
        assert not differs.value.can_be_forced
        assert rig.host.vm(VM).state == "running"
        assert (await look(vm, tmp_path)).status == "running"


@each_qemu
async def test_a_disk_left_out_stays_on_its_newest_image(qemu: Qemu, tmp_path: Path) -> None:
    """The command line names an older one, which is frozen: that is not to be written to."""
    left_out = (DiskRequest(target="sda", snapshot="no"),)
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="s1", disk_only=True))
        [overlay] = [disk.overlay for disk in first.disks if disk.target == "sda"]
        await rig.create(VM, CreateRequest(name="s2", disks=left_out))
        await rig.revert(VM, RevertRequest(name="s2", force=True, discard=True))
        chains = (await look(vm, tmp_path)).chains
        [chain] = [chain for chain in chains.values() if str(vm.disks[1]) in chain]
        assert chain[1:] == (overlay, str(vm.disks[1]))
