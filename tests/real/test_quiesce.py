"""Quiesced snapshots with a real guest agent: however they go, the guest ends thawed."""

from pathlib import Path

import pytest
import trio

from qsnapd.errors import (
    AgentAbsent,
    AgentUnresponsive,
    CommandRefused,
    Effect,
    FreezeOutcomeUnknown,
    HoldFailed,
    JobCancelled,
    QsnapError,
    VmBusy,
    WrongState,
)
from qsnapd.model.job import Phase
from qsnapd.model.request import DiskRequest
from qsnapd.model.snapshot import Consistency
from qsnapd.qmp.agent import GuestAgent
from qsnapd.qmp.block import Transaction
from qsnapd.qmp.commands import Command
from qsnapd.store.owed_thaw import read_owed_thaw
from qsnapd.vm.provisions import Provisions
from tests.harness import Disk, Vm
from tests.parts import Qemu
from tests.real.cases import NEWEST, VM, each_qemu
from tests.real.quiescing import (
    QUIESCED,
    UNQUIESCED,
    fsck,
    open_agent_vm,
    open_quiet,
    wait_writing,
)
from tests.real.steering import Gate, steered
from tests.rig import Rig, open_rig

LIMIT_S = 60.0


async def is_well(vm: Vm, rig: Rig) -> None:
    """Assert that the guest is thawed, and that the daemon knows."""
    await wait_writing(vm)
    assert read_owed_thaw(rig.supervisors[VM].store) is None
    assert rig.host.vm(VM).problem is None
    assert await rig.host.thaw_filesystems(VM) == 0


def limit_freeze(rig: Rig, vm: Vm, limit_s: float) -> None:
    rig.supervisors[VM].provisions = Provisions(
        agent=GuestAgent(vm.agent), freeze_limit_s=limit_s
    )


@each_qemu
async def test_a_quiesced_file_system_is_clean(qemu: Qemu, tmp_path: Path) -> None:
    async with open_quiet(qemu, tmp_path / "state") as (vm, rig):
        taken = await rig.create(VM, QUIESCED)
        assert taken.consistency is Consistency.AGENT
        assert taken.paused_ms == 0
        job = rig.host.last_job(VM)
        assert job is not None
        assert job.notes == ()
        await wait_writing(vm)
        crashed = await rig.create(VM, UNQUIESCED)
        assert crashed.consistency is Consistency.CRASH
        is_clean, complaints = await fsck(Path(taken.disks[0].frozen), qemu, tmp_path)
        assert is_clean
        assert complaints == ""
        is_clean, _ = await fsck(Path(crashed.disks[0].frozen), qemu, tmp_path)
        assert not is_clean, "else the test shows nothing"
        said = vm.log_lines()
        assert said.count("HOOK freeze") == said.count("HOOK thaw") == 1
        await is_well(vm, rig)


@each_qemu
async def test_agent_killed_while_frozen(qemu: Qemu, tmp_path: Path) -> None:
    """The next one thaws: it knows by a file that the one before has frozen."""
    async with open_quiet(qemu, tmp_path) as (vm, rig):
        gate = Gate(Transaction)
        with steered(rig.supervisors[VM], before=gate):
            job = await rig.host.create(VM, QUIESCED)
            await gate.reached()
            assert rig.host.vm(VM).state == "running"
            await vm.tell("killall -9 qemu-ga")
            await vm.wait_line(lambda line: line == "AGENT 2")
            gate.open()
            taken = await job.wait()
        assert taken.consistency is Consistency.AGENT
        await is_well(vm, rig)


async def test_agent_gone_while_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot stands, and is thawed in the background as soon as there is an agent."""
    monkeypatch.setattr("qsnapd.snapshot.taking.thaw.THAW_LIMIT_S", 2.0)
    async with open_quiet(NEWEST, tmp_path) as (vm, rig):
        gate = Gate(Transaction)
        with steered(rig.supervisors[VM], before=gate), rig.host.subscribe() as events:
            job = await rig.host.create(VM, QUIESCED)
            await gate.reached()
            await vm.tell("touch /run/no-agent; killall -9 qemu-ga")
            gate.open()
            await job.wait()
            [note] = job.info().notes
            assert "may be frozen still" in note
            assert read_owed_thaw(rig.supervisors[VM].store) is not None
            await vm.tell("rm /run/no-agent")
            with trio.fail_after(LIMIT_S):
                async for event in events:
                    if event.event == "recovered":
                        break
        assert "frozen for snapshot q" in event.detail
        await is_well(vm, rig)
        assert set(rig.supervisors[VM].store.snapshots()) == {"q"}


@each_qemu
async def test_the_agent_is_too_slow(qemu: Qemu, tmp_path: Path) -> None:
    """It freezes after all, when nobody waits for that any more."""
    async with open_quiet(qemu, tmp_path) as (vm, rig):
        limit_freeze(rig, vm, 1.0)
        await vm.tell("echo 3 >/run/slow-freeze")
        with pytest.raises(FreezeOutcomeUnknown, match="nothing is frozen now") as caught:
            await rig.create(VM, QUIESCED)
        assert caught.value.effect is Effect.ROLLED_BACK
        assert rig.host.snapshots(VM) == ()
        await is_well(vm, rig)
        assert vm.log_lines().count("HOOK freeze") == 1
        await vm.tell("echo 0 >/run/slow-freeze")
        await rig.create(VM, QUIESCED)
        await is_well(vm, rig)


async def test_the_answer_to_the_thaw_is_lost(tmp_path: Path) -> None:
    async with open_quiet(NEWEST, tmp_path) as (vm, rig):
        await vm.tell("touch /run/die-at-thaw")
        taken = await rig.create(VM, QUIESCED)
        assert taken.consistency is Consistency.AGENT
        assert "AGENT 2" in vm.log_lines()
        await is_well(vm, rig)


@each_qemu
async def test_there_is_no_agent(qemu: Qemu, tmp_path: Path) -> None:
    async with open_quiet(qemu, tmp_path) as (vm, rig):
        await vm.tell("touch /run/no-agent; killall qemu-ga")
        with trio.fail_after(LIMIT_S):
            while (refusal := await refused(rig)) is None or not isinstance(refusal, AgentAbsent):
                pass  # the agent takes a moment to end
        assert "install and start qemu-guest-agent" in str(refusal)
        assert refusal.effect is Effect.NONE
        await vm.tell("rm /run/no-agent")
        await vm.wait_line(lambda line: line == "AGENT 2")
        await wait_writing(vm)


async def refused(rig: Rig) -> QsnapError | None:
    try:
        await rig.create(VM, QUIESCED)
    except QsnapError as exc:
        return exc
    return None


@each_qemu
async def test_the_agent_does_not_answer(qemu: Qemu, tmp_path: Path) -> None:
    async with open_quiet(qemu, tmp_path) as (vm, rig):
        await vm.tell("killall -STOP qemu-ga")
        with pytest.raises(AgentUnresponsive, match="nothing was asked of the guest") as caught:
            await rig.create(VM, QUIESCED)
        assert caught.value.effect is Effect.NONE
        await vm.tell("killall -CONT qemu-ga")
        await is_well(vm, rig)
        assert "HOOK freeze" not in vm.log_lines()
        await rig.create(VM, QUIESCED)
        await is_well(vm, rig)


@each_qemu
async def test_somebody_else_has_the_agent(qemu: Qemu, tmp_path: Path) -> None:
    async with open_quiet(qemu, tmp_path) as (vm, rig):
        async with await trio.open_unix_socket(vm.agent):
            with pytest.raises(AgentUnresponsive, match="somebody else is connected"):
                await rig.create(VM, QUIESCED)
        await rig.create(VM, QUIESCED)
        await is_well(vm, rig)


async def test_cancelled_while_it_freezes(tmp_path: Path) -> None:
    async with open_quiet(NEWEST, tmp_path) as (vm, rig):
        await vm.tell("echo 2 >/run/slow-freeze")
        job = await rig.host.create(VM, QUIESCED)
        await vm.wait_line(lambda line: line == "HOOK freeze")
        assert job.info().phase is Phase.FREEZING
        rig.host.abort(VM)
        with pytest.raises(JobCancelled):
            await job.wait()
        assert rig.host.snapshots(VM) == ()
        await is_well(vm, rig)


async def test_cancelled_while_frozen(tmp_path: Path) -> None:
    async with open_quiet(NEWEST, tmp_path) as (vm, rig):
        gate = Gate(Transaction)
        with steered(rig.supervisors[VM], before=gate):
            job = await rig.host.create(VM, QUIESCED)
            await gate.reached()
            rig.host.abort(VM)
            with pytest.raises(JobCancelled) as caught:
                await job.wait()
        assert caught.value.effect is Effect.ROLLED_BACK
        assert rig.host.snapshots(VM) == ()
        await is_well(vm, rig)


@each_qemu
async def test_the_disks_do_not_move(qemu: Qemu, tmp_path: Path) -> None:
    async def refuse(command: Command[object], step: int) -> None:
        await trio.lowlevel.checkpoint()
        if isinstance(command, Transaction):
            raise CommandRefused("transaction", "GenericError", "planted")

    async with open_quiet(qemu, tmp_path) as (vm, rig):
        with (
            steered(rig.supervisors[VM], before=refuse),
            pytest.raises(CommandRefused, match="planted") as caught,
        ):
            await rig.create(VM, QUIESCED)
        assert caught.value.effect is Effect.ROLLED_BACK
        assert "HOOK thaw" in vm.log_lines()
        await is_well(vm, rig)


async def test_nobody_resumes_a_frozen_guest(tmp_path: Path) -> None:
    """That is held for its storage: it is let go first, because only then can it thaw."""
    request = QUIESCED.model_copy(
        update={"disks": (DiskRequest(target="vdb", snapshot="manual"),), "hold_limit_s": 1.0}
    )
    async with (
        open_agent_vm(NEWEST, [Disk("raw")]) as vm,
        open_rig(NEWEST, tmp_path, **{VM: vm}) as rig,
    ):
        job = await rig.host.create(VM, request)
        with pytest.raises(HoldFailed) as caught:
            await job.wait()
        assert caught.value.effect is Effect.ROLLED_BACK
        assert not [note for note in job.info().notes if "frozen" in note]
        await is_well(vm, rig)


@each_qemu
async def test_by_hand(qemu: Qemu, tmp_path: Path) -> None:
    async with open_quiet(qemu, tmp_path / "state") as (vm, rig):
        [found] = await rig.host.filesystems(VM)
        assert (found.mountpoint, found.name, found.type) == ("/mnt", "vda", "ext4")
        assert await rig.host.freeze_filesystems(VM, ()) == 1
        with pytest.raises(WrongState, match="frozen already"):
            await rig.host.freeze_filesystems(VM, ())
        with pytest.raises(WrongState, match="frozen already, by somebody else"):
            await rig.create(VM, QUIESCED)
        taken = await rig.create(VM, UNQUIESCED)  # as libvirt's manual advises
        assert await rig.host.thaw_filesystems(VM) == 1
        is_clean, complaints = await fsck(Path(taken.disks[0].frozen), qemu, tmp_path)
        assert is_clean
        assert complaints == ""
        assert await rig.host.freeze_filesystems(VM, ("/mnt",)) == 1
        assert await rig.host.thaw_filesystems(VM) == 1
        await is_well(vm, rig)


async def test_by_hand_when_it_is_not_the_time(tmp_path: Path) -> None:
    async with open_quiet(NEWEST, tmp_path) as (vm, rig):
        gate = Gate(Transaction)
        with steered(rig.supervisors[VM], before=gate):
            job = await rig.host.create(VM, QUIESCED)
            await gate.reached()
            with pytest.raises(VmBusy, match="a create job runs"):
                await rig.host.freeze_filesystems(VM, ())
            with pytest.raises(VmBusy, match="in use right now"):
                await rig.host.thaw_filesystems(VM)
            gate.open()
            await job.wait()
        await rig.host.suspend(VM)
        with pytest.raises(WrongState, match="domain is not running"):
            await rig.host.freeze_filesystems(VM, ())
        await rig.host.resume(VM)
        await is_well(vm, rig)
