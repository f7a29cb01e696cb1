"""What qsnapd keeps for itself, damaged: journals, plans, leases, and whatever else it writes down.

The first byte of an input says which file it is the content of.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from qsnapd.daemon.remembered import recall
from qsnapd.errors import StoreError, UnknownSnapshot
from qsnapd.model.base import Frozen
from qsnapd.model.deletion import DeletePlan, Image, Merge
from qsnapd.model.freeze import OwedThaw
from qsnapd.model.names import check_name
from qsnapd.model.plan import JournalEntry, Launch
from qsnapd.model.request import CreateRequest
from qsnapd.snapshot.moving.imported import RECORD_NAME, remove_leftovers
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.store.deletions import DELETION_NAME
from qsnapd.store.leases import LEASES_NAME
from qsnapd.store.made import MADE_NAME, MadeFile, MadeRecord
from qsnapd.store.manifests import MANIFEST_NAME
from qsnapd.store.owed_thaw import OWED_THAW_NAME, read_owed_thaw
from qsnapd.store.pending import NewestDisk, NewestDisks, Pending, PendingPlan
from qsnapd.store.registry import (
    LAST_SEEN_NAME,
    REGISTRATION_NAME,
    read_last_seen,
    read_registration,
)
from qsnapd.store.renaming import RENAMING_NAME, Renaming, finish_renaming
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.become import on_newest_images
from qsnapd.vm.identity import identify
from tests.fuzz import seeds
from tests.fuzz.mutating import spoil_json
from tests.fuzz.targets.target import Feed, Target, in_this_thread, scratch
from tests.unit.situations import situation

VM = "vm1"
FOREIGN = "of somebody else"
"""A file that nothing here says is qsnapd's to touch."""
PENDING = "pending"


class _World:
    """The part of a store that is one VM's, with one damaged file in it."""

    def __init__(self, folder: Path) -> None:
        self.foreign = folder / FOREIGN
        self.foreign.write_bytes(b"mine")
        self.directory = folder / VM
        self.directory.mkdir()
        self.pending = folder / PENDING / VM
        self.pending.mkdir(parents=True)
        self.identity = identify(os.getpid())

    def feed(self, data: bytes) -> None:
        kind, text = data[:1], data[1:]
        name, read = _FILES[kind[0] % len(_FILES)] if kind else _FILES[0]
        above = self.pending if read in (_plan, _newest) else self.directory
        path = above / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
        try:
            found = read(self)
            if isinstance(found, Frozen):
                written = found.model_dump_json()
                assert type(found).model_validate_json(written).model_dump_json() == written
        except (StoreError, UnknownSnapshot):
            pass
        finally:
            path.unlink(missing_ok=True)
            if path.parent != above:
                with suppress(OSError):
                    path.parent.rmdir()
        assert self.foreign.read_bytes() == b"mine"

    @property
    def store(self) -> VmStore:
        return VmStore(VM, self.directory)

    @property
    def as_pending(self) -> Pending:
        return Pending.of(self.pending.parent, VM)


def _journal(world: _World) -> object:
    return world.store.journal.read()


def _deletion(world: _World) -> object:
    return world.store.deletion.read()


def _leases(world: _World) -> object:
    store = world.store
    store.leases.all()
    store.leases.prune()
    return store.leases.recorded()


def _made(world: _World) -> object:
    made = world.store.made
    made.files(), made.seen()
    made.former(seeds.whole_manifest().disks[0].chain)
    made.forget_gone()
    made.moved(*seeds.whole_manifest().disks[0].chain)
    return None


def _renaming(world: _World) -> object:
    return finish_renaming(world.store)


def _current(world: _World) -> object:
    if (name := world.store.current()) is not None:
        assert check_name(name)
    return None


def _state(world: _World) -> object:
    return recall(world.store, world.identity)


def _import(world: _World) -> object:
    remove_leftovers(world.store, float("inf"))
    return None


def _snapshot(world: _World) -> object:
    store = world.store
    found = store.snapshots()
    assert bool(found) != bool(store.problems())
    return store.manifest("s1")


def _plan(world: _World) -> object:
    return world.as_pending.read()


def _newest(world: _World) -> object:
    disks = world.as_pending.newest_disks()
    on_newest_images(("qemu", "-hda", "/d/base.qcow2"), disks, cwd="/", identify=_told_apart)
    return None


def _told_apart(path: str) -> tuple[int, int]:
    return (1, len(path))


_FILES: tuple[tuple[str, Callable[[_World], object]], ...] = (
    (".journal.json", _journal),
    (DELETION_NAME, _deletion),
    (LEASES_NAME, _leases),
    (MADE_NAME, _made),
    (REGISTRATION_NAME, lambda world: read_registration(world.store)),
    (LAST_SEEN_NAME, lambda world: read_last_seen(world.store)),
    (OWED_THAW_NAME, lambda world: read_owed_thaw(world.store)),
    (RENAMING_NAME, _renaming),
    (".current", _current),
    (".state.json", _state),
    (f".s1.partial/{RECORD_NAME}", _import),
    (f"s1/{MANIFEST_NAME}", _snapshot),
    ("plan.json", _plan),
    ("disks.json", _newest),
)


@contextmanager
def _open() -> Iterator[Feed]:
    with scratch() as folder, in_this_thread():
        yield _World(folder).feed


def _seeds() -> list[bytes]:
    whole = seeds.whole_manifest()
    chain = whole.disks[0].chain
    image = Image(file=chain[0], format="qcow2", made=True)
    merge = Merge(target="vda", kind="commit", lower=image, upper=image, above=(image,))
    plan = plan_checkpoint(CreateRequest(name="s1", live=True), situation())
    deletion = DeletePlan(
        token="00000000",
        vm=VM,
        name="s1",
        parent=None,
        manifest=whole,
        was_current=True,
        merges=(merge,),
        doomed=chain,
    )
    launch = Launch(
        token="1", executable="/bin/qemu", argv=("qemu",), cwd="/", uid=0, gid=0, groups=(1,)
    )
    lease = '[{"snapshot": "s1", "holder": "vm2", "pid": 1, "start_time_ticks": 5, "mapped": true}]'
    state = f'{{"pid": {os.getpid()}, "start_time_ticks": 1, "condition": "PAUSED_USER"}}'
    record = '{"disks": {"path": "/nowhere/s1-0000", "device": 1, "inode": 2}}'
    documents: tuple[Frozen | str, ...] = (
        JournalEntry(plan=plan, pid=42, start_time_ticks=4242, made=chain),
        deletion,
        lease,
        MadeRecord(files=(MadeFile(file=chain[0]),), seen=(MadeFile(file=chain[1]),)),
        seeds.registration(),
        seeds.last_seen(),
        OwedThaw(agent="/a", pid=1, start_time_ticks=2, since=whole.created_at, why="s1"),
        Renaming(old="s1", new="s2"),
        "s1",
        state,
        record,
        whole,
        PendingPlan(vm=VM, launch=launch, until=None),
        NewestDisks(vm=VM, disks=(NewestDisk(target="vda", chain=chain),)),
    )
    return [
        bytes([number]) + (d.encode() if isinstance(d, str) else d.model_dump_json().encode())
        for number, d in enumerate(documents)
    ]


def _spoil(data: bytes, random: Random) -> bytes:
    return data[:1] + spoil_json(data[1:], random)


TARGETS = (Target("records", _open, _seeds, _spoil, runs_long=60_000),)
