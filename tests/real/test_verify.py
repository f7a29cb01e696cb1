"""A verification finds what is wrong with a snapshot, all of it, and touches nothing."""

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.errors import UnknownSnapshot, VmBusy
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.verification import Outcome, Verification
from tests.hardware import Disk, MachineType, Ram
from tests.harness import Vm, open_vm
from tests.parts import Qemu
from tests.real.cases import (
    LAZY,
    NEWEST,
    VM,
    Case,
    each_case,
    each_qemu,
    open_busy,
    open_lazy,
)
from tests.real.damage import (
    Spoilt,
    marked_corrupt,
    missing,
    over,
    spoilt_device,
    spoilt_page,
    written,
)
from tests.real.footprint import look
from tests.rig import open_rig

REFCOUNT_TABLE = slice(48, 56)
"""Where a qcow2 header says where it is."""


def wrong(verification: Verification) -> dict[str, list[str]]:
    """Return what is wrong, by what was looked at."""
    found: dict[str, list[str]] = {}
    for check in verification.checks:
        if check.outcome is Outcome.WRONG:
            found.setdefault(check.what, []).append(check.detail)
    assert verification.sound is not bool(found)
    return found


def outcomes(verification: Verification) -> dict[str, Outcome]:
    return {check.what: check.outcome for check in verification.checks}


def content(manifest: Manifest) -> Mapping[Path, str]:
    """Return a digest of each of the snapshot's files."""
    assert manifest.memory is not None
    images = (file.path for disk in manifest.disks for file in disk.chain)
    return {
        Path(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for path in (manifest.memory.path, *images)
    }


def children() -> list[int]:
    """Return our own processes; the VM is not among them."""
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


@asynccontextmanager
async def untouched(vm: Vm, state_dir: Path, manifest: Manifest) -> AsyncIterator[None]:
    """Check that neither VM nor snapshot are any different after the block."""
    before, files, pid = await look(vm, state_dir), content(manifest), vm.pid
    yield
    assert await look(vm, state_dir) == before
    assert content(manifest) == files
    assert vm.pid == pid
    assert children() == []


@each_qemu
async def test_deep_beside_a_guest_at_work(qemu: Qemu, tmp_path: Path) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s", live=True))
        before = content(manifest)
        assert wrong(await rig.host.verify(VM, "s", deep=True)) == {}
        assert content(manifest) == before
        mark = len(vm.log_lines())
        await vm.wait_checked()
        assert vm.slots_report(mark).bad_lines == ()


@each_case
async def test_every_kind_of_snapshot_is_sound(case: Case, tmp_path: Path) -> None:
    async with open_lazy(case.qemu, tmp_path) as (vm, rig):
        await rig.create(VM, case.request("first", hash_memory=False))
        manifest = await rig.create(VM, case.request("second"))
        async with untouched(vm, tmp_path, manifest):
            shallow = await rig.host.verify(VM, "second", deep=False)
            deep = await rig.host.verify(VM, "second", deep=True)
        assert wrong(shallow) == wrong(deep) == {}
        names = ["memory image", "memory SHA-256", "disk sda", "disk vda"]
        assert outcomes(shallow) == dict.fromkeys(names, Outcome.SOUND)
        assert outcomes(deep) == dict.fromkeys([*names, "restore"], Outcome.SOUND)
        without_hash = await rig.host.verify(VM, "first", deep=False)
        assert outcomes(without_hash)["memory SHA-256"] is Outcome.UNCHECKED
        assert without_hash.sound


@each_qemu
async def test_only_a_deep_one_finds_a_damaged_device(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s", hash_memory=False))
        with spoilt_device(manifest):
            async with untouched(vm, tmp_path, manifest):
                assert wrong(await rig.host.verify(VM, "s", deep=False)) == {}
                found = wrong(await rig.host.verify(VM, "s", deep=True))
        assert found.keys() == {"restore"}
        assert "mc146818rtc" in found["restore"][0]
        assert wrong(await rig.host.verify(VM, "s", deep=True)) == {}


@each_qemu
async def test_everything_that_is_wrong_is_listed(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="first"))
        manifest = await rig.create(VM, CreateRequest(name="second"))
        assert manifest.memory is not None
        images = {disk.target: [Path(f.path) for f in disk.chain] for disk in manifest.disks}
        with ExitStack() as damages:
            damages.enter_context(spoilt_page(manifest))
            damages.enter_context(marked_corrupt(images["vda"][1]))
            damages.enter_context(over(images["vda"][0], None))
            damages.enter_context(missing(images["sda"][1]))
            found = wrong(await rig.host.verify(VM, "second", deep=False))
        assert found.keys() == {"memory image", "memory SHA-256", "disk vda", "disk sda"}
        assert "other content" in found["memory SHA-256"][0]
        assert "is missing" in found["disk sda"][0]
        assert "no longer an overlay over" in found["disk vda"][0]
        assert wrong(await rig.host.verify(VM, "second", deep=True)) == {}


@each_qemu
async def test_content_of_a_page(qemu: Qemu, tmp_path: Path) -> None:
    """Only the hash knows what a page must hold."""
    async with open_lazy(qemu, tmp_path) as (_, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        assert manifest.memory is not None
        with spoilt_content(Path(manifest.memory.path)):
            found = wrong(await rig.host.verify(VM, "s", deep=False))
        assert found.keys() == {"memory SHA-256"}


def spoilt_content(path: Path) -> Spoilt:
    """Spoil the inside of a page that is there from the start: the firmware's."""
    return written(path, (path.read_bytes().index(b"SeaBIOS"), b"\x55\xaa\x55\xaa"))


def without_refcounts(path: Path) -> Spoilt:
    """Let a qcow2 file have lost its table of counts (docs/interop/qcow2.txt)."""
    table = int.from_bytes(path.read_bytes()[REFCOUNT_TABLE], "big")
    return written(path, (table, bytes(8)))


@each_qemu
async def test_tables_of_a_frozen_image(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=[Disk()]) as (_, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        [disk] = manifest.disks
        frozen = Path(disk.frozen)
        with without_refcounts(frozen):
            found = wrong(await rig.host.verify(VM, "s", deep=False))
        assert found.keys() == {"disk vda"}
        assert "is damaged" in found["disk vda"][0]
        with written(frozen, (0, bytes(4))):
            found = wrong(await rig.host.verify(VM, "s", deep=True))
        assert found.keys() == {"disk vda", "restore"}


@each_qemu
async def test_disks_that_are_left_out_and_in_use(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        request = CreateRequest(name="s", disks=(DiskRequest(target="vda", snapshot="no"),))
        manifest = await rig.create(VM, request)
        async with untouched(vm, tmp_path, manifest):
            assert wrong(await rig.host.verify(VM, "s", deep=True)) == {}


@each_qemu
@pytest.mark.parametrize(
    ("machine", "ram"),
    [
        ("pc", "memory-backend-ram"),
        ("pc", "shared-file"),
        ("q35", "memfd"),
        ("q35", "memory-backend-file"),
        ("microvm", "default"),
    ],
)
async def test_deep_on_other_hardware(
    qemu: Qemu, machine: MachineType, ram: Ram, tmp_path: Path
) -> None:
    """RAM that the VM shares with a file is still the VM's."""
    async with (
        open_vm(qemu, LAZY, disks=[Disk()], memory_mib=64, machine=machine, ram=ram) as vm,
        open_rig(qemu, tmp_path, **{VM: vm}) as rig,
    ):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        await rig.host.suspend(VM)
        before = ram_files(vm)
        async with untouched(vm, tmp_path, manifest):
            assert wrong(await rig.host.verify(VM, "s", deep=True)) == {}
        assert ram_files(vm) == before
        assert bool(before) == (ram in ("memory-backend-file", "shared-file"))


def ram_files(vm: Vm) -> list[bytes]:
    return [path.read_bytes() for path in vm.folder.glob("ram*")]


@pytest.mark.parametrize("qemu", [NEWEST], ids=str)
async def test_one_deep_one_at_a_time(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        refused: list[str] = []

        async def deep() -> None:
            try:
                assert (await rig.host.verify(VM, "s", deep=True)).sound
            except VmBusy as exc:
                refused.append(str(exc))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(deep)
            nursery.start_soon(deep)
            nursery.start_soon(rig.host.verify, VM, "s")
        assert len(refused) == 1
        assert "one at a time" in refused[0]
        await deep()
        assert len(refused) == 1
        with pytest.raises(UnknownSnapshot):
            await rig.host.verify(VM, "other", deep=True)


@each_qemu
async def test_cancelled_at_any_time_it_leaves_nothing(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        began_s = trio.current_time()
        await rig.host.verify(VM, "s", deep=True)
        took_s = trio.current_time() - began_s
        async with untouched(vm, tmp_path, manifest):
            for part in range(1, 10):
                with trio.move_on_after(took_s * part / 10):
                    await rig.host.verify(VM, "s", deep=True)
                assert children() == []
        assert (await rig.host.verify(VM, "s", deep=True)).sound
