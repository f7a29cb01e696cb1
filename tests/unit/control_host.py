"""A `Host` that lives in memory, and a server for it on a real unix socket."""

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import trio

from qsnapd.control.authorization import Access
from qsnapd.control.listening import open_listener
from qsnapd.control.server import Server
from qsnapd.errors import (
    Effect,
    JobCancelled,
    SnapshotExists,
    UnknownSnapshot,
    UnknownVm,
    VmBusy,
    VmExists,
    WrongState,
)
from qsnapd.model.event import Event, EventKind
from qsnapd.model.findings import Finding, Severity, StoreCheck
from qsnapd.model.freeze import Filesystem
from qsnapd.model.job import JobInfo, JobKind, Phase
from qsnapd.model.launch import LaunchInfo, NewOverlay
from qsnapd.model.parsing import parse_manifest
from qsnapd.model.plan import Loading
from qsnapd.model.request import (
    CloneRequest,
    CreateRequest,
    DeleteRequest,
    PruneRequest,
    RevertRequest,
)
from qsnapd.model.retention import Pruned, Refusal
from qsnapd.model.snapshot import (
    DiskLayer,
    ImageFormat,
    Machine,
    Manifest,
    MemoryImage,
    Process,
    Strategy,
)
from qsnapd.model.state import Condition
from qsnapd.model.transfer import (
    Export,
    ExportedFile,
    ExportRequest,
    ImportRequest,
    ScanResult,
    TransferProgress,
)
from qsnapd.model.verification import Check, Outcome, Verification
from qsnapd.model.vm import DiskInfo, VmInfo
from qsnapd.snapshot.moving.meter import Tell

Request = CreateRequest | RevertRequest | DeleteRequest | PruneRequest | CloneRequest
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GIB = 1 << 30


def manifest(name: str, parent: str | None = None, *, minute: int = 0) -> Manifest:
    return Manifest(
        name=name,
        vm="vm1",
        parent=parent,
        created_at=NOW.replace(minute=minute),
        state="running",
        reason="RUNNING_BOOTED",
        strategy=Strategy.BACKGROUND,
        image_format=ImageFormat.MAPPED_RAM,
        paused_ms=12.5,
        total_ms=800.0,
        memory=MemoryImage(path="/s/memory.img", size_bytes=GIB, allocated_bytes=4096),
        disks=(
            DiskLayer(
                target="vda",
                node="disk0",
                frozen="/d/base.qcow2",
                frozen_format="qcow2",
                overlay="/d/base.after-s1.qcow2",
                virtual_size_bytes=GIB,
                chain=(),
            ),
        ),
        qemu_version="10.0.2",
        machine=Machine(
            type="pc-q35-10.0",
            ram_bytes=GIB,
            process=Process(exe="/usr/bin/qemu", argv=("qemu",), cwd="/", uid=0, gid=0),
        ),
    )


class FakeJob:
    """Moves only when the test says so."""

    def __init__(self, host: "FakeHost", kind: JobKind, result: Manifest) -> None:
        self._host = host
        self._result = result
        self._moved = trio.Event()
        self.error: JobCancelled | WrongState | None = None
        self._info = JobInfo(
            id=7,
            vm=result.vm,
            kind=kind,
            snapshot=result.name,
            phase=Phase.PREPARING,
            started_at=NOW,
            elapsed_ms=0.0,
            percent=0.0,
            done_bytes=0,
            total_bytes=GIB,
            rate_bytes_per_s=0.0,
            left_s=None,
        )

    def info(self) -> JobInfo:
        return self._info

    async def changed(self, since: JobInfo) -> JobInfo:
        while self._info == since and not since.phase.ended:
            await self._moved.wait()
        return self._info

    async def wait(self) -> Manifest:
        await self.wait_done()
        return self._result

    async def wait_done(self) -> None:
        while not self._info.phase.ended:
            await self._moved.wait()
        if self.error is not None:
            raise self.error

    def move(self, phase: Phase, done_bytes: int = 0) -> None:
        update = {"phase": phase, "done_bytes": done_bytes, "percent": 100 * done_bytes / GIB}
        self._info = self._info.model_copy(update=update)
        if phase is Phase.DONE:
            self._host.manifests[self._result.name] = self._result
            self._host.current_name = self._result.name
        if phase.ended:
            self._host.running, self._host.ended = None, self
        self._moved.set()
        self._moved = trio.Event()

    def cancel(self) -> None:
        self.error = JobCancelled("cancelled, and undone", effect=Effect.ROLLED_BACK)
        self.move(Phase.CANCELLED)


@dataclass(frozen=True)
class FakePruning:
    job: FakeJob
    pruned: Pruned


class FakeHost:
    """Two VMs, of which vm1 runs; jobs end by themselves if `hurry` is set."""

    def __init__(self) -> None:
        self.hurry = True
        self.condition = Condition.RUNNING_BOOTED
        self.frozen = 0
        self.manifests = {m.name: m for m in (manifest("s1"), manifest("s2", "s1", minute=1))}
        self.current_name: str | None = "s2"
        self.running: FakeJob | None = None
        self.ended: FakeJob | None = None
        self.requests: list[Request] = []
        self.pruned = Pruned(deleted=("s1",), refused=(Refusal(name="s2", why="it is in use"),))
        """What every prune comes to."""
        self.transfers: list[ExportRequest | ImportRequest] = []
        self.read: list[bytes] = []
        """What came through the descriptors of imports."""
        self.go_on = trio.Event()
        self.go_on.set()
        self.started = trio.Event()
        self.subscribed = trio.Event()
        self.verdict: Check | None = Check(
            what="memory image", outcome=Outcome.SOUND, detail="12 bytes"
        )
        """What every verification finds; None: it has no end."""
        self.findings: tuple[Finding, ...] = ()
        """What every examination finds, and mends if it is to."""
        self.skipped: tuple[str, ...] = ()
        self.scanned: list[str] = []
        self.scan_result = ScanResult(found=())
        self.verifying = trio.Event()
        self.left = trio.Event()
        self._subscribers: set[trio.MemorySendChannel[Event]] = set()

    async def look_at_all(self) -> tuple[VmInfo, ...]:
        return self.vms()

    async def look(self, name: str) -> VmInfo:
        return self.vm(name)

    def vms(self) -> tuple[VmInfo, ...]:
        return (self._info("vm1", self.condition), self._info("vm2", Condition.SHUTOFF_SHUTDOWN))

    def vm(self, name: str) -> VmInfo:
        for info in self.vms():
            if info.name == name:
                return info
        raise UnknownVm(f"there is no VM {name!r}")

    def name_of(self, word: str) -> str:
        return "vm1" if word == "1234" else self.vm(word).name

    async def disks(self, name: str) -> tuple[DiskInfo, ...]:
        self.vm(name)
        disk = DiskInfo(
            target="vda",
            node="disk0",
            format="qcow2",
            path="/d/base.qcow2",
            virtual_size_bytes=GIB,
            chain_depth=1,
        )
        return (disk,)

    async def suspend(self, name: str) -> None:
        self.vm(name)
        self.condition = Condition.PAUSED_USER
        self.publish("Suspended", "Paused")

    async def resume(self, name: str) -> None:
        self.vm(name)
        self.condition = Condition.RUNNING_UNPAUSED
        self.publish("Resumed", "Unpaused")

    async def freeze_filesystems(self, name: str, mountpoints: Sequence[str]) -> int:
        self.vm(name)
        if self.frozen:
            raise WrongState(f"the file systems of VM {name} are frozen already")
        self.frozen = len(mountpoints) or 2
        return self.frozen

    async def thaw_filesystems(self, name: str) -> int:
        self.vm(name)
        thawed, self.frozen = self.frozen, 0
        return thawed

    async def filesystems(self, name: str) -> tuple[Filesystem, ...]:
        self.vm(name)
        root = Filesystem(mountpoint="/", name="vda1", type="ext4", devices=("/dev/vda",))
        return (root, Filesystem(mountpoint="/proc", name="proc", type="proc"))

    async def create(self, name: str, request: CreateRequest) -> FakeJob:
        if request.name in self.manifests:
            raise SnapshotExists(f"VM {name} has a snapshot {request.name!r} already")
        result = manifest(request.name or "auto", self.current_name, minute=2)
        return self._start(name, JobKind.CREATE, request, result)

    async def revert(self, name: str, request: RevertRequest) -> FakeJob:
        return self._start(name, JobKind.REVERT, request, self.snapshot(name, request.name))

    async def delete(self, name: str, request: DeleteRequest) -> FakeJob:
        return self._start(name, JobKind.DELETE, request, self.snapshot(name, request.name))

    async def prune(self, name: str, request: PruneRequest) -> FakePruning:
        job = self._start(name, JobKind.DELETE, request, self.manifests["s2"])
        return FakePruning(job, self.pruned)

    async def foresee_prune(self, name: str, request: PruneRequest) -> Pruned:
        self.vm(name)
        return self.pruned

    async def clone(self, name: str, request: CloneRequest) -> FakeJob:
        if request.clone == "vm2":
            raise VmExists("there is a VM 'vm2' already")
        return self._start(name, JobKind.CLONE, request, self.snapshot(name, request.name))

    async def undefine(self, name: str, *, remove_storage: bool) -> tuple[str, ...]:
        if name != "vm2":
            raise WrongState(f"VM {name} is no clone: it is in the configuration file")
        return ("/run/vm2.sock", *(("/d/vm2.qcow2",) if remove_storage else ()))

    async def start(self, name: str) -> FakeJob:
        request = RevertRequest(name="s1")
        return self._start(name, JobKind.START, request, self.manifests["s1"])

    async def launch(self, name: str, request: RevertRequest) -> LaunchInfo:
        process = self.snapshot(name, request.name).machine.process
        return LaunchInfo(
            vm=name,
            snapshot=request.name,
            executable=process.exe,
            argv=process.argv,
            command_line=process.exe,
            cwd=process.cwd,
            uid=0,
            gid=0,
            environment={"LANG": "C", "QSNAPD_TOKEN": "0"},
            overlays=(
                NewOverlay(
                    target="vda", path="/d/new 1", backing="/d/base.qcow2", backing_format="raw"
                ),
            ),
            loading=Loading(memory_file="/s/memory.img", image_format=ImageFormat.MAPPED_RAM),
        )

    async def export(
        self, name: str, request: ExportRequest, descriptor: int | None, tell: Tell
    ) -> Export:
        self.vm(name)
        self.transfers.append(request)
        tell(TransferProgress(step="memory", done_bytes=1, total_bytes=2))
        if descriptor is not None:
            os.write(descriptor, b"stream")
        await self.go_on.wait()
        memory = ExportedFile(size_bytes=GIB, data_bytes=4096, sha256="0" * 64)
        origin = self.snapshot(name, request.name).model_copy(update={"disks": ()})
        return Export(exported_at=NOW, snapshot=origin, memory=memory, disks=())

    async def take_in(
        self, name: str, request: ImportRequest, descriptor: int | None, tell: Tell
    ) -> tuple[str, tuple[str, ...]]:
        self.vm(name)
        self.transfers.append(request)
        if descriptor is not None:
            self.read.append(os.read(descriptor, 100))
        taken = manifest(request.name or "imported", minute=3)
        self.manifests[taken.name] = taken
        return taken.name, ("a note",)

    def job(self, name: str) -> JobInfo | None:
        self.vm(name)
        return self.running.info() if self.running else None

    def last_job(self, name: str) -> JobInfo | None:
        self.vm(name)
        return self.ended.info() if self.ended else None

    def abort(self, name: str) -> None:
        if self.running is None:
            raise WrongState(f"no job runs on VM {name}")
        self.running.cancel()

    async def take_in_metadata(
        self, name: str, text: str, new_name: str | None, tell: Tell
    ) -> tuple[str, tuple[str, ...]]:
        self.vm(name)
        taken = parse_manifest(text, "it")
        taken = taken.model_copy(update={"name": new_name or taken.name})
        self.manifests[taken.name] = taken
        return taken.name, ("a note",)

    async def scan(self, name: str, directory: str, tell: Tell) -> ScanResult:
        self.vm(name)
        tell(TransferProgress(step="checking s1", done_bytes=0, total_bytes=0))
        self.scanned.append(directory)
        return self.scan_result

    async def fsck(self, name: str, *, repair: bool) -> StoreCheck:
        self.vm(name)
        findings = tuple(f.model_copy(update={"repaired": repair}) for f in self.findings)
        clean = all(f.repaired or f.severity is Severity.NOTE for f in findings)
        return StoreCheck(vm=name, clean=clean, findings=findings, skipped=self.skipped)

    async def verify(self, name: str, snapshot: str, *, deep: bool = False) -> Verification:
        self.vm(name)
        self.snapshot(name, snapshot)
        self.verifying.set()
        if self.verdict is None:
            try:
                await trio.sleep_forever()
            finally:
                self.left.set()
        return Verification(
            vm=name,
            snapshot=snapshot,
            deep=deep,
            sound=self.verdict.outcome is not Outcome.WRONG,
            checks=(self.verdict,),
        )

    def snapshots(self, name: str) -> tuple[Manifest, ...]:
        self.vm(name)
        return tuple(self.manifests.values()) if name == "vm1" else ()

    def snapshot(self, name: str, snapshot: str) -> Manifest:
        self.vm(name)
        if snapshot not in self.manifests:
            raise UnknownSnapshot(f"VM {name} has no snapshot {snapshot!r}")
        return self.manifests[snapshot]

    def users(self, name: str) -> dict[str, tuple[str, ...]]:
        return {"s1": ("web2",)}

    def current(self, name: str) -> str | None:
        return self.current_name if name == "vm1" else None

    async def redefine(self, name: str, text: str, *, current: bool) -> str:
        self.vm(name)
        brought = parse_manifest(text, "it")
        self.manifests[brought.name] = brought
        if current:
            self.current_name = brought.name
        return brought.name

    async def rename_snapshot(self, name: str, snapshot: str, new_name: str) -> None:
        await self.copy_snapshot(name, snapshot, new_name)
        del self.manifests[snapshot]

    async def copy_snapshot(self, name: str, snapshot: str, new_name: str) -> None:
        self.vm(name)
        if new_name in self.manifests:
            raise SnapshotExists(f"VM {name} has a snapshot {new_name!r} already")
        copied = self.snapshot(name, snapshot)
        self.manifests[new_name] = copied.model_copy(update={"name": new_name})

    async def set_current(self, name: str, snapshot: str) -> None:
        self.current_name = self.snapshot(name, snapshot).name

    @contextmanager
    def subscribe(self) -> Iterator[trio.MemoryReceiveChannel[Event]]:
        send, receive = trio.open_memory_channel[Event](16)
        self._subscribers.add(send)
        self.subscribed.set()
        try:
            with send, receive:
                yield receive
        finally:
            self._subscribers.discard(send)

    def publish(self, event: str, detail: str) -> None:
        happened = Event(kind=EventKind.LIFECYCLE, vm="vm1", at=NOW, event=event, detail=detail)
        for subscriber in self._subscribers:
            subscriber.send_nowait(happened)

    @property
    def listeners(self) -> int:
        return len(self._subscribers)

    def _start(
        self,
        name: str,
        kind: JobKind,
        request: Request,
        result: Manifest,
    ) -> FakeJob:
        self.vm(name)
        if self.running is not None:
            raise VmBusy(f"VM {name} is busy")
        self.requests.append(request)
        job = self.running = FakeJob(self, kind, result)
        self.started.set()
        if self.hurry:
            job.move(Phase.DONE)
        return job

    def _info(self, name: str, condition: Condition) -> VmInfo:
        return VmInfo(
            name=name,
            state=condition.state.text,
            state_number=condition.state,
            reason=condition.reason_text,
            reason_number=condition.reason_number,
            connected=condition.state.name != "SHUTOFF",
            qmp=f"/run/{name}.qmp",
            pid=1234 if name == "vm1" else None,
            ram_bytes=GIB,
            snapshots=len(self.manifests) if name == "vm1" else 0,
            current_snapshot=self.current(name),
        )


class Served:
    """A server, and the host behind it."""

    def __init__(self, path: Path, host: FakeHost) -> None:
        self.path = path
        self.host = host

    async def connect(self) -> trio.SocketStream:
        return await trio.open_unix_socket(self.path)

    @classmethod
    @asynccontextmanager
    async def at(cls, directory: Path, access: Access | None = None) -> AsyncIterator[Self]:
        """Serve a new FakeHost below *directory* until the block ends."""
        path, host, access = directory / "io.qsnapd", FakeHost(), access or Access()
        listener = open_listener(path, access)
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, Server(host, access).handle, [listener])
            yield cls(path, host)
            nursery.cancel_scope.cancel()
