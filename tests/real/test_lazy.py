"""What a VM whose RAM maps a snapshot's image can do: all that another one can."""

from pathlib import Path

import pytest

from qsnapd.errors import WrongState
from qsnapd.model.request import CreateRequest, Memory, RevertRequest
from qsnapd.model.snapshot import Manifest, Strategy
from qsnapd.store.leases import mapped_by
from tests.parts import SYSTEM_QEMU, Qemu
from tests.real.cases import NEWEST, VM, each_qemu, open_busy, open_lazy
from tests.real.mapping import sha256


def image_of(manifest: Manifest) -> Path:
    assert manifest.memory is not None
    return Path(manifest.memory.path)


def views_below(folder: Path) -> list[Path]:
    return list(folder.rglob("*.view"))


@pytest.mark.parametrize("strategy", Strategy)
async def test_snapshots_of_a_vm_that_maps_another_one(strategy: Strategy, tmp_path: Path) -> None:
    async with open_busy(NEWEST, tmp_path) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="first", strategy=strategy))
        image, plain = image_of(first), first.machine.process.argv
        before = sha256(image)
        await rig.revert(VM, RevertRequest(name="first", memory=Memory.LAZY, discard=True))
        assert mapped_by(image) == (vm.pid,)
        mark = len(vm.log_lines())
        await vm.wait_checked(since=mark)

        # userfaultfd cannot write-protect a mapping of a file: it is saved in another way
        second = await rig.create(VM, CreateRequest(name="second", live=True))
        assert second.strategy is Strategy.PRECOPY
        assert second.is_mappable
        argv = second.machine.process.argv
        assert not any(str(image) in word or "-incoming" in word for word in argv)
        assert argv[0] == plain[0]
        store = rig.supervisors[VM].store
        with pytest.raises(WrongState, match=rf"snapshot first of VM {VM} is in use: .*{vm.pid}"):
            store.leases.require_unused("first", image)

        for name, memory in (("second", Memory.LAZY), ("first", Memory.EAGER)):
            mark = len(vm.log_lines())
            await rig.revert(VM, RevertRequest(name=name, memory=memory, discard=True))
            await vm.wait_checked(since=mark)
            assert vm.slots_report(mark).bad_lines == ()
        assert mapped_by(image) == mapped_by(image_of(second)) == ()
        store.leases.require_unused("second", image_of(second))
        assert sha256(image) == before


@each_qemu
async def test_lazy_where_it_can_be(qemu: Qemu, tmp_path: Path) -> None:
    """Unless asked for, it is a matter of what is possible."""
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        image = image_of(await rig.create(VM, CreateRequest(name="s")))
        await rig.revert(VM, RevertRequest(name="s", discard=True))
        maps = mapped_by(image) == (vm.pid,)
        assert maps == (qemu.version != SYSTEM_QEMU)
        await rig.revert(VM, RevertRequest(name="s", memory=Memory.EAGER, discard=True))
        assert mapped_by(image) == ()
        assert views_below(tmp_path) == []
