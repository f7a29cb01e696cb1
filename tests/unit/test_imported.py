"""Importing what anybody may have packed: taken in whole and proven, or not at all."""

import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qsnapd.errors import (
    ImageInvalid,
    ManifestInvalid,
    ManifestTooNew,
    QsnapError,
    SnapshotExists,
    StoreError,
    TargetRefused,
)
from qsnapd.model.snapshot import (
    DiskLayer,
    FileIdentity,
    ImageFormat,
    Manifest,
    MemoryImage,
    RamBlock,
    Strategy,
)
from qsnapd.model.transfer import (
    Export,
    ExportedDisk,
    ExportedFile,
    ExportedImage,
    ImportRequest,
    TransferProgress,
)
from qsnapd.snapshot.moving import imported
from qsnapd.snapshot.moving.imported import import_snapshot, remove_leftovers
from qsnapd.snapshot.moving.sources import Stream
from qsnapd.store.layout import Store
from qsnapd.store.made import by_path
from qsnapd.store.snapshots import VmStore
from tests.parts import qemu_versions
from tests.unit.crafted_images import PAGE, RAM, WHOLE, stream
from tests.unit.test_store import EPOCH
from tests.unit.test_store import manifest as plain_manifest

QEMU_IMG = str(qemu_versions()[-1].img)
DISK_BYTES = 1 << 20
MEMORY = stream(*WHOLE)
RAM_BYTES = 4 * PAGE
BLOCK = 512
Change = Callable[[Path], object]


@pytest.fixture
def store(tmp_path: Path) -> VmStore:
    return Store(tmp_path / "state").vm("vm2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export of one disk with two images, and the memory of a machine of two pages."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "memory.img").write_bytes(MEMORY)
    create = [QEMU_IMG, "create", "-q", "-f", "qcow2"]
    base, top = folder / "disk-vda.base1.qcow2", folder / "disk-vda.qcow2"
    subprocess.run([*create, str(base), str(DISK_BYTES)], check=True)
    subprocess.run([*create, "-F", "qcow2", "-b", base.name, str(top)], check=True, cwd=folder)
    write_export(folder, origin())
    return folder


def origin() -> Manifest:
    manifest = plain_manifest("s", "gone")
    size_bytes = len(MEMORY)
    chain = (
        FileIdentity(path="/d/b.qcow2", device=1, inode=2),
        FileIdentity(path="/d/a.qcow2", device=1, inode=3),
    )
    return manifest.model_copy(
        update={
            "strategy": Strategy.STOPPED,
            "image_format": ImageFormat.STREAM,
            "memory": MemoryImage(path="/s/m", size_bytes=size_bytes, allocated_bytes=size_bytes),
            "disks": (
                DiskLayer(
                    target="vda",
                    node="n",
                    frozen="/d/b.qcow2",
                    frozen_format="qcow2",
                    overlay="/d/c.qcow2",
                    virtual_size_bytes=DISK_BYTES,
                    chain=chain,
                ),
            ),
            "machine": manifest.machine.model_copy(
                update={"ram_blocks": (RamBlock(id=RAM, size_bytes=RAM_BYTES),)}
            ),
        }
    )


def described(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return {"size_bytes": len(data), "data_bytes": len(data), "sha256": digest}


def write_export(folder: Path, manifest: Manifest) -> None:
    """Describe the files as they are now."""
    images = tuple(
        ExportedImage(name=name, format="qcow2", **described(folder / name))
        for name in ("disk-vda.qcow2", "disk-vda.base1.qcow2")
    )
    export = Export(
        exported_at=EPOCH,
        snapshot=manifest,
        memory=ExportedFile(**described(folder / "memory.img")),
        disks=(ExportedDisk(target="vda", images=images),),
    )
    (folder / "export.json").write_text(export.model_dump_json())


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def tell(progress: TransferProgress) -> None:
    assert progress.done_bytes <= progress.total_bytes


async def from_folder(store: VmStore, folder: Path, **request: object) -> Manifest:
    asked = ImportRequest.model_validate({"directory": str(folder), **request})
    return await import_snapshot(store, asked, descriptor=None, tell=tell)


def pack(folder: Path, *options: str) -> bytes:
    names = ["export.json", *sorted(p.name for p in folder.iterdir() if p.name != "export.json")]
    command = ["tar", "--create", "--format=posix", "--sparse", *options, "--file=-"]
    return subprocess.run(
        [*command, f"--directory={folder}", "--", *names], check=True, capture_output=True
    ).stdout


async def from_tar(store: VmStore, archive: bytes, **request: object) -> Manifest:
    """Send it through a pipe."""
    reader, writer = os.pipe()
    packed = os.memfd_create("archive")
    os.write(packed, archive)
    os.lseek(packed, 0, os.SEEK_SET)
    cat = await trio.lowlevel.open_process(["cat"], stdin=packed, stdout=writer)
    for fd in (packed, writer):
        os.close(fd)
    try:
        asked = ImportRequest.model_validate(request)
        return await import_snapshot(store, asked, descriptor=reader, tell=tell)
    finally:
        os.close(reader)
        with trio.fail_after(10, shield=True):
            await cat.wait()  # at the latest because nobody reads


def left_in(store: VmStore) -> set[str]:
    """What is in the store, but for the folder and the record of images of disks."""
    found = {str(path.relative_to(store.directory)) for path in store.directory.rglob("*")}
    return found - {".disks", ".made.json"}


async def test_all_of_it_arrives(store: VmStore, folder: Path, tmp_path: Path) -> None:
    by_folder = await from_folder(store, folder)
    by_tar = await from_tar(store, pack(folder), name="t")
    for manifest in (by_folder, by_tar):
        assert store.manifest(manifest.name) == manifest
        assert (manifest.vm, manifest.parent, manifest.format) == ("vm2", None, 2)
        assert manifest.memory is not None
        assert manifest.memory.path == str(store.path(manifest.name) / "memory.img")
        assert content(manifest.memory.path) == MEMORY
        assert manifest.memory.sha256 == hashlib.sha256(MEMORY).hexdigest()
        [disk] = manifest.disks
        assert [file.path for file in disk.known_as] == ["/d/b.qcow2", "/d/a.qcow2"]
        assert {(file.device, file.inode) for file in disk.known_as} == {(0, 0)}
        assert disk.overlay is None
        check_images(store, disk, folder)


def check_images(store: VmStore, disk: DiskLayer, folder: Path) -> None:
    top, base = (Path(file.path) for file in disk.chain)
    assert str(top) == disk.frozen
    assert top.parent.parent == store.directory / ".disks"
    assert (top.name, base.name) == (TOP, BASE)
    assert top.read_bytes() == (folder / TOP).read_bytes()
    assert top.stat().st_ino == disk.chain[0].inode
    assert top.stat().st_mode & 0o777 == 0o600
    assert top.parent.stat().st_mode & 0o777 == 0o700
    subprocess.run([QEMU_IMG, "check", "-q", top], check=True)


async def test_disks_go_where_they_are_told(store: VmStore, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "vms"
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, 12, 34)
    manifest = await from_folder(store, folder, disk_directory=str(place), name="x")
    image = Path(manifest.disks[0].frozen)
    assert image.parent.parent == place
    status, above = os.stat(image), os.stat(place)
    assert (status.st_uid, status.st_gid) == (above.st_uid, above.st_gid)
    with pytest.raises(TargetRefused, match="cannot make a folder in /nowhere"):
        await from_folder(store, folder, disk_directory="/nowhere", name="y")
    assert set(store.snapshots()) == {"x"}


async def test_folder_is_not_given_away_by_another_name(
    store: VmStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns the place puts a link where the folder was, at the worst moment."""
    place, victim = tmp_path / "vms", tmp_path / "victim"
    place.mkdir()
    victim.mkdir()
    if os.geteuid() == 0:
        os.chown(place, 12, 34)
    before = victim.stat()
    write_record = imported._write_record

    def swap(staging: Path, disks: FileIdentity) -> None:
        write_record(staging, disks)
        for path in place.iterdir():
            path.rename(place / "aside")
            path.symlink_to(victim)

    monkeypatch.setattr(imported, "_write_record", swap)
    await from_folder(store, folder, disk_directory=str(place), name="x")
    assert victim.stat() == before
    assert list(victim.iterdir()) == []
    assert {path.name for path in (place / "aside").iterdir()} == {TOP, BASE}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), StoreError("cannot sync: no space")]
)
@pytest.mark.parametrize("is_made", [False, True])
async def test_record_that_cannot_be_written(
    store: VmStore,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    is_made: bool,
) -> None:
    """Before the folder for the disks is made, and when its inode is to be noted."""
    write_record = imported._write_record

    def fail(staging: Path, disks: FileIdentity) -> None:
        if (disks.inode != 0) is is_made:
            raise error
        write_record(staging, disks)

    with monkeypatch.context() as patched:
        patched.setattr(imported, "_write_record", fail)
        with pytest.raises(QsnapError, match=r"[Nn]o space"):
            await from_folder(store, folder)
    assert left_in(store) == set()
    await from_folder(store, folder)


def test_folder_that_its_record_does_not_know_yet(store: VmStore) -> None:
    """The host lost power right after it was made."""
    place = imported._stage(store, "s", None)
    os.close(place.disks_fd)
    imported._write_record(place.staging, by_path(str(place.disks)))
    remove_leftovers(store, 1e12)
    assert left_in(store) == set()


async def test_parent_is_kept_where_it_exists(store: VmStore, folder: Path) -> None:
    await from_folder(store, folder, name="gone")
    assert (await from_folder(store, folder)).parent == "gone"


async def test_name_that_is_taken(store: VmStore, folder: Path) -> None:
    await from_folder(store, folder)
    before = left_in(store)
    for again in (from_folder(store, folder), from_tar(store, pack(folder))):
        with pytest.raises(SnapshotExists, match="already has a snapshot 's'"):
            await again
    assert left_in(store) == before


def edit(**changes: Any) -> Change:  # noqa: ANN401
    """Change export.json; names with dots lead inwards."""

    def change(folder: Path) -> None:
        path = folder / "export.json"
        whole = json.loads(path.read_text())
        for name, value in changes.items():
            inner = whole
            *way, last = name.split("__")
            for part in way:
                inner = inner[int(part) if part.isdecimal() else part]
            inner[last] = value
        path.write_text(json.dumps(whole))

    return change


def again(change: Change) -> Change:
    """Make a change, and describe the result as if it were right."""

    def change_and_describe(folder: Path) -> None:
        change(folder)
        write_export(folder, origin())

    return change_and_describe


def spoil(name: str, offset: int, data: bytes) -> Change:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return change


def rebase(name: str, *words: str) -> Change:
    def change(folder: Path) -> None:
        command = [QEMU_IMG, "rebase", "-u", "-f", "qcow2", *words, name]
        subprocess.run(command, check=True, cwd=folder)

    return change


def make(name: str, *words: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        command = [QEMU_IMG, "create", "-q", "-f", "qcow2", *words[:-1], name, words[-1]]
        subprocess.run(command, check=True, cwd=folder)

    return change


def image(name: str) -> dict[str, Any]:
    return {"name": name, "format": "raw", "size_bytes": 0, "data_bytes": 0, "sha256": "0" * 64}


TOP, BASE = "disk-vda.qcow2", "disk-vda.base1.qcow2"
HOSTILE: dict[str, tuple[Change, type[QsnapError], str]] = {
    "flipped memory": (spoil("memory.img", 90, b"\xff"), ImageInvalid, "is not what was exported"),
    "flipped disk": (spoil(TOP, 70000, b"\xff"), ImageInvalid, "is not what was exported"),
    "short file": (lambda f: os.truncate(f / BASE, 100), ImageInvalid, "has 100 bytes"),
    "long file": (lambda f: os.truncate(f / BASE, 1 << 40), ImageInvalid, "has 1099511627776 byt"),
    "file missing": (lambda f: (f / BASE).unlink(), ImageInvalid, "lacks|cannot be opened"),
    "no JSON": (lambda f: spoil("export.json", 0, b"x")(f), ManifestInvalid, "not valid JSON"),
    "newer export": (edit(export=2), ManifestTooNew, "format 2, this qsnapd reads up to 1"),
    "newer snapshot": (edit(snapshot__format=99), ManifestTooNew, "format 99"),
    "format of nothing": (edit(export="1"), ManifestInvalid, "does not tell its format"),
    "unknown field": (edit(surprise=1), ManifestInvalid, "'surprise'"),
    "memory left out": (edit(memory=None), ManifestInvalid, "memory image is not that"),
    "disk renamed": (edit(disks__0__target="vdb"), ManifestInvalid, "not those of the snapshot"),
    "disk twice": (
        edit(
            disks=[{"target": "vda", "images": [image(n)]} for n in ("disk-a", "disk-b")],
            snapshot__disks=[origin().disks[0].model_dump(mode="json")] * 2,
        ),
        ManifestInvalid,
        "two disks have the same name",
    ),
    "no images": (edit(disks__0__images=[]), ManifestInvalid, "images"),
    "huge size": (edit(memory__size_bytes=1 << 60), ManifestInvalid, "size_bytes"),
    "negative size": (edit(memory__size_bytes=-1), ManifestInvalid, "size_bytes"),
    "path upwards": (edit(disks__0__images__0__name="../x"), ManifestInvalid, "images.0.name"),
    "absolute path": (edit(disks__0__images__0__name="/etc/x"), ManifestInvalid, "images.0.name"),
    "manifest's name": (
        edit(disks__0__images__0__name="snapshot.json"),
        ManifestInvalid,
        "images.0.name",
    ),
    "same name twice": (edit(disks__0__images__0__name=BASE), ManifestInvalid, "the same name"),
    "other format": (edit(disks__0__images__0__format="vmdk"), ManifestInvalid, "format"),
    "name of snapshot": (edit(snapshot__name="../s"), ManifestInvalid, "snapshot.name"),
    "other disk size": (
        edit(snapshot__disks__0__virtual_size_bytes=512),
        ImageInvalid,
        "holds a disk of 1048576 bytes",
    ),
    "other RAM": (
        edit(snapshot__machine__ram_blocks=[{"id": RAM, "size_bytes": 1 << 30}]),
        ImageInvalid,
        RAM,
    ),
    "no strategy": (edit(snapshot__strategy=None), ImageInvalid, "how its memory image was saved"),
    "backing file of the host": (
        again(rebase(TOP, "-F", "raw", "-b", "/etc/passwd")),
        ImageInvalid,
        "names '/etc/passwd'",
    ),
    "backing file by protocol": (
        again(rebase(BASE, "-F", "raw", "-b", "nbd://localhost/x")),
        ImageInvalid,
        "names 'nbd:",
    ),
    "no backing file": (again(rebase(TOP, "-b", "")), ImageInvalid, "names None"),
    "other backing format": (
        again(rebase(TOP, "-F", "raw", "-b", BASE)),
        ImageInvalid,
        r"\(raw\) as the image below it",
    ),
    "data file": (again(make(BASE, "-o", "data_file=../x", "1M")), ImageInvalid, "another file"),
    "encrypted": (
        again(spoil(BASE, 32, struct.pack(">I", 1))),
        ImageInvalid,
        "encrypted",
    ),
    "no qcow2": (again(spoil(BASE, 0, b"XXXX")), ImageInvalid, "no qcow2 image"),
    "no memory image": (
        again(lambda f: (f / "memory.img").write_bytes(bytes(5000)) and None),
        ImageInvalid,
        "memory image|QEMU",
    ),
}


@pytest.mark.parametrize("way", ["folder", "tar"])
@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_exports_leave_nothing(
    store: VmStore, folder: Path, name: str, way: str
) -> None:
    change, error, words = HOSTILE[name]
    change(folder)
    with pytest.raises(error, match=words):
        await (from_folder(store, folder) if way == "folder" else from_tar(store, pack(folder)))
    assert left_in(store) == set()
    assert store.partials() == ()


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ],
    ids=["link", "pipe", "folder"],
)
async def test_files_in_a_folder_must_be_files(
    store: VmStore, folder: Path, put: Callable[[Path], object]
) -> None:
    (folder / BASE).unlink()
    put(folder / BASE)
    with pytest.raises(ImageInvalid, match=r"cannot be opened|not a plain file"):
        await from_folder(store, folder)
    with pytest.raises(ImageInvalid, match=r"not a plain file|lacks"):
        await from_tar(store, pack(folder))
    assert left_in(store) == set()


async def test_streams_with_more_or_less(store: VmStore, folder: Path) -> None:
    whole = pack(folder)
    (folder / "extra").write_bytes(b"x")
    for archive, words in (
        (pack(folder), "holds 'extra'"),
        (whole[: len(whole) // 2], "cut off"),
        (pack(folder, "--transform=s,memory.img,../../etc/x,"), "holds|not a plain"),
        (pack(folder, "--transform=s,^,/abs/,"), "begins with"),
        (whole[:BLOCK] + whole, "damaged"),
        (b"", "cut off"),
        (b"\x28\xb5\x2f\xfd" * 1000, "not a tar stream"),
    ):
        with pytest.raises((ImageInvalid, ManifestInvalid), match=words):
            await from_tar(store, archive)
        assert left_in(store) == set()


async def test_writer_that_goes_away_or_hangs(
    store: VmStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(folder)
    monkeypatch.setattr("qsnapd.snapshot.moving.sources.STALL_LIMIT_S", 0.1)
    reader, writer = os.pipe()
    os.write(writer, archive[:5000])
    with pytest.raises(StoreError, match="nothing has come"):
        await import_snapshot(store, ImportRequest(), descriptor=reader, tell=tell)
    assert left_in(store) == set()
    for fd in (reader, writer):
        os.close(fd)


def test_reading_does_not_wait_for_what_another_has_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x")
    source = Stream(reader)
    assert source._read_now(10) == b"x"
    with pytest.raises(BlockingIOError):
        source._read_now(10)
    os.close(writer)
    assert source._read_now(10) == b""
    os.close(reader)


async def test_cancelled(store: VmStore, folder: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, pack(folder)[:60000])
    with trio.CancelScope() as scope:

        def stop(_progress: TransferProgress) -> None:
            trio.from_thread.run_sync(scope.cancel)

        await import_snapshot(store, ImportRequest(), descriptor=reader, tell=stop)
    assert scope.cancelled_caught
    assert left_in(store) == set()
    for fd in (reader, writer):
        os.close(fd)


async def test_failing_commit(
    store: VmStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, manifest: Manifest) -> None:
        raise StoreError("cannot write: no space")

    monkeypatch.setattr(store, "commit", fail)
    with pytest.raises(StoreError, match="no space"):
        await from_folder(store, folder)
    assert left_in(store) == set()


async def test_leftovers_of_a_killed_daemon(
    store: VmStore, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    await from_folder(store, folder, name="stays")
    before = left_in(store)
    place = tmp_path / "vms"
    place.mkdir()
    monkeypatch.setattr(imported, "_unstage", lambda store, name: None)
    (folder / BASE).unlink()
    with pytest.raises(ImageInvalid):
        await from_folder(store, folder, disk_directory=str(place))
    store.stage("begun")
    monkeypatch.undo()
    assert list(place.iterdir())
    remove_leftovers(store, 0.0)
    assert set(store.partials()) == {"s", "begun"}, "begun since: somebody's at work"
    remove_leftovers(store, 1e12)
    assert list(place.iterdir()) == []
    assert left_in(store) == before


async def test_nothing_to_read(store: VmStore, folder: Path) -> None:
    with pytest.raises(TargetRefused, match="name a directory, or send"):
        await import_snapshot(store, ImportRequest(), descriptor=None, tell=tell)
    with pytest.raises(ManifestInvalid, match="No such file"):
        await from_folder(store, folder / "nowhere")
    (folder / "export.json").unlink()
    os.mkfifo(folder / "export.json")
    with pytest.raises(ManifestInvalid, match="not a plain file"):
        await from_folder(store, folder)
    fd = os.open(folder, os.O_RDONLY)
    with pytest.raises(TargetRefused, match="is a directory's"):
        await import_snapshot(store, ImportRequest(), descriptor=fd, tell=tell)
    os.close(fd)
