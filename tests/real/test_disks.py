"""Which disks take part in a checkpoint, under which names, and what their overlays carry on."""

from pathlib import Path

from qsnapd.model.request import CreateRequest, DiskRequest, RevertRequest
from qsnapd.qmp.block import Transaction
from tests.harness import Slots, open_vm
from tests.parts import Qemu
from tests.real.cases import VM, Case, each_qemu, each_strategy, every_kind, open_lazy
from tests.real.footprint import look
from tests.real.steering import steered
from tests.rig import open_rig

EVERY_KIND = every_kind(ide_drive="raw")


@each_qemu
async def test_every_kind_of_disk(qemu: Qemu, tmp_path: Path) -> None:
    medium = tmp_path / "medium.iso"
    medium.write_bytes(bytes(1 << 20))
    cdrom = ["-drive", f"file={medium},format=raw,media=cdrom,if=ide,index=3"]
    async with (
        open_vm(qemu, Slots(memory_mib=4, dirty_mib_s=10), disks=EVERY_KIND, extra=cdrom) as vm,
        open_rig(qemu, tmp_path / "state", **{VM: vm}) as rig,
    ):
        await vm.wait_line(lambda line: line.startswith("OK"))
        with steered(rig.supervisors[VM]) as session:
            manifest = await rig.create(VM, CreateRequest(name="s"))
        [transaction] = [sent for sent in session.sent if isinstance(sent, Transaction)]
        assert len(transaction.actions) == len(EVERY_KIND) - 1
        assert {disk.frozen for disk in manifest.disks} == {
            str(image)
            for disk, image in zip(EVERY_KIND, vm.disks, strict=True)
            if not disk.read_only
        }
        left_out = {disk.path: disk.left_out for disk in await rig.host.disks(VM) if disk.left_out}
        assert left_out == {str(vm.disks[-1]): "read-only", str(medium): "removable"}

        mark = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s"))
        await vm.wait_checked()
        assert vm.slots_report(mark).bad_lines == ()


@each_qemu
async def test_disks_as_asked_for(qemu: Qemu, tmp_path: Path) -> None:
    overlay = tmp_path / "elsewhere" / "overlay"
    overlay.parent.mkdir()
    async with open_lazy(qemu, tmp_path / "state") as (vm, rig):
        asked = (
            DiskRequest(target="vda", file=str(overlay)),
            DiskRequest(target="sda", snapshot="no"),
        )
        manifest = await rig.create(VM, CreateRequest(name="s", disks=asked))
        [disk] = manifest.disks
        assert (disk.target, disk.overlay, disk.frozen) == ("vda", str(overlay), str(vm.disks[0]))
        now = {disk.target: disk.path for disk in await rig.host.disks(VM)}
        assert (now["vda"], now["sda"]) == (str(overlay), str(vm.disks[1]))


@each_strategy
async def test_dirty_bitmaps_go_on_in_the_overlays(case: Case, tmp_path: Path) -> None:
    async with open_lazy(case.qemu, tmp_path) as (vm, rig):
        for name, persistent in {"backup": True, "scratch": False}.items():
            await vm.execute(
                "block-dirty-bitmap-add", node="disk0", name=name, persistent=persistent
            )
        for snapshot in ("s1", "s2"):
            await rig.create(VM, case.request(snapshot))
            now = await look(vm, tmp_path)
            [recording] = [names for names in now.bitmaps.values() if names]
            assert recording == ("backup",)
