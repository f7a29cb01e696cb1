"""What cannot be is refused before the guest is touched, in words, and leaves nothing behind."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.errors import (
    BadRequest,
    Blocked,
    CapabilityMissing,
    QsnapError,
    SnapshotExists,
    StoreFull,
    TargetRefused,
    UnknownVm,
    VmBusy,
    WrongState,
)
from qsnapd.image.files import free_bytes
from qsnapd.model.request import CreateRequest, DiskRequest
from qsnapd.model.snapshot import ImageFormat, Strategy
from qsnapd.qmp.migration import Migrate
from tests.harness import Vm, open_vm
from tests.monitor import Monitor
from tests.parts import SYSTEM_QEMU, Qemu, find_qemu
from tests.real.cases import LAZY, NEWEST, VM, each_qemu, open_lazy
from tests.real.footprint import look_through
from tests.real.steering import Gate, steered
from tests.rig import Rig, open_rig

MIB = 1 << 20


class Refusals:
    """Tries one request after the other on one VM, and watches it from beside."""

    def __init__(self, rig: Rig, vm: Vm, state_dir: Path, monitor: Monitor) -> None:
        self._rig = rig
        self._vm = vm
        self._state_dir = state_dir
        self._monitor = monitor

    async def require(self, error: type[QsnapError], words: str, request: CreateRequest) -> None:
        """Ask for what cannot be."""
        before = await look_through(self._monitor, self._vm, self._state_dir)
        self._monitor.events.clear()
        with pytest.raises(error, match=words):
            await self._rig.create(VM, request)
        assert await look_through(self._monitor, self._vm, self._state_dir) == before
        assert "STOP" not in {event["event"] for event in self._monitor.events}


@asynccontextmanager
async def refusals(rig: Rig, vm: Vm, state_dir: Path) -> AsyncIterator[Refusals]:
    async with vm.monitor() as monitor:
        yield Refusals(rig, vm, state_dir, monitor)


@each_qemu
async def test_requests_that_cannot_be(qemu: Qemu, tmp_path: Path) -> None:
    state_dir, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    elsewhere.mkdir()
    foreign = elsewhere / "foreign"
    foreign.write_text("precious")
    async with open_lazy(qemu, state_dir) as (vm, rig):
        await rig.create(VM, CreateRequest(name="taken"))
        with pytest.raises(UnknownVm, match="no VM 'nobody'"):
            await rig.host.create("nobody", CreateRequest())
        async with refusals(rig, vm, state_dir) as refused:
            await refused.require(SnapshotExists, "taken", CreateRequest(name="taken"))
            importing = rig.supervisors[VM].store.stage("coming") / "memory.img"
            importing.write_text("an import's")
            await refused.require(TargetRefused, "being imported", CreateRequest(name="coming"))
            assert importing.read_text() == "an import's"
            rig.supervisors[VM].store.unstage("coming")
            for strategy in Strategy:
                await refused.require(
                    TargetRefused,
                    "exists",
                    CreateRequest(strategy=strategy, memory_file=str(foreign)),
                )
            for path, words in {
                elsewhere / "missing" / "memory": "no such file or directory",
                foreign / "memory": "not a directory",
                elsewhere / ("m" * 250): "too long",
            }.items():
                await refused.require(TargetRefused, words, CreateRequest(memory_file=str(path)))
            await refused.require(
                BadRequest, "qsnapd's own", CreateRequest(memory_file=str(state_dir / VM / "file"))
            )
            for disks, words in {
                (DiskRequest(target="vdz"),): "no disk named 'vdz'",
                (DiskRequest(target="vda"), DiskRequest(target="device0")): "vda specified twice",
                (DiskRequest(target="vda", snapshot="no", file="/x"),): "external snapshot mode",
                (DiskRequest(target="vdb", snapshot="external"),): "vdb is read-only",
                tuple(
                    DiskRequest(target=target, file=str(elsewhere / "one"))
                    for target in ("vda", "sda")
                ): "the same file",
            }.items():
                await refused.require(BadRequest, words, CreateRequest(disks=disks))
            for overlay, words in {
                foreign: "exists",
                elsewhere / "missing" / "overlay": "no such file or directory",
            }.items():
                disk = DiskRequest(target="vda", file=str(overlay))
                await refused.require(TargetRefused, words, CreateRequest(disks=(disk,)))
            assert foreign.read_text() == "precious"
        await rig.create(VM, CreateRequest(name="fine", memory_file=str(elsewhere / "memory")))
        assert (elsewhere / "memory").stat().st_size > 0


async def test_what_this_qemu_cannot_do(tmp_path: Path) -> None:
    async with (
        open_lazy(find_qemu(SYSTEM_QEMU), tmp_path) as (vm, rig),
        refusals(rig, vm, tmp_path) as refused,
    ):
        await refused.require(
            CapabilityMissing,
            "no mapped-ram",
            CreateRequest(image_format=ImageFormat.MAPPED_RAM),
        )
        await rig.host.suspend(VM)
        await refused.require(
            CapabilityMissing, "would resume it", CreateRequest(strategy=Strategy.BACKGROUND)
        )


@each_qemu
async def test_migration_blocked(qemu: Qemu, tmp_path: Path) -> None:
    shared = [
        *("-object", "memory-backend-ram,id=shared,size=1M,share=on"),
        *("-device", "ivshmem-plain,memdev=shared,master=off"),
    ]
    async with (
        open_lazy(qemu, tmp_path, extra=shared) as (vm, rig),
        refusals(rig, vm, tmp_path) as refused,
    ):
        await refused.require(Blocked, "ivshmem", CreateRequest())
        await refused.require(Blocked, "ivshmem", CreateRequest(live=True))


@each_qemu
async def test_block_job_running(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await vm.execute("blockdev-add", driver="null-co", node_name="nowhere", size=64 * MIB)
        slowly = {"sync": "full", "speed": 4096}
        await vm.execute(
            "blockdev-backup", job_id="nightly", device="disk0", target="nowhere", **slowly
        )
        async with refusals(rig, vm, tmp_path) as refused:
            await refused.require(Blocked, "nightly", CreateRequest())
            await refused.require(Blocked, "nightly", CreateRequest(live=True))


@each_qemu
async def test_more_ram_than_room(qemu: Qemu, tmp_path: Path) -> None:
    """No need to fill a disk: RAM that nobody touches costs nothing, however much it is."""
    state_dir = tmp_path / "state"
    size_mib = free_bytes(tmp_path) // MIB + 1
    backend = f"memory-backend-ram,id=ram,size={size_mib}M,reserve=off"
    huge = ["-object", backend, "-machine", "memory-backend=ram", "-S"]
    async with open_vm(qemu, LAZY, memory_mib=size_mib, extra=huge) as vm:
        await vm.execute("cont")
        await vm.execute("stop")
        async with (
            open_rig(qemu, state_dir, **{VM: vm}) as rig,
            refusals(rig, vm, state_dir) as refused,
        ):
            await refused.require(StoreFull, "bytes free", CreateRequest())
            elsewhere = str(tmp_path / "memory")
            await refused.require(StoreFull, "bytes free", CreateRequest(memory_file=elsewhere))


@each_qemu
async def test_vm_that_has_not_started(qemu: Qemu, tmp_path: Path) -> None:
    async with (
        open_lazy(qemu, tmp_path, extra=["-S"]) as (vm, rig),
        refusals(rig, vm, tmp_path) as refused,
    ):
        await refused.require(WrongState, "has not started yet", CreateRequest())
        await rig.host.resume(VM)
        await rig.create(VM, CreateRequest())


@pytest.mark.parametrize("qemu", [NEWEST], ids=str)
async def test_one_job_at_a_time(qemu: Qemu, tmp_path: Path) -> None:
    gate = Gate(Migrate)
    async with open_lazy(qemu, tmp_path) as (_, rig), trio.open_nursery() as nursery:
        with steered(rig.supervisors[VM], before=gate):
            nursery.start_soon(rig.create, VM, CreateRequest(name="first"))
            await gate.reached()
            with pytest.raises(VmBusy, match="create job has been running"):
                await rig.create(VM, CreateRequest(name="second"))
            gate.open()
