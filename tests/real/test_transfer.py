"""Snapshots that leave for another host, and go on there."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.errors import (
    ImageInvalid,
    StoreError,
    StoreFull,
    TargetRefused,
    UnknownSnapshot,
    WrongState,
)
from qsnapd.model.request import CreateRequest, RevertRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.model.transfer import Export, ExportRequest, ImportRequest, TransferProgress
from tests.harness import Disk, Slots, Vm, open_vm
from tests.parts import Qemu, qemu_versions
from tests.real.cases import NEWEST, TWO_DISKS, VM, each_qemu, open_lazy
from tests.real.footprint import look
from tests.rig import Rig, open_rig

GUEST = Slots(memory_mib=8, dirty_mib_s=20, disk_pause_us=50)
OTHER = "moved"


def tell(progress: TransferProgress) -> None:
    assert progress.done_bytes <= progress.total_bytes


async def export(rig: Rig, request: ExportRequest, descriptor: int | None = None) -> Export:
    return await rig.host.export(VM, request, descriptor, tell)


def sums(folder: Path) -> dict[str, str]:
    """What `sha256sum` prints of each file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "export.json"
    }


def require_holes(folder: Path, exported: Export) -> None:
    for name, file in exported.files().items():
        status = (folder / name).stat()
        assert status.st_size == file.size_bytes
        assert status.st_blocks * 512 <= status.st_size + (1 << 20)
    assert (folder / "memory.img").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


@contextmanager
def moved_away(vm: Vm, state_dir: Path) -> Iterator[None]:
    """During the block this is another host: none of the disks or snapshots is there."""
    aside = state_dir.with_name("aside")
    aside.mkdir()
    for path in vm.folder.glob("disk*"):
        shutil.move(path, aside)
    state_dir.rename(aside / "state")
    yield


@pytest.mark.parametrize(
    ("qemu", "chained"),
    [(qemu_versions()[0], False), (NEWEST, True)],
    ids=["7.2-flattened", "10.0-chained"],
)
async def test_guest_goes_on_where_it_came_to(qemu: Qemu, tmp_path: Path, chained: bool) -> None:
    """The folder is *chained*, the tar stream is not, or the other way round."""
    here, there, folder = tmp_path / "here", tmp_path / "there", tmp_path / "export"
    archive = tmp_path / "s.tar"
    async with open_vm(qemu, GUEST, disks=TWO_DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(qemu, here, **{VM: vm}) as rig:
            await rig.create(VM, CreateRequest(name="older", live=True))
            taken = await rig.create(VM, CreateRequest(name="s", live=True))
            request = ExportRequest(name="s", directory=str(folder), chained=chained)
            exported = await export(rig, request)
            assert {n: f.sha256 for n, f in exported.files().items()} == sums(folder)
            assert sorted(p.name for p in folder.glob("disk-*")) == disk_names(chained=chained)
            require_holes(folder, exported)
            described = json.loads((folder / "export.json").read_text())
            assert described["snapshot"]["name"] == "s"

            exported = await through_pipe(rig, "s", archive, chained=not chained)
            assert members(archive) == ["export.json", *exported.files()]
            assert archive.stat().st_size < exported.data_bytes + (2 << 20)
            await vm.wait_checked()
            assert vm.slots_report().fine
            await vm.kill()
        with moved_away(vm, here):
            await go_on_elsewhere(qemu, vm, there, folder, archive, taken)


def disk_names(*, chained: bool) -> list[str]:
    below = ["disk-vda.base1.qcow2", "disk-sda.base1.raw"] if chained else []
    return sorted(["disk-vda.qcow2", "disk-sda.qcow2", *below])


def members(archive: Path) -> list[str]:
    listed = subprocess.run(["tar", "-tf", archive], check=True, capture_output=True, text=True)
    return listed.stdout.split()


async def through_pipe(rig: Rig, name: str, archive: Path, *, chained: bool) -> Export:
    reader, writer = os.pipe()
    try:
        with archive.open("wb") as file:
            cat = await trio.lowlevel.open_process(["cat"], stdin=reader, stdout=file)
            exported = await export(rig, ExportRequest(name=name, chained=chained), writer)
            os.close(writer)
            writer = -1
            assert await cat.wait() == 0
        return exported
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


async def go_on_elsewhere(
    qemu: Qemu, vm: Vm, state_dir: Path, folder: Path, archive: Path, origin: Manifest
) -> None:
    """Import it there in both ways, and put the VM back to both."""
    await set_up_again(qemu, vm)
    async with open_rig(qemu, state_dir, **{OTHER: vm}) as rig:
        request = ImportRequest(directory=str(folder))
        name, [note] = await rig.host.take_in(OTHER, request, None, tell)
        assert name == "s"
        assert note.startswith(f"a restore starts {origin.machine.process.exe} as user")
        descriptor = os.open(archive, os.O_RDONLY)
        await rig.host.take_in(OTHER, ImportRequest(name="t"), descriptor, tell)
        os.close(descriptor)
        for name in ("s", "t"):
            mark = len(vm.log_lines())
            manifest = await rig.revert(OTHER, RevertRequest(name=name, discard=True))
            assert (manifest.vm, manifest.parent) == (OTHER, None)
            await vm.wait_checked(since=mark)
            assert vm.slots_report(mark).bad_lines == ()
            assert manifest.created_at == origin.created_at


async def set_up_again(qemu: Qemu, vm: Vm) -> None:
    """Start the VM as it was set up on the other host: the same command line, empty disks."""
    for disk, image in zip(TWO_DISKS, vm.disks, strict=True):
        create = [qemu.img, "create", "-q", "-f", disk.format, image, f"{disk.size_mib}M"]
        await trio.run_process([str(word) for word in create])
    await trio.run_process(list(vm.argv), stdin=subprocess.DEVNULL)


@each_qemu
async def test_neither_vm_nor_store_is_touched(qemu: Qemu, tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with open_lazy(qemu, state) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before, inside = await look(vm, state), sums(state / VM / "s")
        for number, chained in enumerate((False, True)):
            folder = str(tmp_path / f"e{number}")
            await export(rig, ExportRequest(name="s", directory=folder, chained=chained))
            with (tmp_path / f"{number}.tar").open("wb") as file:
                await export(rig, ExportRequest(name="s", chained=chained), file.fileno())
        assert await look(vm, state) == before
        assert sums(state / VM / "s") == inside


async def test_images_of_another_user(tmp_path: Path) -> None:
    """Their owner reads them for us; what comes out is ours."""
    state = tmp_path / "state"
    async with open_lazy(NEWEST, state) as (_, rig):
        await rig.create(VM, CreateRequest(name="older"))
        manifest = await rig.create(VM, CreateRequest(name="s"))
        for disk in manifest.disks:
            for file in disk.chain:
                if os.geteuid() == 0:
                    os.chown(file.path, 65534, 65534)
                os.chmod(file.path, 0o400)
        for chained in (False, True):
            folder = tmp_path / f"e{chained}"
            request = ExportRequest(name="s", directory=str(folder), chained=chained)
            exported = await export(rig, request)
            assert set(sums(folder)) == set(exported.files())
            assert {path.stat().st_uid for path in folder.iterdir()} == {os.geteuid()}


async def test_snapshot_without_memory(tmp_path: Path) -> None:
    state, folder = tmp_path / "state", tmp_path / "e"
    async with open_lazy(NEWEST, state) as (_, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        without = {"memory": None, "strategy": None, "image_format": None}
        written = manifest.model_copy(update=without).model_dump_json()
        (state / VM / "s" / "snapshot.json").write_text(written)
        await export(rig, ExportRequest(name="s", directory=str(folder)))
        assert set(sums(folder)) == {"disk-vda.qcow2", "disk-sda.qcow2"}
        request = ImportRequest(directory=str(folder), name="t")
        await rig.host.take_in(VM, request, None, tell)
        [taken] = [m for m in rig.host.snapshots(VM) if m.name == "t"]
        assert (taken.memory, taken.parent) == (None, None)


async def test_refusals_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, target = tmp_path / "state", tmp_path / "e"
    to_target = ExportRequest(name="s", directory=str(target))
    async with open_lazy(NEWEST, state) as (vm, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        before = await look(vm, state)
        with pytest.raises(UnknownSnapshot, match="no snapshot 'other'"):
            await export(rig, ExportRequest(name="other", directory=str(target)))
        with pytest.raises(TargetRefused, match="a folder of its own"):
            await export(rig, ExportRequest(name="s", directory=str(tmp_path)))
        with pytest.raises(TargetRefused, match="cannot create the folder /nowhere/e"):
            await export(rig, ExportRequest(name="s", directory="/nowhere/e"))
        with pytest.raises(TargetRefused, match="send a descriptor"):
            await export(rig, ExportRequest(name="s"))
        readable, sink = os.open(os.devnull, os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
        with pytest.raises(TargetRefused, match="for writing"):
            await export(rig, ExportRequest(name="s"), readable)
        assert manifest.memory is not None
        memory = Path(manifest.memory.path)
        frozen = Path(manifest.disks[0].frozen)
        with changed(memory, 100_000), pytest.raises(ImageInvalid, match="not what it was"):
            await export(rig, to_target)
        with other(frozen), pytest.raises(ImageInvalid, match="another file"):
            await export(rig, to_target)
        with monkeypatch.context() as patched:
            patched.setattr("qsnapd.image.files.free_bytes", lambda directory: 1000)
            with pytest.raises(StoreFull, match="1000 bytes free"):
                await export(rig, to_target)
        with monkeypatch.context() as patched:
            patched.setattr("qsnapd.snapshot.moving.tar_writer.TAR", "no-such-tar")
            with pytest.raises(StoreError, match="no-such-tar"):
                await export(rig, ExportRequest(name="s"), sink)
        for fd in (readable, sink):
            os.close(fd)
        assert not target.exists()
        assert await look(vm, state) == before


@contextmanager
def changed(path: Path, offset: int) -> Iterator[None]:
    """During the block one byte of the file is another."""
    with path.open("r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        file.flush()
        yield
        file.seek(offset)
        file.write(bytes([byte]))


@contextmanager
def other(path: Path) -> Iterator[None]:
    """During the block a copy lies at *path*."""
    aside = path.rename(path.with_name("aside"))
    path.write_bytes(aside.read_bytes())
    try:
        yield
    finally:
        aside.replace(path)


async def test_header_that_names_a_file_of_the_host(tmp_path: Path) -> None:
    """A guest that took over its QEMU cannot have a file of the host exported."""
    state, secret = tmp_path / "state", tmp_path / "secret"
    secret.write_bytes(b"the host's own" * 100)
    disks = (Disk("qcow2", "virtio", "-blockdev", size_mib=1),)
    async with open_lazy(NEWEST, state, disks=disks) as (_, rig):
        manifest = await rig.create(VM, CreateRequest(name="s"))
        name_backing_file(Path(manifest.disks[0].frozen), secret)
        for chained in (False, True):
            request = ExportRequest(name="s", directory=str(tmp_path / "e"), chained=chained)
            with pytest.raises(ImageInvalid, match="names other images below it"):
                await export(rig, request)
    assert not (tmp_path / "e").exists()


def name_backing_file(image: Path, name: Path) -> None:
    """Write it into the header, as qemu-img would not do while QEMU has the image open."""
    with image.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(name))
        file.seek(8)
        file.write(struct.pack(">QI", 1024, len(bytes(name))))


async def test_reader_that_leaves(tmp_path: Path) -> None:
    async with open_lazy(NEWEST, tmp_path / "state") as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        before = await look(vm, tmp_path / "state")
        reader, writer = os.pipe()
        os.close(reader)
        with pytest.raises(StoreError, match="whoever read it has left"):
            await export(rig, ExportRequest(name="s"), writer)
        os.close(writer)
        assert await look(vm, tmp_path / "state") == before


@pytest.mark.parametrize("step", ["memory", "disk vda", "checksum", "writing the stream"])
async def test_cancelled_at_any_step(tmp_path: Path, step: str) -> None:
    """And while it is under way, the snapshot's files are held."""
    state = tmp_path / "state"
    async with open_lazy(NEWEST, state) as (vm, rig):
        await rig.create(VM, CreateRequest(name="s"))
        leases = rig.supervisors[VM].store.leases
        before = await look(vm, state)
        reader, writer = os.pipe()  # nobody reads: the stream gets stuck
        request = ExportRequest(name="s")
        if step != "writing the stream":
            request = ExportRequest(name="s", directory=str(tmp_path / "e"))
        held: list[str] = []
        with trio.fail_after(60), trio.CancelScope() as scope:

            def stop_at_step(progress: TransferProgress) -> None:
                if progress.step != step or held:
                    return
                with pytest.raises(WrongState, match="an export reads its files") as refused:
                    leases.require_unused("s", None)
                held.append(str(refused.value))
                scope.cancel() if in_trio() else trio.from_thread.run_sync(scope.cancel)

            await rig.host.export(VM, request, writer, stop_at_step)
        assert scope.cancelled_caught
        assert held
        leases.require_unused("s", None)
        assert not (tmp_path / "e").exists()
        assert await look(vm, state) == before
        for fd in (reader, writer):
            os.close(fd)


def in_trio() -> bool:
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True
