"""A VM's state and reason: while a job holds the guest, and whatever else stops it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qsnapd.errors import JobCancelled, WrongState
from qsnapd.model.event import EventKind
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.migration import Migrate, MigrateContinue
from tests.harness import Pages, Slots, open_vm
from tests.parts import SYSTEM_QEMU, Qemu
from tests.real.cases import (
    NEWEST,
    STRATEGIES,
    VM,
    Case,
    each_qemu,
    each_strategy,
    open_lazy,
)
from tests.real.footprint import look
from tests.real.steering import Gate, steered
from tests.rig import Rig, open_rig

HELD = "paused (creating snapshot)"
STATE_LIMIT_S = 30.0
each_that_can_stay_paused = pytest.mark.parametrize(
    "case", [case for case in STRATEGIES if not case.resumed_by_qemu], ids=str
)


def gate_while_held(case: Case) -> Gate:
    """Return a hook that holds the job while it holds the guest."""
    return Gate(MigrateContinue if case.strategy is Strategy.PRECOPY else Migrate)


def seen(rig: Rig) -> str:
    """Return what a client sees, as `virsh domstate --reason` would print it."""
    info = rig.host.vm(VM)
    return f"{info.state} ({info.reason})"


async def until_seen(rig: Rig, wanted: str) -> None:
    """Wait until a client sees *wanted*."""
    with trio.fail_after(STATE_LIMIT_S), rig.host.subscribe() as events:
        while seen(rig) != wanted:
            await events.receive()


@asynccontextmanager
async def held(rig: Rig, case: Case, name: str) -> AsyncIterator[None]:
    """Take a checkpoint; during the block the guest is held for it."""
    gate = gate_while_held(case)
    async with trio.open_nursery() as nursery:
        with steered(rig.supervisors[VM], before=gate):
            nursery.start_soon(rig.create, VM, case.request(name))
            await gate.reached()
            yield
            gate.open()


@each_strategy
async def test_guest_held_for_a_snapshot(case: Case, tmp_path: Path) -> None:
    async with open_lazy(case.qemu, tmp_path) as (vm, rig):
        with rig.host.subscribe() as events:
            async with held(rig, case, "s"):
                await until_seen(rig, HELD)
                info = rig.host.vm(VM)
                assert (info.state_number, info.reason_number) == (3, 9)
                assert (await vm.execute("query-status"))["running"] is False
            assert seen(rig) == "running (unpaused)"
            assert (await vm.execute("query-status"))["running"] is True
            lifecycle = []
            while (event := await events.receive()).event != "created":
                if event.kind is EventKind.LIFECYCLE:
                    lifecycle.append((event.event, event.detail))
        assert lifecycle == [("Suspended", "Paused"), ("Resumed", "Unpaused")]


@each_strategy
async def test_user_suspends_while_the_guest_is_held(case: Case, tmp_path: Path) -> None:
    async with open_lazy(case.qemu, tmp_path) as (vm, rig):
        async with held(rig, case, "s1"):
            await until_seen(rig, HELD)
            await rig.host.suspend(VM)
            assert seen(rig) == "paused (user)"
        assert seen(rig) == "paused (user)"
        assert (await vm.execute("query-status"))["running"] is False
        await rig.host.resume(VM)
        assert seen(rig) == "running (unpaused)"
        async with held(rig, case, "s2"):
            await until_seen(rig, HELD)
            await rig.host.suspend(VM)
            await rig.host.resume(VM)
            assert seen(rig) == HELD
        assert seen(rig) == "running (unpaused)"
        assert (await vm.execute("query-status"))["running"] is True


@each_that_can_stay_paused
async def test_suspended_guest_stays_suspended(case: Case, tmp_path: Path) -> None:
    async with open_lazy(case.qemu, tmp_path) as (vm, rig):
        await rig.host.suspend(VM)
        before = await look(vm, tmp_path)
        manifest = await rig.create(VM, case.request("s"))
        assert (manifest.state, manifest.reason, manifest.paused_ms) == ("paused", "PAUSED_USER", 0)
        assert seen(rig) == "paused (user)"
        after = await look(vm, tmp_path)
        assert (after.capabilities, after.parameters) == (before.capabilities, before.parameters)
        await rig.host.resume(VM)
        assert seen(rig) == "running (unpaused)"
        await rig.revert(VM, RevertRequest(name="s"))
        assert seen(rig) == "paused (from snapshot)"
        await rig.host.resume(VM)
        assert (await vm.execute("query-status"))["running"] is True


@each_that_can_stay_paused
async def test_suspended_guest_stays_suspended_after_a_cancel(case: Case, tmp_path: Path) -> None:
    async with open_lazy(case.qemu, tmp_path) as (vm, rig):
        await rig.host.suspend(VM)
        before = await look(vm, tmp_path)
        gate = gate_while_held(case)
        with steered(rig.supervisors[VM], before=gate):
            job = await rig.host.create(VM, case.request("cancelled"))
            await gate.reached()
            assert seen(rig) == "paused (user)"
            job.cancel()
            with pytest.raises(JobCancelled):
                await job.wait()
        assert seen(rig) == "paused (user)"
        after = await look(vm, tmp_path)
        if case.qemu.version == SYSTEM_QEMU:
            # It closes removed descriptors when the guest runs, no sooner, and takes a
            # paused guest out of a migration, ended in whatever way, as "postmigrate".
            assert after.status in ("paused", "postmigrate")
            after = replace(after, status=before.status, fdsets=(), opened=before.opened)
        assert after == before
        await rig.host.resume(VM)
        assert (await rig.create(VM, case.request("s"))).paused_ms > 0


@each_qemu
async def test_reason_survives_a_restart(qemu: Qemu, tmp_path: Path) -> None:
    async with open_vm(qemu, Pages(), memory_mib=64) as vm:
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            assert seen(rig) == "running (unknown)"
            await rig.host.suspend(VM)
            assert seen(rig) == "paused (user)"
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            assert seen(rig) == "paused (user)"
            await rig.create(VM, CreateRequest(name="s"))
            assert seen(rig) == "paused (user)"
            await rig.host.resume(VM)
            assert seen(rig) == "running (unpaused)"
        await vm.execute("stop")
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            assert seen(rig) == "paused (unknown)"


@each_qemu
async def test_guest_that_ended(qemu: Qemu, tmp_path: Path) -> None:
    extra = ["-action", "reboot=shutdown,shutdown=pause"]
    guest = Slots(kernel_options="unknown_nmi_panic")  # which reboots at once: see panic=-1
    async with open_vm(qemu, guest, extra=extra) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            await vm.execute("inject-nmi")
            await until_seen(rig, "in shutdown (user)")
            with pytest.raises(WrongState, match="in shutdown"):
                await rig.create(VM, CreateRequest())
            with pytest.raises(WrongState, match="in shutdown"):
                await rig.host.resume(VM)
            await vm.execute("quit")
            await until_seen(rig, "shut off (shutdown)")
            with pytest.raises(WrongState, match="shut off"):
                await rig.create(VM, CreateRequest())


async def test_guest_that_was_reset_or_killed(tmp_path: Path) -> None:
    async with (
        open_vm(NEWEST, Pages(spin=20000), memory_mib=64) as vm,
        open_rig(NEWEST, tmp_path, **{VM: vm}) as rig,
    ):
        async with vm.monitor() as monitor:
            await monitor.execute("system_reset")
            await monitor.wait_event("RESET")
        assert rig.host.vm(VM).state == "running"
        await vm.kill()
        await until_seen(rig, "shut off (crashed)")


@each_qemu
async def test_disk_that_fails(qemu: Qemu, tmp_path: Path) -> None:
    image = tmp_path / "failing.raw"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    failing = [
        *("-blockdev", f"driver=file,node-name=below,filename={image}"),
        *("-blockdev", "driver=blkdebug,node-name=failing,image=below,"
          "inject-error.0.event=none,inject-error.0.iotype=write,inject-error.0.once=on"),
        *("-device", "virtio-blk-pci,drive=failing,id=failing,werror=stop"),
    ]  # fmt: skip
    async with (
        open_vm(qemu, Slots(), extra=failing) as vm,
        open_rig(qemu, tmp_path / "state", **{VM: vm}) as rig,
    ):
        await until_seen(rig, "paused (I/O error)")
        await rig.host.resume(VM)
        assert seen(rig) == "running (unpaused)"
        await vm.wait_line(lambda line: line.startswith("OK"))
