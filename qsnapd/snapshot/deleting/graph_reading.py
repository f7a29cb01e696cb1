"""Finding out which disk image lies over which, from headers, manifests and QEMU.

Everything here blocks, and only reads.
"""

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from qsnapd.errors import ImageInvalid, StoreError, VmError
from qsnapd.image.qcow2 import Header, is_qcow2, read_header
from qsnapd.model.deletion import Image
from qsnapd.model.plan import CheckpointPlan, JournalEntry, Restore
from qsnapd.model.snapshot import FileIdentity, Manifest
from qsnapd.snapshot.deleting.graph import Graph, GraphImage
from qsnapd.store.manifests import MANIFEST_NAME, read_manifest
from qsnapd.store.registry import read_last_seen, read_registration
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.identity import is_still, key_of, plain_name
from qsnapd.vm.live_chain import LiveDisk
from qsnapd.vm.proc import FileKey

DEEPEST = 300
"""Of images over each other: more than QEMU is ever asked to bear."""
BLOCK_BYTES = 512
"""The unit of st_blocks."""
_RAW = frozenset({"raw", "file", "host_device"})


def read_graph(
    store: VmStore, others: Sequence[VmStore], live: Sequence[LiveDisk] | None
) -> Graph:
    """Everything that is known of the images of a VM, and of who else needs them.

    *others*: the parts of the store that belong to other VMs. *live*: what QEMU says, if it
    runs. Raises: StoreError.
    """
    reader = _Reader(store, live or ())
    for manifest in store.snapshots().values():
        reader.add_manifest(manifest)
    for name, problem in store.problems().items():
        reader.graph.problems.append(f"snapshot {name}: {problem}")
    for disk in live or ():
        reader.add_live(disk)
    for made in (*store.made.files(), *store.made.seen()):
        reader.add(made.file.path, made.format)
    for journal in (store.next_start, store.restoring, store.journal):
        if (entry := journal.read()) is not None:
            reader.add_journal(entry, is_next=journal is store.next_start)
    if live is None and not reader.graph.starts_on:
        reader.graph.last_on |= set(_keys(made.file.path for made in store.made.seen()))
    for folder in store.forgotten():
        _add_forgotten(reader.graph, folder)
    for other in others:
        _add_other(reader, other, store.vm)
    return reader.graph


def _add_forgotten(graph: Graph, folder: Path) -> None:
    """Who deletes only the record of a snapshot may want its files, and take it in again."""
    try:
        manifest = read_manifest(folder / MANIFEST_NAME)
    except (OSError, StoreError):
        return  # cannot be taken in anyway
    if not manifest.deleting:
        for key in _keys(disk.frozen for disk in manifest.disks):
            graph.forgotten.setdefault(key, set()).add(manifest.name)


def _keys(paths: Iterable[str]) -> Iterator[FileKey]:
    return (key for path in paths if (key := key_of(path)) is not None)


def _add_other(reader: "_Reader", other: VmStore, vm: str) -> None:
    """What another VM has; if that is a clone, all it has must be understood."""
    registration = read_registration(other)
    seen = read_last_seen(other) if registration else None
    paths = [file.path for file in registration.overlays] if registration else []
    paths += [disk.chain[0].path for disk in seen.disks if disk.chain] if seen else []
    problems = len(reader.graph.problems)
    keys = [reader.add(path, "qcow2") for path in paths]
    known = (*other.made.files(), *other.made.seen())
    keys += [reader.add(made.file.path, made.format) for made in known]
    for manifest in other.snapshots().values():
        keys += reader.add_manifest(manifest)
    for entry in (other.next_start.read(), other.restoring.read()):
        if entry is not None:
            keys += reader.add_journal(entry)
    if registration is not None and registration.source == vm:
        source = reader.store.snapshots().get(registration.snapshot)
        if source is not None:  # what lies over its images is not the clone's
            reader.add_manifest(source)
            keys += [key_of(disk.frozen) for disk in source.disks]
        reader.graph.problems += [
            f"VM {other.vm}, a clone of this one: snapshot {name}: {problem}"
            for name, problem in other.problems().items()
        ]
    else:  # whatever is wrong there is not about files of this VM
        del reader.graph.problems[problems:]
    for key in keys:
        if key is not None:
            reader.graph.need(key, other.vm)


class _Reader:
    def __init__(self, store: VmStore, live: Sequence[LiveDisk]) -> None:
        self.store = store
        self.graph = Graph()
        self._made = {(m.file.path, m.file.inode) for m in store.made.files()}
        self._made |= set(_made_before_format_3(store, live))

    def add_manifest(self, manifest: Manifest) -> list[FileKey | None]:
        """The images of a snapshot; what is not as it was becomes a problem."""
        keys: list[FileKey | None] = []
        for disk in manifest.disks:
            name = f"snapshot {manifest.name} of VM {manifest.vm}, disk {disk.target}"
            key = self.add(disk.frozen, _format(disk.frozen_format), what=name)
            keys.append(key)
            if key is None:
                continue
            if disk.overlay is not None and below_of_qcow2(disk.overlay) == key:
                keys.append(self.add(disk.overlay, "qcow2", what=name))
            found = self.graph.chain(key)
            recorded = tuple(key_of(file.path) for file in disk.chain)
            if found[: len(recorded)] != recorded or len(found) > len(recorded) > 0:
                self.graph.problems.append(
                    f"{name}: its images do not lie over each other as when it was taken"
                )
            for file in disk.chain:
                if not is_still(file):
                    self.graph.problems.append(
                        f"{name}: {file.path} is missing or is another file than it was"
                    )
        return keys

    def add_journal(self, entry: JournalEntry, *, is_next: bool = False) -> list[FileKey | None]:
        """The overlays that a job has made, or was about to make."""
        plan = entry.plan
        if isinstance(plan, CheckpointPlan):
            paths = [pivot.overlay.path for pivot in plan.pivots]
        else:
            assert isinstance(plan, Restore)
            paths = [overlay.path for overlay in plan.overlays]
        keys = [self.add(path, "qcow2") for path in paths if os.path.exists(path)]
        if is_next:
            self.graph.starts_on |= {key for key in keys if key is not None}
        return keys

    def add(
        self, path: str, image_format: Literal["qcow2", "raw"], *, what: str | None = None
    ) -> FileKey | None:
        """Note an image and all below it; returns its key, None if it is not there."""
        try:
            return self._add(path, image_format, [])
        except (ImageInvalid, OSError, ValueError) as exc:  # also a name that cannot be one
            words = exc.strerror if isinstance(exc, OSError) else exc
            problem = f"{what + ': ' if what else ''}{path}: {words}"
            self.graph.problems.append(problem.encode(errors="replace").decode())
            return None

    def add_live(self, disk: LiveDisk) -> None:
        """What QEMU writes to, and all below it; it may have been told otherwise than headers."""
        key = self.add(disk.layers[0].file.path, _format(disk.format))
        if key is not None and self.graph.chain(key) != tuple(n.key for n in disk.layers):
            self.graph.problems.append(
                f"disk {disk.target}: {disk.layers[0].file.path} does not lie over what QEMU has "
                "put below it, by what the images say"
            )

    def _add(
        self, path: str, image_format: Literal["qcow2", "raw"], above: list[FileKey]
    ) -> FileKey:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise ImageInvalid("it is neither a file nor a block device")
        key = status.st_dev, status.st_ino
        known = self.graph.images.get(key)
        if known is not None:
            if known.image.format != image_format:
                raise ImageInvalid(f"it is {known.image.format} here and {image_format} there")
            return key
        if key in above:
            raise ImageInvalid("it lies over itself")
        if len(above) > DEEPEST:
            raise ImageInvalid(f"more than {DEEPEST} images lie over it")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            header = read_header(fd) if image_format == "qcow2" else None
            size_bytes = header.virtual_size_bytes if header else os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
        backing, is_strange = self._below(path, header, [*above, key])
        real = os.path.realpath(path)
        self.graph.images[key] = GraphImage(
            image=Image(
                file=FileIdentity(path=real, device=key[0], inode=key[1]),
                format=image_format,
                made=(real, key[1]) in self._made or (path, key[1]) in self._made,
            ),
            virtual_size_bytes=size_bytes,
            allocated_bytes=status.st_blocks * BLOCK_BYTES,
            is_device=stat.S_ISBLK(status.st_mode),
            backing=backing,
            has_strange_backing=is_strange,
        )
        return key

    def _below(
        self, path: str, header: Header | None, above: list[FileKey]
    ) -> tuple[FileKey | None, bool]:
        if header is None or header.backing is None:
            return None, False
        name = _plain(header.backing)
        if ":" in name.split("/")[0]:
            return None, True  # a protocol
        below = os.path.join(os.path.dirname(path), name)
        image_format = header.backing_format
        if image_format is None:
            image_format = _probed(below)
        try:
            return self._add(below, _format(image_format), above), False
        except OSError as exc:
            raise ImageInvalid(f"{below}, which it lies over: {exc.strerror}") from exc


def below_of_qcow2(path: str) -> FileKey | None:
    """Which file a qcow2 image names below it; None also if it is not there, or no such image."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            name = read_header(fd).backing
        finally:
            os.close(fd)
    except (OSError, ImageInvalid):
        return None
    return key_of(os.path.join(os.path.dirname(path), name)) if name else None


def _plain(name: str) -> str:
    try:
        return plain_name(name).removeprefix("file:")
    except VmError as exc:
        raise ImageInvalid(f"its header has a name below it that is not understood: {exc}") from exc


def _probed(path: str) -> str:
    # Without waiting: whoever wrote the header may have named a pipe.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return "qcow2" if is_qcow2(fd) else "raw"
        finally:
            os.close(fd)
    except OSError as exc:
        raise ImageInvalid(f"{path}, which it lies over: {exc.strerror}") from exc


def _format(name: str) -> Literal["qcow2", "raw"]:
    if name in _RAW:
        return "raw"
    if name == "qcow2":
        return "qcow2"
    raise ImageInvalid(f"images of format {name} are not known here")


def _made_before_format_3(
    store: VmStore, live: Sequence[LiveDisk]
) -> Iterator[tuple[str, int]]:
    """Overlays that older versions made, and kept no record of: path and inode.

    A manifest names the path, and a chain, another's or QEMU's, proves which file it was.
    """
    disks = [d for m in store.snapshots().values() if m.format <= 2 for d in m.disks]
    overlays = {disk.overlay for disk in disks}
    proven = [file for disk in disks for file in disk.chain]
    proven += [layer.file for disk in live for layer in disk.layers]
    for file in proven:
        if file.path in overlays:
            yield file.path, file.inode
