"""A manifest that was damaged, or brought by somebody, where a snapshot's record belongs.

It is looked at, judged, planned with, brought as a redefinition and taken in. Nothing but the
store may change by that: neither disks nor anybody else's files. The first byte of an input says
which of the snapshots the rest is the record of.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from random import Random

from qsnapd.errors import QsnapError
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.request import CloneRequest, RevertRequest
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.deleting.graph_reading import read_graph
from qsnapd.snapshot.deleting.plan import Scene, plan_deletion
from qsnapd.snapshot.intact import check_snapshot
from qsnapd.snapshot.moving.redefine import Present, redefine
from qsnapd.snapshot.moving.take_in import take_in
from qsnapd.snapshot.restoring.clone_plan import plan_clone
from qsnapd.snapshot.restoring.differences import compare_ram
from qsnapd.snapshot.restoring.left_out import compare_left_out
from qsnapd.snapshot.restoring.revert_plan import describe_launch
from qsnapd.store.manifests import MANIFEST_NAME
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.argv import parse_options
from qsnapd.vm.launch import Parent
from tests.fuzz.mutating import spoil_json
from tests.fuzz.targets.target import Feed, Target, in_this_thread
from tests.unit.fsck_world import World, make_world

NAMES = ("s1", "s2", "left")


def _nothing() -> None: ...


class _Place:
    """The world of `fsck_world`, and a copy of its records to begin from each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.world = make_world(folder)
        self._state, self._kept = folder / "state", folder / "kept"
        shutil.copytree(self._state, self._kept, copy_function=os.link)
        self._before = self._look()

    def feed(self, data: bytes) -> None:
        name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
        for use in (_look_at, _plan, _define, _bring):
            record = self.world.folder(name) / MANIFEST_NAME
            record.unlink()  # not written over: the copy that is kept is the same file
            if use in (_look_at, _plan):
                record.write_bytes(data[1:])
            try:
                with suppress(QsnapError):
                    use(self.world, name, data[1:])
                assert self._look() == self._before
            finally:
                shutil.rmtree(self._state)
                shutil.copytree(self._kept, self._state, copy_function=os.link)

    def _look(self) -> dict[str, tuple[int, int, int]]:
        """All that is not in the store."""
        records = (self._state, self._kept)
        found = {
            str(path): path.stat()
            for path in self._folder.rglob("*")
            if not any(path.is_relative_to(folder) for folder in records)
        }
        return {p: (s.st_size, s.st_mtime_ns, s.st_mode) for p, s in found.items()}


def _look_at(world: World, name: str, text: bytes) -> None:
    """What fsck does with it, and `ListSnapshots`."""
    store = VmStore("vm1", world.store.directory)
    assert (name in store.snapshots()) != (name in store.problems())
    World(store, world.images, world.live).findings()
    World(store, world.images, None).repaired()


def _plan(world: World, name: str, text: bytes) -> None:
    """What a restore, a clone and a deletion would do."""
    store = VmStore("vm1", world.store.directory)
    manifest = store.manifest(name)
    graph = read_graph(store, [], ())
    with suppress(QsnapError):
        plan_deletion(name, Scene("vm1", store.snapshots(), "s2", graph, None))
    options = parse_options(manifest.machine.process.argv[1:])
    others = store.snapshots().values()
    looks: tuple[Callable[[], object], ...] = (
        partial(describe_launch, manifest, RevertRequest(name=name), Parent()),
        partial(_clone, manifest, world.images),
        lambda: list(compare_ram(manifest.machine, options)),
        lambda: list(compare_left_out(manifest, others, (), loads=True)),
        partial(check_snapshot, manifest),
    )
    for look in looks:
        with suppress(QsnapError):
            look()


def _clone(manifest: Manifest, directory: Path) -> None:
    request = CloneRequest(name=manifest.name, clone="vm2")
    plan = plan_clone(
        manifest, request, Parent(), source="vm1", qmp_from=Path("/q"), directory=directory
    )
    for overlay in plan.overlays:
        assert os.path.normpath(overlay.path).startswith("/")
        assert os.path.dirname(overlay.path) == os.path.dirname(overlay.partial)


def _define(world: World, name: str, text: bytes) -> None:
    store = VmStore("vm1", world.store.directory)
    manifest = redefine(store, parse_manifest(text, "it"), Present(), check=_nothing).manifest
    assert store.manifest(manifest.name) == manifest


def _bring(world: World, name: str, text: bytes) -> None:
    store = VmStore("vm1", world.store.directory)
    manifest = take_in(store, parse_manifest(text, "it"), check=_nothing).manifest
    assert store.manifest(manifest.name) == manifest


@cache
def _place() -> _Place:
    """One for the process: its records name files by their inodes."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _Place(Path(folder))


@contextmanager
def _open() -> Iterator[Feed]:
    with in_this_thread():
        yield _place().feed


def _seeds() -> list[bytes]:
    store = _place().world.store
    return [
        bytes([number]) + _startable(store.manifest(name)).model_dump_json().encode()
        for number, name in enumerate(NAMES)
    ]


def _startable(manifest: Manifest) -> Manifest:
    """The same, of a QEMU whose command line names its disks and whose program is there."""
    words = [f"file={disk.chain[-1].path},if=virtio" for disk in manifest.disks]
    argv = ("qemu", *(word for drive in words for word in ("-drive", drive)))
    process = manifest.machine.process.model_copy(update={"argv": argv, "exe": "/bin/sh"})
    machine = manifest.machine.model_copy(update={"process": process})
    return manifest.model_copy(update={"machine": machine})


def _spoil(data: bytes, random: Random) -> bytes:
    return data[:1] + spoil_json(data[1:], random)


TARGETS = (Target("store", _open, _seeds, _spoil, runs_long=5_000, runs_short=60),)
