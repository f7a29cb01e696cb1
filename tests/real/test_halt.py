"""Snapshots that end the VM, and such of which nothing is listed."""

from pathlib import Path

import pytest
import trio

from qsnapd.daemon.host import LocalHost
from qsnapd.errors import CommandRefused, Effect, QsnapError
from qsnapd.model.event import EventKind
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.qmp.block import BlockdevAdd, Transaction
from qsnapd.qmp.commands import Command, Cont, Quit
from qsnapd.qmp.migration import Migrate
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
from tests.real.footprint import files, look
from tests.real.steering import steered
from tests.real.test_checkpoint_undone import FailAt
from tests.rig import Rig, open_rig

LIMIT_S = 60.0


async def lifecycle(host: LocalHost, seen: list[str], subscribed: trio.Event) -> None:
    """Note lifecycle events as "Stopped Snapshot"."""
    with host.subscribe() as events:
        subscribed.set()
        async for event in events:
            seen += [f"{event.event} {event.detail}"] * (event.kind is EventKind.LIFECYCLE)


async def take_and_watch(rig: Rig, request: CreateRequest) -> tuple[list[str], tuple[str, ...]]:
    """Take a snapshot; lifecycle events and notes meanwhile."""
    seen: list[str] = []
    async with trio.open_nursery() as nursery:
        subscribed = trio.Event()
        nursery.start_soon(lifecycle, rig.host, seen, subscribed)
        await subscribed.wait()
        job = await rig.host.create(VM, request)
        await job.wait()
        nursery.cancel_scope.cancel()
    return seen, job.info().notes


@each_strategy
async def test_a_checkpoint_ends_the_vm(case: Case, tmp_path: Path) -> None:
    async with open_busy(case.qemu, tmp_path) as (vm, rig):
        with steered(rig.supervisors[VM]) as session:
            seen, notes = await take_and_watch(rig, case.request("s1", halt=True))
        assert vm.pids() == []
        assert Quit in map(type, session.sent)
        assert Cont not in map(type, session.sent)
        resumed = ["Resumed Unpaused"] if case.resumed_by_qemu else []
        assert seen == ["Suspended Paused", *resumed, "Stopped Snapshot"]
        info = rig.host.vm(VM)
        assert (info.state, info.reason) == ("shut off", "from snapshot")
        taken = rig.host.snapshot(VM, "s1")
        assert rig.host.current(VM) == "s1"
        assert taken.state == "running"
        for disk in taken.disks:
            assert disk.overlay is not None
            assert disk.overlay in " ".join(notes)
        assert not [path for path in files(vm, tmp_path) if "journal" in path.name]
        begun = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s1"))
        await vm.wait_checked(since=begun)
        assert vm.slots_report().fine


@each_qemu
async def test_a_disk_only_one_ends_it_too(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        seen, _ = await take_and_watch(rig, CreateRequest(name="s1", disk_only=True, halt=True))
        assert vm.pids() == []
        assert seen == ["Stopped Snapshot"]
        assert rig.host.vm(VM).reason == "from snapshot"
        assert rig.host.snapshot(VM, "s1").is_disk_only


@each_qemu
@pytest.mark.parametrize("command", [BlockdevAdd, Transaction, Migrate])
async def test_what_fails_before_ends_nothing(
    qemu: Qemu, command: type[Command[None]], tmp_path: Path
) -> None:
    async def refuse(sent: Command[object], step: int) -> None:
        await trio.lowlevel.checkpoint()
        if isinstance(sent, command):
            raise CommandRefused(sent.name, "GenericError", "the test does not want it")

    async with open_lazy(qemu, tmp_path) as (vm, rig):
        before = await look(vm, tmp_path)
        with steered(rig.supervisors[VM], before=refuse), pytest.raises(CommandRefused) as failed:
            await rig.create(VM, CreateRequest(strategy=Strategy.STOPPED, halt=True))
        assert failed.value.effect is Effect.ROLLED_BACK
        assert await look(vm, tmp_path) == before
        assert rig.host.vm(VM).state == "running"


@each_qemu
async def test_a_vm_that_does_not_quit_is_killed(qemu: Qemu, tmp_path: Path) -> None:
    async def refuse_quit(command: Command[object], step: int) -> None:
        await trio.lowlevel.checkpoint()
        if isinstance(command, Quit):
            raise CommandRefused("quit", "GenericError", "the test does not want it")

    async with open_lazy(qemu, tmp_path) as (vm, rig):
        with steered(rig.supervisors[VM], before=refuse_quit):
            await rig.create(VM, CreateRequest(name="s1", disk_only=True, halt=True))
        assert vm.pids() == []
        assert rig.host.vm(VM).state == "shut off"


# --- without metadata ------------------------------------------------------------------------


@each_strategy
async def test_memory_without_metadata(case: Case, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    state_dir = tmp_path / "state"
    async with (
        open_vm(case.qemu, BUSY, disks=TWO_DISKS) as vm,
        open_rig(case.qemu, state_dir, **{VM: vm}) as rig,
    ):
        await vm.wait_line(lambda line: line.startswith("OK"))
        await rig.create(VM, CreateRequest(name="s0", disk_only=True))
        job = await rig.host.create(
            VM, case.request("s1", keep_metadata=False, memory_file=str(memory))
        )
        made = await job.wait()
        assert "no snapshot is listed" in " ".join(job.info().notes)
        assert made.name == "s1"
        assert made.memory is not None
        assert made.memory.path == str(memory)
        assert made.memory.file is not None
        assert made.memory.file.inode == memory.stat().st_ino
        assert [m.name for m in rig.host.snapshots(VM)] == ["s0"]
        assert rig.host.current(VM) == "s0"
        left = (".s1", ".journal")
        assert not [path for path in files(vm, state_dir) if path.name.startswith(left)]
        now = await look(vm, state_dir)
        tops = {chain[1] for chain in now.chains.values() if len(chain) > 3}
        assert tops == {disk.overlay for disk in made.disks}
        again = await rig.create(VM, CreateRequest(name="s2", disk_only=True))
        assert again.parent == "s0"
        await vm.wait_checked()
        assert vm.slots_report().fine


@each_qemu
async def test_without_metadata_undone(qemu: Qemu, tmp_path: Path) -> None:
    request = CreateRequest(
        name="s1", keep_metadata=False, memory_file=str(tmp_path / "memory"), strategy="stopped"
    )
    async with open_busy(qemu, tmp_path) as (vm, rig):
        before = await look(vm, tmp_path)
        for step in range(1, 60):
            fail = FailAt(step)
            with steered(rig.supervisors[VM], after=fail.lose_reply):
                try:
                    await rig.create(VM, request)
                except QsnapError:
                    assert await look(vm, tmp_path) == before, fail.failed
                    continue
            if step > 5 and isinstance(fail.failed, Transaction | None):
                break
            # What failed did not matter: nothing is undone, and nothing listed.
            assert rig.host.snapshots(VM) == ()
            (tmp_path / "memory").unlink()
            before = await look(vm, tmp_path)
            request = request.model_copy(update={"name": f"s{step}"})
        assert step > 10
        await vm.wait_checked()
        assert vm.slots_report().fine

