"""What somebody says is an exported snapshot: a tar stream, taken in whole or not at all.

Whatever it is, nothing but the VM's own part of the store, and the folder that was named for
the disks, may have changed afterwards.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random

import trio

from qsnapd.errors import ImageInvalid, RequestError, StoreError
from qsnapd.image.tar_reader import TarReader
from qsnapd.model.snapshot import ImageFormat, Manifest, MemoryImage, RamBlock, Strategy
from qsnapd.model.transfer import (
    EXPORT_NAME,
    MEMORY_NAME,
    Export,
    ExportedDisk,
    ExportedFile,
    ExportedImage,
    ImportRequest,
)
from qsnapd.snapshot.moving.imported import DISKS_NAME, RECORD_NAME, import_snapshot
from qsnapd.store.layout import Store
from qsnapd.store.made import MADE_NAME
from qsnapd.store.manifests import MANIFEST_NAME
from qsnapd.store.snapshots import VmStore
from tests.fuzz import seeds
from tests.fuzz.mutating import spoil_bytes, spoil_json
from tests.fuzz.targets.target import Feed, Target, file_of, in_this_thread, plain, scratch
from tests.fuzz.targets.texts import require_manifest
from tests.unit import crafted_images as crafted

BLOCK_BYTES = 512
_DISK_NAME = "disk-vda.raw"


def feed_tar(data: bytes) -> None:
    """Read the members alone, without believing anything of them."""
    stream = io.BytesIO(data)
    reader = TarReader(stream.read)
    with suppress(ImageInvalid):
        for member in reader.members():
            position = total = 0
            for offset, piece in reader.data(member):
                assert position <= offset
                position = offset + len(piece)
                total += len(piece)
            assert position <= member.size_bytes
            assert total == member.data_bytes <= len(data)


class _Host:
    """A store with one VM, and places around it that nobody has named."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder = folder
        self._store: VmStore = store.vm("vm2")
        self._disks = folder / "disks"
        self._disks.mkdir()
        for name in ("outside", "state/outside", "disks/outside"):
            (folder / name).write_bytes(b"mine")
        self._before = self._look()

    def feed(self, data: bytes) -> None:
        request = ImportRequest(disk_directory=str(self._disks) if data[-1:] == b"d" else None)
        with file_of(data) as descriptor:
            os.lseek(descriptor, 0, os.SEEK_SET)
            trio.run(partial(self._take_in, request, descriptor))

    async def _take_in(self, request: ImportRequest, descriptor: int) -> None:
        try:
            manifest = await import_snapshot(
                self._store, request, descriptor=descriptor, tell=lambda _: None
            )
            self._require_all_of(manifest, self._look() - self._before)
        except (RequestError, StoreError):
            assert self._look() == self._before
        finally:
            self._tidy(self._look() - self._before)

    def _require_all_of(self, manifest: Manifest, new: set[Path]) -> None:
        """Its files are there, and nothing else is that was not before."""
        require_manifest(manifest)
        assert self._store.manifest(manifest.name) == manifest
        files = {image.path for disk in manifest.disks for image in disk.chain}
        files |= {manifest.memory.path} if manifest.memory is not None else set()
        for file in files:
            assert os.path.realpath(file) == file
        own = {self._store.path(manifest.name) / name for name in (MANIFEST_NAME, RECORD_NAME)}
        assert {path for path in new if path.is_file()} == own | {Path(path) for path in files}
        for path in new:
            assert path.is_relative_to(self._store.directory) or path.is_relative_to(self._disks)

    def _tidy(self, new: set[Path]) -> None:
        for path in sorted(new, reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (self._store.directory / MADE_NAME).unlink(missing_ok=True)

    def _look(self) -> set[Path]:
        made_once = {self._store.directory / name for name in (DISKS_NAME, MADE_NAME)}
        return set(self._folder.rglob("*")) - made_once


@contextmanager
def _open_import() -> Iterator[Feed]:
    with scratch() as folder, Store(folder / "state") as store, in_this_thread():
        yield _Host(folder, store).feed


def _exported_file(data: bytes) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    return {"size_bytes": len(data), "data_bytes": len(data), "sha256": digest}


def _members() -> list[tuple[str, bytes]]:
    """An export of a small disk and the memory of a machine of four pages."""
    memory, disk = crafted.stream(*crafted.WHOLE), b"x" * 4 * BLOCK_BYTES
    whole = seeds.whole_manifest()
    layer = whole.disks[0].model_copy(update={"virtual_size_bytes": len(disk)})
    image = MemoryImage(path="/s/m", size_bytes=len(memory), allocated_bytes=len(memory))
    blocks = (RamBlock(id=crafted.RAM, size_bytes=4 * crafted.PAGE),)
    manifest = whole.model_copy(
        update={
            "strategy": Strategy.STOPPED,
            "image_format": ImageFormat.STREAM,
            "memory": image,
            "disks": (layer,),
            "machine": whole.machine.model_copy(update={"ram_blocks": blocks}),
        }
    )
    exported = ExportedImage(name=_DISK_NAME, format="raw", **_exported_file(disk))
    export = Export(
        exported_at=whole.created_at,
        snapshot=manifest,
        memory=ExportedFile(**_exported_file(memory)),
        disks=(ExportedDisk(target="vda", images=(exported,)),),
    )
    text = export.model_dump_json().encode()
    return [(EXPORT_NAME, text), (MEMORY_NAME, memory), (_DISK_NAME, disk)]


def tar_of(members: list[tuple[str, bytes]], **records: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = dict(records)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def _sparse(data: bytes, size_bytes: int) -> bytes:
    """A member with a hole, as GNU tar writes it."""
    text = f"1\n{size_bytes - len(data)}\n{len(data)}\n".encode().ljust(BLOCK_BYTES, b"\0")
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "disk",
        "GNU.sparse.realsize": str(size_bytes),
    }
    return tar_of([("GNUSparseFile.0/disk", text + data)], **records)


def _tars() -> list[bytes]:
    small = tar_of([("a", b"1"), ("./b", b""), ("c", b"x" * 600)])
    return [small, _sparse(b"end", 10_000), tar_of([("a", b"1")], path="ä" * 50, size="1")]


def _imports() -> list[bytes]:
    whole = tar_of(_members())
    return [whole, whole + b"d"]


def _spoil_tar(data: bytes, random: Random) -> bytes:
    """Spoil some bytes, and most times put the sum of a header right again."""
    data = spoil_bytes(data, random)
    return data if random.randrange(4) == 0 else _summed(data)


def _summed(data: bytes) -> bytes:
    blocks = [data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)]
    for number, block in enumerate(blocks):
        if block[257:262] == b"ustar" and len(block) == BLOCK_BYTES:
            total = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ")
            blocks[number] = block[:148] + f"{total:06o}\0 ".encode() + block[156:]
    return b"".join(blocks)


def _spoil_import(data: bytes, random: Random) -> bytes:
    """Spoil the description, or the stream; or what is in it, and describe that as it is."""
    kind = random.randrange(4)
    if kind == 0:
        return _spoil_tar(data, random)
    members = _read_back(data)
    if kind == 1 or not members:
        members = members or _members()
        members[0] = (members[0][0], spoil_json(members[0][1], random))
    elif kind == 2:
        number = random.randrange(len(members))
        name = random.choice(("../evil", "/etc/evil", EXPORT_NAME, "x", "./" + members[number][0]))
        members[number] = (name, members[number][1])
    else:
        number = random.randrange(1, len(members)) if len(members) > 1 else 0
        name, content = members[number]
        members[number] = (name, spoil_bytes(content, random))
        members = _described(members)
    return tar_of(members) + random.choice((b"", b"d"))


def _read_back(data: bytes) -> list[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            found = [(m.name, tar.extractfile(m)) for m in tar.getmembers() if m.isfile()]
            return [(name, file.read()) for name, file in found if file is not None]
    except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError):
        return []


def _described(members: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """The same, with a description that fits."""
    try:
        export = Export.model_validate_json(members[0][1])
    except ValueError:
        return members
    contents = dict(members)
    update = {name: _exported_file(contents.get(name, b"")) for name in export.files()}
    tree = export.model_dump(mode="json")
    if tree["memory"] is not None:
        tree["memory"] = update[MEMORY_NAME]
    for disk in tree["disks"]:
        for image in disk["images"]:
            image.update(update[image["name"]])
    try:
        text = Export.model_validate(tree).model_dump_json()
    except ValueError:
        return members
    return [(members[0][0], text.encode()), *members[1:]]


TARGETS = (
    Target("tar", plain(feed_tar), _tars, _spoil_tar, runs_long=150_000),
    Target("import", _open_import, _imports, _spoil_import, runs_long=15_000, runs_short=150),
)
