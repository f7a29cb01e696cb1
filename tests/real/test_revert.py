"""Putting a VM back: what is found too late is found before the old QEMU is ended."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio.testing

from qsnapd.errors import (
    CaptureFailed,
    Effect,
    ImageInvalid,
    StoreError,
    UnknownSnapshot,
    VmBusy,
    VmError,
    WrongState,
)
from qsnapd.model.plan import JournalEntry, Launch, Loading, RevertPlan
from qsnapd.model.request import CreateRequest, Memory, RevertRequest
from qsnapd.model.snapshot import Manifest, Strategy
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.restoring import load
from qsnapd.store.journal import Journal
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm
from qsnapd.vm.spawn import Spawn
from tests.parts import Qemu
from tests.real.cases import NEWEST, VM, each_qemu, open_busy, open_lazy
from tests.real.footprint import look
from tests.rig import Rig

Damage = Callable[[bytes], bytes]


@contextmanager
def replaced(path: Path, damage: Damage | None) -> Iterator[None]:
    """During the block a damaged copy lies at *path*, or nothing."""
    aside = path.rename(path.with_name("aside"))
    try:
        if damage is not None:
            path.write_bytes(damage(aside.read_bytes()))
        yield
    finally:
        aside.replace(path)


@each_qemu
async def test_damaged_snapshot_is_refused_and_the_vm_goes_on(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        assert manifest.memory is not None
        memory, frozen = Path(manifest.memory.path), Path(manifest.disks[0].frozen)
        before, pid = await look(vm, tmp_path), vm.pid
        with pytest.raises(UnknownSnapshot, match="no snapshot 'other'"):
            await rig.revert(VM, RevertRequest(name="other"))
        damages: tuple[tuple[Path, Damage | None, str], ...] = (
            (memory, lambda image: image[:-4096], "bytes, it was saved with"),
            (memory, lambda image: bytes(4096) + image[4096:], "memory.img|memory image|QEMU"),
            (memory, None, "cannot be opened"),
            (frozen, lambda image: image, "another file"),
            (frozen, None, "missing"),
        )
        for path, damage, words in damages:
            with replaced(path, damage), pytest.raises(ImageInvalid, match=words):
                await rig.revert(VM, RevertRequest(name="s"))
            assert vm.pid == pid
            assert rig.host.vm(VM).state == "running"
        assert await look(vm, tmp_path) == before

        await rig.revert(VM, RevertRequest(name="s", discard=True))
        assert vm.pid != pid
        assert [m.name for m in rig.host.snapshots(VM)] == ["s"]
        assert rig.host.vm(VM).reason == "from snapshot"


async def revert(rig: Rig, name: str) -> str:
    """Revert to *name*; returns what the state before is kept as."""
    job = await rig.host.revert(VM, RevertRequest(name=name))
    await job.wait()
    kept = job.info().kept
    assert kept is not None
    return kept


@each_qemu
async def test_branches(qemu: Qemu, tmp_path: Path) -> None:
    """What came after a snapshot is no part of what comes after the revert to it."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="root"))
        await rig.create(VM, CreateRequest(name="left"))
        kept = await revert(rig, "root")
        await vm.wait_checked()
        await rig.create(VM, CreateRequest(name="right", live=True))
        parents = {m.name: m.parent for m in rig.host.snapshots(VM)}
        assert parents == {"root": None, "left": "root", "right": "root", kept: "left"}
        for name in ("left", "right", kept, "root"):
            mark = len(vm.log_lines())
            await rig.revert(VM, RevertRequest(name=name, discard=True))
            await vm.wait_checked()
            assert vm.slots_report(mark).bad_lines == ()


@each_qemu
async def test_running_or_paused_as_asked_for(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="ran"))
        await rig.host.suspend(VM)
        await rig.create(VM, CreateRequest(name="stood"))
        for name, state, expected in (
            ("ran", None, "running"),
            ("ran", "paused", "paused"),
            ("stood", None, "paused"),
            ("stood", "running", "running"),
        ):
            request = RevertRequest.model_validate({"name": name, "state": state, "discard": True})
            await rig.revert(VM, request)
            info = rig.host.vm(VM)
            assert (info.state, info.reason) == (expected, "from snapshot")


@each_qemu
async def test_vm_that_was_shut_off(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await vm.kill()
        await rig.supervisors[VM].wait_detached()
        await rig.revert(VM, RevertRequest(name="s"))
        assert rig.host.vm(VM).state == "running"


@each_qemu
async def test_state_that_is_left_is_kept_as_it_was(qemu: Qemu, tmp_path: Path) -> None:
    """Running or paused, and who has paused it; QEMU 7.2 saves a paused VM only once."""
    async with open_lazy(qemu, tmp_path) as (_, rig):
        await rig.create(VM, CreateRequest(name="s"))
        ran = await revert(rig, "s")
        await rig.host.suspend(VM)
        stood = await revert(rig, "s")
        manifests = {m.name: m for m in rig.host.snapshots(VM)}
        assert (manifests[ran].state, manifests[ran].parent) == ("running", "s")
        assert (manifests[stood].state, manifests[stood].reason) == ("paused", "PAUSED_USER")
        assert rig.host.vm(VM).state == "running"


@each_qemu
async def test_what_was_left_comes_back_if_the_snapshot_does_not_load(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = itertools.count(1)

    async def load_memory(vm: AttachedVm, loading: Loading, job: Job) -> None:
        if next(tries) == 1:
            raise CaptureFailed("QEMU could not load it")
        await real(vm, loading, job)

    real = load.load_memory
    async with open_busy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await vm.wait_checked()
        files = {path for path in vm.folder.iterdir() if "after-s." in path.name}
        mark, pid = len(vm.log_lines()), vm.pid
        monkeypatch.setattr("qsnapd.snapshot.restoring.start.load_memory", load_memory)
        with pytest.raises(VmError, match="The VM is back in the state it was in") as failure:
            await rig.revert(VM, RevertRequest(name="s"))
        assert failure.value.effect is Effect.ROLLED_BACK
        assert vm.pid != pid
        await vm.wait_checked()
        assert vm.slots_report(mark).bad_lines == ()
        assert rig.host.vm(VM).state == "running"
        kept = str(rig.host.current(VM))
        assert kept.startswith("before-s-")
        assert rig.host.users(VM) == {kept: (VM,)}
        assert {path for path in vm.folder.iterdir() if "after-s." in path.name} == files
        await rig.revert(VM, RevertRequest(name="s"))


@each_qemu
async def test_shut_off_with_words_if_nothing_was_kept(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load_memory(vm: AttachedVm, loading: Loading, job: Job) -> None:
        await vm.run_state()
        raise CaptureFailed("QEMU could not load it")

    async with open_lazy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        with monkeypatch.context() as patch:
            patch.setattr("qsnapd.snapshot.restoring.start.load_memory", load_memory)
            with pytest.raises(VmError, match="The VM is shut off; the disks of the state") as no:
                await rig.revert(VM, RevertRequest(name="s", discard=True))
        assert no.value.effect is Effect.PARTIAL
        assert str(manifest.disks[0].overlay) in str(no.value)
        assert rig.host.vm(VM).state == "shut off"
        assert vm.pids() == []
        await rig.revert(VM, RevertRequest(name="s"))
        assert rig.host.vm(VM).state == "running"


@each_qemu
async def test_guest_that_is_let_go_meanwhile(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By qsnapd it cannot be; by another monitor it can, and then the revert gives up."""
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before, pid = await look(vm, tmp_path), vm.pid

        async def prepare(_self: Spawn, _launch: Launch, *, lasting: bool = False) -> None:
            with pytest.raises(VmBusy, match="being put back"):
                await rig.host.resume(VM)
            await vm.execute("cont")

        with monkeypatch.context() as patch:
            patch.setattr(Spawn, "prepare", prepare)
            with pytest.raises(WrongState, match="somebody let the guest") as refusal:
                await rig.revert(VM, RevertRequest(name="s"))
        assert refusal.value.effect is Effect.ROLLED_BACK
        assert [m.name for m in rig.host.snapshots(VM)] == ["s"]
        assert rig.host.current(VM) == "s"
        assert (rig.host.vm(VM).state, vm.pid) == ("running", pid)
        assert await look(vm, tmp_path) == before
        await rig.revert(VM, RevertRequest(name="s"))


@each_qemu
async def test_journal_that_cannot_be_written_before_the_old_qemu_is_ended(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Journal, entry: JournalEntry) -> None:
        if isinstance(entry.plan, RevertPlan) and entry.plan.no_return:
            raise StoreError("the disk is full")
        real(self, entry)

    real = Journal.write
    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before, pid = await look(vm, tmp_path), vm.pid
        monkeypatch.setattr(Journal, "write", write)
        with pytest.raises(StoreError, match="the disk is full") as failure:
            await rig.revert(VM, RevertRequest(name="s"))
        assert failure.value.effect is Effect.ROLLED_BACK
        assert (rig.host.vm(VM).state, vm.pid) == ("running", pid)
        assert await look(vm, tmp_path) == before


@each_qemu
async def test_paused_vm_that_is_not_reverted_after_all(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU < 10.0 does not let go of the disks of a VM that was saved and stands still."""

    async def prepare(_self: Spawn, _launch: Launch, *, lasting: bool = False) -> None:
        await trio.lowlevel.checkpoint()
        raise VmError("it cannot be started")

    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        await rig.host.suspend(VM)
        pid = vm.pid
        with monkeypatch.context() as patch:
            patch.setattr(Spawn, "prepare", prepare)
            with pytest.raises(VmError, match="it cannot be started") as failure:
                await rig.revert(VM, RevertRequest(name="s"))
        assert (rig.host.vm(VM).state, rig.host.vm(VM).reason) == ("paused", "user")
        assert vm.pid == pid
        others = [m.name for m in rig.host.snapshots(VM) if m.name != "s"]
        if qemu.version == NEWEST.version:
            assert (failure.value.effect, others) == (Effect.ROLLED_BACK, [])
        else:
            assert failure.value.effect is Effect.PARTIAL
            assert f"snapshot {others[0]} of the present state was taken" in str(failure.value)
        await rig.host.resume(VM)
        await rig.revert(VM, RevertRequest(name="s"))


@each_qemu
async def test_nothing_is_loaded_beneath_a_guest_that_has_run(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revert that could not be settled, because the disk was full, is not done again."""

    def set_current(self: VmStore, name: str | None) -> None:
        raise StoreError("the disk is full")

    async with open_lazy(qemu, tmp_path) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        supervisor = rig.supervisors[VM]
        with monkeypatch.context() as patch:
            job = await rig.host.revert(VM, RevertRequest(name="s", discard=True))
            while supervisor.attached is None or vm.pid != supervisor.attached.identity.pid:
                await trio.testing.wait_all_tasks_blocked()
            patch.setattr(VmStore, "set_current", set_current)
            with pytest.raises(StoreError, match="the disk is full"):
                await job.wait()
            assert rig.host.vm(VM).state == "running"
            disks = {disk.path for disk in await rig.host.disks(VM)}
            with rig.host.subscribe() as events:
                await vm.kill()
                patch.undo()
                while (await events.receive()).event != "recovered":
                    pass
        assert rig.host.vm(VM).state == "shut off"
        assert (vm.pids(), rig.host.current(VM)) == ([], "s")
        assert supervisor.store.restoring.read() is None
        assert all(Path(path).exists() for path in disks if path)  # noqa: ASYNC240


async def test_checkpoints_of_a_vm_that_was_restored_lazily(tmp_path: Path) -> None:
    """QEMU saves RAM that is a mapping in the background no more: `--live` means precopy then.

    What such a checkpoint records of the command line is the plain one, without the mapping.
    """
    async with open_busy(NEWEST, tmp_path) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="s", live=True))
        assert first.strategy is Strategy.BACKGROUND
        await rig.revert(VM, RevertRequest(name="s", memory=Memory.LAZY, discard=True))
        assert first.memory is not None
        assert first.memory.path in Path(f"/proc/{vm.pid}/maps").read_text()  # noqa: ASYNC240
        second = await rig.create(VM, CreateRequest(name="t", live=True))
        assert second.strategy is Strategy.PRECOPY
        assert second.machine.process.argv[-1] == first.machine.process.argv[-1]
        assert not any(first.memory.path in word for word in second.machine.process.argv)
        third = await rig.create(VM, CreateRequest(name="u"))
        for name in (second.name, third.name):
            mark = len(vm.log_lines())
            await rig.revert(VM, RevertRequest(name=name, memory=Memory.LAZY, discard=True))
            await vm.wait_checked(since=mark)
            assert vm.slots_report(mark).bad_lines == ()


@each_qemu
async def test_disk_only_snapshot(qemu: Qemu, tmp_path: Path) -> None:
    """It leaves the VM shut off, or starts it from its disks."""
    async with open_busy(qemu, tmp_path) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        without_memory(tmp_path / VM / "s")
        files = read_all(manifest)
        await revert(rig, "s")
        assert (rig.host.vm(VM).state, rig.host.current(VM)) == ("shut off", "s")
        assert vm.pids() == []
        await (await rig.host.start(VM)).wait()
        assert rig.host.users(VM) == {"s": (VM,)}
        mark = len(vm.log_lines())
        await rig.revert(VM, RevertRequest(name="s", state="running"))
        await vm.wait_line(lambda line: line.startswith("OK"), since=mark)
        assert read_all(manifest) == files
        await rig.revert(VM, RevertRequest(name="s", state="paused"))
        assert rig.host.vm(VM).state == "paused"
        await rig.host.resume(VM)
        mark = len(vm.log_lines())
        await vm.wait_line(lambda line: line.startswith("OK"), since=mark)


def read_all(manifest: Manifest) -> list[bytes]:
    return [Path(disk.frozen).read_bytes() for disk in manifest.disks]


def without_memory(snapshot: Path) -> None:
    """Make a disk-only snapshot of a checkpoint."""
    path = snapshot / "snapshot.json"
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps(manifest | {"memory": None, "strategy": None, "image_format": None})
    )
    (snapshot / "memory.img").unlink()
