"""One fake QEMU with a store of its own, and what must be true when a job on it has ended."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

import trio
import trio.testing

from qsnapd.model.job import JobKind
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import ImageFormat, Manifest, Process, Strategy
from qsnapd.model.state import State
from qsnapd.patience import Patience
from qsnapd.qmp.commands import QueryStatus
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.job import Job
from qsnapd.snapshot.recovery import recover, recover_without_qemu
from qsnapd.snapshot.taking.create import Checkpoint
from qsnapd.store.layout import Store
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.attached import AttachedVm, learn
from qsnapd.vm.identity import ProcessIdentity, identify
from qsnapd.vm.spawn import Spawn
from qsnapd.vm.tracker import Tracker
from tests.faults.fake_blocks import VIRTUAL_SIZE_BYTES
from tests.faults.fake_migration import SavingScript
from tests.faults.fake_qemu import Facts, FakeQemu
from tests.faults.fake_transport import FakeTransport
from tests.parts import SYSTEM_QEMU, find_qemu

DRAIN_END_S = 10.0
VM = "vm1"


@dataclass(frozen=True)
class Case:
    """A kind of checkpoint, on a kind of QEMU."""

    version: str
    strategy: Strategy | None
    """None: disk-only."""
    image_format: ImageFormat | None = None
    status: str = "running"
    disks: int = 1
    confined: bool = False
    """QEMU opens no file by name."""
    saving: SavingScript = field(default_factory=SavingScript)

    @property
    def request(self) -> CreateRequest:
        return CreateRequest(
            name="s1",
            strategy=self.strategy,
            image_format=self.image_format,
            disk_only=self.strategy is None,
        )

    def __str__(self) -> str:
        words = [self.version, self.strategy or "disk-only", self.image_format, self.status]
        words += ["confined"] if self.confined else []
        return "-".join(word for word in words if word not in (None, "running"))


CASES = tuple(
    Case(version, strategy) for version in ("7.2.22", "10.0.2") for strategy in Strategy
)


@dataclass(frozen=True)
class Look:
    """All that a job which fails has to leave as it was."""

    facts: Facts
    files: frozenset[str]
    descriptors: tuple[str, ...]
    """Files that this process has open; the fake QEMU's are among them."""


class Scene:
    """The world of one test; see `open_scene`."""

    def __init__(self, case: Case, folder: Path, store: VmStore, qemu: FakeQemu) -> None:
        self.case = case
        self.folder = folder
        self.store = store
        self.qemu = qemu
        self.identity = identify(os.getpid())
        self.transport = FakeTransport(qemu.monitor)
        self.before = self.look()

    async def attach(self, *, identity: ProcessIdentity | None = None) -> AttachedVm:
        """Connect as a daemon does that has just started."""
        self.transport = FakeTransport(self.qemu.monitor)
        session, tracker = QmpSession(self.transport), Tracker(lambda old, new: None)
        session.listen(tracker.on_event)
        process = Process(
            exe=sys.executable,
            argv=("qemu", *self._disk_options()),
            cwd="/",
            uid=os.getuid(),
            gid=os.getgid(),
        )
        self.vm = await learn(VM, session, tracker, identity or self.identity, process)
        status = await session.execute(QueryStatus())
        tracker.on_attached(status.status, None)
        self.transport.sent.clear()
        return self.vm

    def _disk_options(self) -> list[str]:
        words = []
        for name, node in self.qemu.blocks.devices.items():
            options = f"driver=qcow2,node-name={name},file.driver=file"
            words += ["-blockdev", f"{options},file.filename={node.filename}"]
        return words

    def new_job(self, kind: JobKind = JobKind.CREATE) -> Job:
        return Job(1, VM, kind, None, lambda job: None)

    async def take_one(self) -> Manifest:
        """Take the checkpoint that the case is about."""
        return await self.take(self.case.request)

    async def take_another(self) -> Manifest:
        """Show that the VM is fit for the next one."""
        self.qemu.migration.script = SavingScript()
        return await self.take(self.case.request.model_copy(update={"name": "s2"}))

    async def take(self, request: CreateRequest, job: Job | None = None) -> Manifest:
        """Take a checkpoint with the connection of the last `attach`."""
        job = job or self.new_job()
        checkpoint = Checkpoint(self.vm, self.store, job, qemu_img=qemu_img())
        return await checkpoint.take(request)

    async def recover(self) -> str | None:
        """Do what the next daemon does when it finds this QEMU alive."""
        return await recover(
            self.vm, self.store, qemu_img=qemu_img(), launcher=Spawn(), patience=Patience()
        )

    async def recover_offline(self) -> str | None:
        """End QEMU, and do what the next daemon does about that."""
        self.transport.lose()
        self.qemu.end()
        await trio.testing.wait_all_tasks_blocked()
        return await recover_without_qemu(self.store, qemu_img=qemu_img())

    def look(self) -> Look:
        for thread in threading.enumerate():
            if thread.name.startswith("drain"):
                thread.join(DRAIN_END_S)
        files = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]
        names = (_name_of(descriptor) for descriptor in os.listdir("/proc/self/fd"))
        return Look(
            facts=self.qemu.facts(),
            files=frozenset(files),
            descriptors=tuple(sorted(n for n in names if n.startswith(str(self.folder)))),
        )

    # --- what must be true ---------------------------------------------------------------

    def complaints(self, manifest: Manifest | None) -> list[str]:
        """What is wrong now that a job has ended, with *manifest* or without."""
        found = []
        if (manifest is not None) != ("s1" in self.store.snapshots()):
            found.append(f"reported {manifest is not None}, listed {[*self.store.snapshots()]}")
        if self.qemu.migration.harm:
            found.append(self.qemu.migration.harm)
        if self.store.journal.read() or self.store.restoring.read():
            found.append("the journal still has an entry")
        for name, node in self.qemu.blocks.devices.items():
            if node.reads() != self.qemu.tick:
                found.append(f"{name} reads {node.reads()}, the guest wrote {self.qemu.tick}")
        state = self.vm.tracker.condition.state
        if (state is State.RUNNING) != self.qemu.running:
            found.append(f"recorded as {state.text}, QEMU says {self.qemu.status}")
        now = self.look()
        found += not_as_before(self.before, now) if manifest is None else self._untidy(manifest)
        return found

    def offline_complaints(self) -> list[str]:
        """What is wrong on disk after QEMU has ended and somebody has cleared up."""
        found = ["the journal still has an entry"] if self.store.journal.read() else []
        files = self.look().files
        if "s1" not in self.store.snapshots() and files != self.before.files:
            found.append(f"files: {sorted(self.before.files ^ files)}")
        return found + [f"left over: {name}" for name in files if "partial" in name]

    def _untidy(self, manifest: Manifest) -> list[str]:
        """What is wrong beside or with a snapshot that exists."""
        found = []
        before, now = self.before.facts, self.qemu.facts()
        if now.status != before.status and (now.status, before.status) != ("postmigrate", "paused"):
            found.append(f"the VM was {before.status} and is {now.status}")
        if (now.capabilities, now.parameters) != (before.capabilities, before.parameters):
            found.append("capabilities or parameters are not as before")
        overlays = {disk.overlay for disk in manifest.disks}
        names = [node.filename for node in self.qemu.blocks.nodes.values()]
        used = {name for name in names if name.startswith("/dev/fdset/")}
        handed = {opaque for fds in now.fdsets.values() for opaque in fds}
        if used != {f"/dev/fdset/{number}" for number in now.fdsets} or not handed <= overlays:
            found.append(f"descriptor sets: {now.fdsets}")
        if now.named_descriptors or now.block_jobs or now.saving:
            found.append(f"left over: {now.named_descriptors}, {now.block_jobs}, {now.saving}")
        if self.store.current() != manifest.name:
            found.append(f"current is {self.store.current()}")
        if manifest.is_disk_only:
            assert self.qemu.migration.save is None
            return found
        assert self.qemu.migration.save is not None
        for disk in manifest.disks:
            reads, tick = self.qemu.blocks.nodes[disk.node].reads(), self.qemu.migration.save.tick
            if reads != tick:
                found.append(f"disk {disk.target} is of tick {reads}, memory of tick {tick}")
        partial = [name for name in self.look().files if "partial" in name]
        return found + [f"left over: {name}" for name in partial]


def not_as_before(before: Look, now: Look) -> list[str]:
    """What differs; for a job that has not succeeded, every item is a fault."""
    facts = now.facts
    if (before.facts.status, facts.status) == ("paused", "postmigrate"):
        # QEMU leaves this state by running only, and the user wants the VM to stand still.
        facts = replace(facts, status="paused")
    found = [
        f"{name}: was {getattr(before.facts, name)}, is {getattr(facts, name)}"
        for name in (f.name for f in fields(Facts))
        if getattr(before.facts, name) != getattr(facts, name)
    ]
    if before.files != now.files:
        found.append(f"files: {sorted(before.files ^ now.files)}")
    if before.descriptors != now.descriptors:
        found.append(f"descriptors: was {before.descriptors}, is {now.descriptors}")
    return found


def _name_of(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""  # the one that listed them


@asynccontextmanager
async def open_scene(case: Case) -> AsyncIterator[Scene]:
    """Have a fake QEMU for the block, attached."""
    with tempfile.TemporaryDirectory(prefix="q") as name, Store(Path(name) / "state") as store:
        folder = Path(name)
        images = {f"disk{n}": folder / f"disk{n}.qcow2" for n in range(case.disks)}
        for image in images.values():
            image.write_bytes(_empty_qcow2())
        paths = {node: str(path) for node, path in images.items()}
        vm_store = store.vm(VM)
        qemu = FakeQemu(paths, version=case.version, status=case.status)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.monitor.run)
            try:
                qemu.migration.script = case.saving
                qemu.blocks.is_confined = case.confined
                scene = Scene(case, folder, vm_store, qemu)
                await scene.attach()
                yield scene
            finally:
                qemu.end()


def qemu_img() -> str:
    return str(find_qemu(SYSTEM_QEMU).img)


@cache
def _empty_qcow2() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "empty.qcow2"
        create = [qemu_img(), "create", "-q", "-f", "qcow2", str(image), str(VIRTUAL_SIZE_BYTES)]
        subprocess.run(create, check=True)
        return image.read_bytes()
