"""A second VM from a checkpoint, beside the one that it was taken of."""

import hashlib
import inspect
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.supervisor import Supervisor
from qsnapd.errors import (
    Blocked,
    JobCancelled,
    TargetRefused,
    UnknownVm,
    VmError,
    VmExists,
    WrongState,
)
from qsnapd.model.request import CloneRequest, CreateRequest, Memory, RevertRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.qmp.commands import AddFd
from qsnapd.snapshot.restoring import clone as snapshot_clone
from qsnapd.snapshot.restoring import start as snapshot_start
from qsnapd.vm.spawn import Spawned
from tests.harness import Disk, Vm, open_vm
from tests.parts import SYSTEM_QEMU, Qemu, qemu_versions
from tests.real.cases import BUSY, LAZY, NEWEST, TWO_DISKS, VM, each_qemu, open_busy, open_lazy
from tests.real.footprint import files
from tests.real.steering import Gate, steered
from tests.real.test_killed import open_attached
from tests.real.test_revert import without_memory
from tests.rig import Rig, open_rig

WAYS = [
    (qemu, memory)
    for qemu in qemu_versions()
    for memory in Memory
    if memory is Memory.EAGER or qemu.version != SYSTEM_QEMU
]
each_way = pytest.mark.parametrize(
    ("qemu", "memory"), WAYS, ids=[f"{qemu}-{memory}" for qemu, memory in WAYS]
)
LINES_LIMIT_S = 240.0
LIMIT_S = 60.0
UUID = "33333333-2222-4333-8444-555555555555"


def clone_of(vm: Vm, name: str) -> Vm:
    """The clone, to be looked at like its original; ended with that."""
    clone = Vm(vm.folder, vm.guest, vm.argv, vm.disks)
    clone.qmp = vm.folder / f"qmp.{name}"
    clone.serial_log = vm.folder / f"serial.{name}"
    return clone


def hashes(manifest: Manifest) -> dict[str, str]:
    """What all files of a snapshot hold."""
    paths = files_of(manifest)
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def files_of(manifest: Manifest) -> Iterator[str]:
    if manifest.memory is not None:
        yield manifest.memory.path
    for disk in manifest.disks:
        yield from (file.path for file in disk.chain)


@each_way
async def test_both_guests_go_on_and_find_nothing_wrong(
    qemu: Qemu, memory: Memory, tmp_path: Path
) -> None:
    async with open_busy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s", live=True))
        before, pid = hashes(manifest), vm.pid
        job = await rig.host.clone(
            VM, CloneRequest(name="s", clone="two", memory=memory, state="running")
        )
        assert (await job.wait()).vm == VM
        clone = clone_of(vm, "two")
        assert rig.host.vm("two").state == "running"
        assert rig.host.vm(VM).pid == pid
        assert rig.host.vm("two").pid == clone.pid != pid
        for guest in (vm, clone):
            await guest.wait_checked(limit_s=LINES_LIMIT_S)
            report = guest.slots_report()
            assert report.fine, report.bad_lines
        assert hashes(manifest) == before
        assert {path.name for path in vm.folder.glob("*.of-*")} == {
            Path(disk.path or "").name for disk in await rig.host.disks("two") if not disk.left_out
        }
        assert any("monitor" in note for note in job.info().notes)

        # It is a VM like any other.
        await rig.create("two", CreateRequest(name="own"))
        await rig.revert("two", RevertRequest(name="own", discard=True))
        since = len(clone.log_lines())
        await clone.wait_checked(since=since, limit_s=LINES_LIMIT_S)
        assert clone.slots_report(since).fine
        assert rig.host.vm(VM).pid == pid
        assert hashes(manifest) == before


async def test_ten_at_once(tmp_path: Path) -> None:
    """Lazily: they share the image's pages, and none of their guests disturbs another."""
    names = [f"c{number}" for number in range(10)]
    async with open_vm(NEWEST, BUSY, disks=[Disk(size_mib=4)]) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(NEWEST, tmp_path, **{VM: vm}) as rig:
            manifest = await rig.create(VM, CreateRequest(name="s", live=True))
            before, pid = hashes(manifest), vm.pid

            async def clone(name: str) -> None:
                await rig.clone(VM, CloneRequest(name="s", clone=name, memory=Memory.LAZY))

            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(clone, name)
            guests = [vm, *(clone_of(vm, name) for name in names)]
            assert len({guest.pid for guest in guests[1:]} | {pid}) == 11
            holders = rig.supervisors[VM].store.leases.holders("s")
            assert {(lease.holder, lease.mapped) for lease in holders} == {
                (name, True) for name in names
            }
            async with trio.open_nursery() as nursery:
                for guest in guests:
                    nursery.start_soon(partial(guest.wait_checked, limit_s=2 * LINES_LIMIT_S))
            for guest in guests:
                report = guest.slots_report()
                assert report.fine, report.bad_lines
            assert hashes(manifest) == before
            assert rig.host.vm(VM).pid == pid


@each_qemu
async def test_a_clone_outlives_the_daemon_and_is_forgotten_when_told(
    qemu: Qemu, tmp_path: Path
) -> None:
    async with open_vm(qemu, LAZY, disks=TWO_DISKS, memory_mib=64) as vm:
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            manifest = await rig.create(VM, CreateRequest(name="s"))
            before = files(vm, tmp_path)
            await rig.clone(VM, CloneRequest(name="s", clone="two", state="paused"))
            assert rig.host.vm("two").reason == "from snapshot"
            for name, words in (("two", "is a VM 'two'"), (VM, "is a VM 'vm1'")):
                with pytest.raises(VmExists, match=words):
                    await rig.clone(VM, CloneRequest(name="s", clone=name))
        (tmp_path / "left").mkdir()
        (tmp_path / "left" / "file").touch()
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            with pytest.raises(VmExists, match="files of a former VM"):
                await rig.clone(VM, CloneRequest(name="s", clone="left"))
            with trio.fail_after(10):
                await rig.supervisors["two"].wait_attached()
            assert rig.host.vm("two").state == "paused"
            await rig.host.resume("two")
            with pytest.raises(WrongState, match="shut it down first"):
                await rig.host.undefine("two", remove_storage=True)
            with pytest.raises(WrongState, match="in the configuration file"):
                await rig.host.undefine(VM, remove_storage=True)
            await rig.create("two", CreateRequest(name="own"))
            # Another one at the same instant, of the clone.
            await rig.clone("two", CloneRequest(name="own", clone="three"))
            await end(rig, vm, "two")
            with pytest.raises(WrongState, match=r"has snapshots \(own\)"):
                await rig.host.undefine("two", remove_storage=True)
            await end(rig, vm, "three")
            shutil.move(tmp_path / "two" / "own", tmp_path / "aside")
            with pytest.raises(WrongState, match="clones were made of it: three"):
                await rig.host.undefine("two", remove_storage=True)
            shutil.move(tmp_path / "aside", tmp_path / "two" / "own")
            await rig.host.undefine("three", remove_storage=True)
            assert not (tmp_path / "three").exists()
            assert not list(vm.folder.glob("*three*"))
            shutil.rmtree(tmp_path / "two" / "own")
            overlays = {path for path in vm.folder.glob("*.of-two*") if "after" not in path.name}
            removed = await rig.host.undefine("two", remove_storage=True)
            assert set(map(str, overlays)) < set(removed)
            with pytest.raises(UnknownVm):
                rig.host.vm("two")
        left = {path for path in files(vm, tmp_path) - before if "left" not in str(path)}
        assert {path.name.split(".after-")[-1].split("-")[0] for path in left} <= {
            "own.qcow2", ".leases.json"
        }
        assert hashes(manifest)


async def end(rig: Rig, vm: Vm, name: str) -> None:
    """Shut a clone off, and wait until the daemon has noticed."""
    clone = clone_of(vm, name)
    await clone.kill()
    with trio.fail_after(10):
        await rig.supervisors[name].wait_detached()


async def test_names_that_only_one_can_have(tmp_path: Path) -> None:
    card = ["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,mac=52:54:00:11:22:33"]
    gen = ["-device", "vmgenid,guid=11111111-2222-4333-8444-555555555555", "-uuid", UUID]
    async with open_lazy(NEWEST, tmp_path, extra=[*card, *gen]) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before = files(vm, tmp_path)
        with pytest.raises(Blocked, match="called tap0"):
            await rig.clone(VM, CloneRequest(name="s", clone="two", substitutes={"tap0": "tap1"}))
        (tmp_path / "file").touch()
        with pytest.raises(TargetRefused, match="is no socket"):
            await rig.clone(VM, CloneRequest(name="s", clone="two", qmp=str(tmp_path / "file")))
        with pytest.raises(WrongState, match="serves"):
            await rig.clone(VM, CloneRequest(name="s", clone="two", qmp=str(vm.qmp)))
        (tmp_path / "file").unlink()
        assert files(vm, tmp_path) == before

        own = str(vm.folder / "own")
        await rig.clone(VM, CloneRequest(name="s", clone="two", qmp=own))
        assert rig.host.vm("two").qmp == own
        process = rig.supervisors["two"].require_attached().process
        words = " ".join(process.argv)
        for old in ("52:54:00:11:22:33", "11111111-2222", UUID, f"{vm.qmp},"):
            assert old not in words
        assert rig.host.vm("two").uuid != rig.host.vm(VM).uuid
        assert "guest=two" in words


async def test_the_original_may_be_busy(tmp_path: Path) -> None:
    """With a job of its own: its snapshots are only read."""
    gate = Gate(AddFd)
    async with open_lazy(NEWEST, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        with steered(rig.supervisors[VM], before=gate):
            job = await rig.host.create(VM, CreateRequest(name="t"))
            await gate.reached()
            await rig.clone(VM, CloneRequest(name="s", clone="two"))
            assert rig.host.vm("two").state == "running"
            gate.open()
            assert (await job.wait()).parent == "s"


async def test_a_clone_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before = files(vm, tmp_path)
        for _ in range(2):
            with pytest.raises(VmError, match=r"QEMU says.*/missing/qmp"):
                await rig.clone(VM, CloneRequest(name="s", clone="two", qmp="/missing/qmp"))
            assert files(vm, tmp_path) == before
            assert [info.name for info in await rig.host.look_at_all()] == [VM]


POINTS = (
    (snapshot_start, "make_overlay"),
    (snapshot_start, "_make_view"),
    (snapshot_start, "publish_overlays"),
    (snapshot_clone, "start"),
    (snapshot_start, "load_memory"),
    (snapshot_clone, "register"),
)
each_point = pytest.mark.parametrize(
    ("module", "name"), POINTS, ids=[name.strip("_") for _, name in POINTS]
)


def act_at(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, act: Callable[[], None]
) -> None:
    """Let *act* be called when the job has done what this function does."""
    original, token = getattr(module, name), trio.lowlevel.current_trio_token()

    async def then_act(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        result = await original(*arguments, **named)
        act()
        return result

    def then_act_outside(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        result = original(*arguments, **named)
        trio.from_thread.run_sync(act, trio_token=token)
        return result

    is_async = inspect.iscoroutinefunction(original)
    monkeypatch.setattr(module, name, then_act if is_async else then_act_outside)


@each_point
async def test_cancelled(
    module: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_lazy(NEWEST, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before, pid = files(vm, tmp_path), vm.pid
        with monkeypatch.context() as patch:
            act_at(patch, module, name, lambda: rig.host.abort("two"))
            job = await rig.host.clone(VM, CloneRequest(name="s", clone="two"))
            if name == "register":
                await job.wait()  # too late: it exists
                assert rig.host.vm("two").state == "running"
                return
            with pytest.raises(JobCancelled):
                await job.wait()
        assert vm.pid == pid
        assert files(vm, tmp_path) == before
        assert [info.name for info in await rig.host.look_at_all()] == [VM]
        await rig.clone(VM, CloneRequest(name="s", clone="two"))
        assert rig.host.vm("two").state == "running"


@each_point
async def test_daemon_that_dies_there_leaves_it_to_the_next(
    module: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kill -9 leaves it: nothing is undone, and nothing more is done."""

    class Died(VmError):
        pass

    def die() -> None:
        raise Died("the daemon is gone")

    async def nothing(*arguments: object, **named: object) -> None:
        await trio.lowlevel.checkpoint()

    async with open_vm(NEWEST, LAZY, disks=TWO_DISKS, memory_mib=64) as vm:
        async with open_rig(NEWEST, tmp_path, **{VM: vm}) as rig:
            await rig.create(VM, CreateRequest(name="s"))
            before, pid = files(vm, tmp_path), vm.pid
            with monkeypatch.context() as patch:
                patch.setattr(snapshot_clone, "undo_clone", nothing)
                patch.setattr(Fleet, "drop_unless_registered", nothing)
                patch.setattr(snapshot_start, "kill", lambda identity: None)
                patch.setattr(snapshot_start, "wait_gone", nothing)
                patch.setattr(Supervisor, "wait_detached", nothing)
                patch.setattr(Spawned, "kill", lambda started: None)
                act_at(patch, module, name, die)
                with pytest.raises(Died):
                    await rig.clone(VM, CloneRequest(name="s", clone="two"))
        assert files(vm, tmp_path) != before
        async with open_rig(NEWEST, tmp_path, **{VM: vm}) as rig:
            if name == "register":
                with trio.fail_after(10):
                    await rig.supervisors["two"].wait_attached()
                assert rig.host.vm("two").state == "running"
                assert not (tmp_path / "two" / ".restoring.json").exists()
                return
            assert vm.pid == pid
            assert files(vm, tmp_path) == before
            await rig.clone(VM, CloneRequest(name="s", clone="two"))


MOMENTS = ("state/two/.restoring.json", "*.of-two*", "qmp.two", "state/two/.vm.json")
"""When to kill: as soon as there is such a file."""


@each_qemu
async def test_daemon_killed(qemu: Qemu, tmp_path: Path) -> None:
    """There is a clone then that runs, or no trace of it."""
    made = set()
    async with open_vm(qemu, LAZY, disks=TWO_DISKS, memory_mib=64) as vm:
        async with open_attached(tmp_path, vm, qemu) as daemon:
            await daemon.ctl(f"snapshot-create-as {VM} s")
        for moment in MOMENTS:
            before = files(vm, tmp_path / "state")
            folder = tmp_path if "/" in moment else vm.folder
            async with open_attached(tmp_path, vm, qemu) as daemon, trio.open_nursery() as nursery:
                nursery.start_soon(daemon.ctl, f"snapshot-clone {VM} s two", 1)
                with trio.fail_after(LIMIT_S):
                    while not any(folder.glob(moment)):  # noqa: ASYNC110 -- files tell no events
                        await trio.sleep(0.001)
                daemon.process.kill()
                await daemon.process.wait()
            async with open_attached(tmp_path, vm, qemu) as daemon:
                if "two" not in await daemon.ctl("list --all --name"):
                    assert files(vm, tmp_path / "state") == before, moment
                    continue
                made.add(moment)
                await daemon.wait_attached("two")
                assert await daemon.ctl("domstate two") == "running\n"
                await clone_of(vm, "two").kill()
                with trio.fail_after(LIMIT_S):
                    while (await daemon.ctl("domstate two")) != "shut off\n":
                        pass  # each question takes a moment
                await daemon.ctl("undefine two --remove-storage")
                assert files(vm, tmp_path / "state") - before <= {
                    tmp_path / "state" / VM / ".leases.json"
                }
    assert MOMENTS[-1] in made
    assert MOMENTS[0] not in made


@each_qemu
async def test_a_clone_that_was_shut_off_starts_again(qemu: Qemu, tmp_path: Path) -> None:
    """On its newest disks, which a checkpoint has moved on since it was made; as a VM apart."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await rig.clone(VM, CloneRequest(name="s", clone="two"))
        await rig.create("two", CreateRequest(name="own"))
        disks = {disk.path for disk in await rig.host.disks("two")}
        own = rig.supervisors["two"].store.manifest("own")
        before, pid = hashes(own), rig.host.vm(VM).pid
        with pytest.raises(WrongState, match="is running"):
            await (await rig.host.start("two")).wait()
        clone = clone_of(vm, "two")
        await end(rig, vm, "two")
        since = len(clone.log_lines())
        assert "two" not in rig.host.users(VM).get("s", ())
        await (await rig.host.start("two")).wait()
        assert "two" in rig.host.users(VM)["s"]
        assert {disk.path for disk in await rig.host.disks("two")} == disks
        await clone.wait_line(
            lambda line: line.startswith("OK"), since=since, limit_s=LINES_LIMIT_S
        )
        assert hashes(own) == before
        assert rig.host.vm(VM).pid == pid
        assert rig.host.vm("two").state == "running"


@each_qemu
async def test_without_memory_the_clone_boots(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        without_memory(tmp_path / VM / "s")
        await rig.clone(VM, CloneRequest(name="s", clone="two"))
        await clone_of(vm, "two").wait_line(lambda line: "PASS" in line, limit_s=LINES_LIMIT_S)
        assert rig.host.vm("two").state == "running"
