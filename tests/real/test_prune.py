"""Snapshots that need not be kept are deleted: the guest notices nothing, the others restore."""

from pathlib import Path

import pytest
import trio

from qsnapd.errors import Effect, JobCancelled
from qsnapd.model.job import Phase
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    Memory,
    PruneRequest,
    RevertRequest,
)
from qsnapd.model.retention import Pruned
from qsnapd.qmp.block import BlockCommit, JobComplete
from tests.hardware import Disk
from tests.parts import Qemu
from tests.real.cases import NEWEST, VM, each_qemu, open_busy, open_lazy
from tests.real.disk_contents import write
from tests.real.steering import Gate, steered
from tests.real.test_delete import overlays, unseen
from tests.real.test_delete_refused import cancelled_at
from tests.rig import Rig

SMALL = (Disk("qcow2", "virtio", "-blockdev", 4), Disk("raw", "scsi", "-drive", 4))
END_LIMIT_S = 60.0


async def prune(rig: Rig, **request: object) -> Pruned:
    """Prune, after a look at what is foreseen; returns what became of it."""
    what = PruneRequest.model_validate(request)
    foreseen = await rig.host.foresee_prune(VM, what)
    pruning = await rig.host.prune(VM, what)
    await pruning.job.wait_done()
    assert pruning.pruned == foreseen
    assert await rig.host.foresee_prune(VM, what) == Pruned(refused=foreseen.refused)
    return pruning.pruned


@each_qemu
async def test_a_guest_at_work_notices_nothing(qemu: Qemu, tmp_path: Path) -> None:
    """Six snapshots, of which two stay: they restore, and their guest finds all it has written."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        for name in "abcdef":
            await rig.create(VM, CreateRequest(name=name, live=name in "bdf"))
        assert (await prune(rig, keep_last=2)).deleted == tuple("abcd")
        assert {m.name: m.parent for m in rig.host.snapshots(VM)} == {"e": None, "f": "e"}
        await vm.wait_checked()
        assert vm.slots_report().fine
        for name in "ef":
            mark = len(vm.log_lines())
            request = RevertRequest(name=name, memory=Memory.EAGER, discard=True)
            await rig.revert(VM, request)
            await vm.wait_checked(since=mark)
            assert vm.slots_report(mark).bad_lines == ()


@each_qemu
async def test_branches(qemu: Qemu, tmp_path: Path) -> None:
    """a - b - c - before-b, and from b another branch with d and the present state."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        for number, name in enumerate("abc"):
            await write(vm, 1 + number, number, blocks=2)
            await rig.create(VM, CreateRequest(name=name))
        await rig.revert(VM, RevertRequest(name="b", memory=Memory.EAGER))
        await write(vm, 9, 5)
        await rig.create(VM, CreateRequest(name="d"))
        await write(vm, 10, 6)
        [left] = [m.name for m in rig.host.snapshots(VM) if m.name.startswith("before-")]
        async with unseen(qemu, rig, *"abc", left):
            pruned = await prune(rig, keep_last=1)
        assert pruned.deleted == ("a", "c", left, "b"), "what was left goes before b"
        assert len(overlays(vm)) == 2, "of d, for two disks"
        await rig.revert(VM, RevertRequest(name="d"))


@each_qemu
async def test_what_is_in_use_stays_and_the_others_go(qemu: Qemu, tmp_path: Path) -> None:
    """The clone needs c, and what lies below that; what lies over it is nothing to the clone."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        for number, name in enumerate("abcdef"):
            await write(vm, 1 + number, number, blocks=2)
            await rig.create(VM, CreateRequest(name=name))
        await rig.clone(VM, CloneRequest(name="c", clone="other", memory=Memory.EAGER))
        what = PruneRequest(keep_last=1)
        foreseen = await rig.host.foresee_prune(VM, what)
        assert foreseen.deleted == tuple("abde"), "of files nothing is known beforehand"
        async with unseen(qemu, rig, "d", "e"):
            pruning = await rig.host.prune(VM, what)
            await pruning.job.wait_done()
        assert pruning.pruned.deleted == ("d", "e")
        assert [refusal.name for refusal in pruning.pruned.refused] == list("abc")
        assert all("other" in refusal.why for refusal in pruning.pruned.refused)


async def test_the_current_one_stays_and_what_is_half_deleted_goes(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path, disks=SMALL) as (vm, rig):
        for number, name in enumerate("abcd"):
            await write(vm, 1 + number, number, blocks=2)
            await rig.create(VM, CreateRequest(name=name))
        await cancelled_at(rig, "d", JobComplete)
        await rig.revert(VM, RevertRequest(name="a", memory=Memory.EAGER, discard=True))
        assert rig.host.snapshot(VM, "d").deleting
        assert set((await prune(rig, keep_last=1)).deleted) == set("bd")
        assert {m.name for m in rig.host.snapshots(VM)} == set("ac")
        assert rig.host.current(VM) == "a"


@each_qemu
async def test_cancelled(qemu: Qemu, tmp_path: Path) -> None:
    """What is gone by then is gone, and said; the rest is as it was."""
    async with open_lazy(qemu, tmp_path, disks=SMALL) as (vm, rig):
        for number, name in enumerate("abcd"):
            await write(vm, 1 + number, number, blocks=2)
            await rig.create(VM, CreateRequest(name=name))
        gate = Gate(BlockCommit)
        async with unseen(qemu, rig, "a"):
            with steered(rig.supervisors[VM], before=gate):
                pruning = await rig.host.prune(VM, PruneRequest(keep_last=1))
                await gate.reached()
                gate.open()
                with trio.fail_after(END_LIMIT_S):
                    info = pruning.job.info()
                    while info.snapshot != "b" or info.phase is not Phase.MERGING:
                        info = await pruning.job.changed(info)
                rig.host.abort(VM)
                with pytest.raises(JobCancelled) as caught:
                    await pruning.job.wait_done()
        assert caught.value.effect is Effect.PARTIAL
        assert pruning.pruned.deleted == ("a",)
        assert (await prune(rig, keep_last=1)).deleted == tuple("bc")
