"""A VM, its snapshots, and a job on it that is recorded: what is promised at each moment."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from qsnapd.errors import VmError
from qsnapd.model.plan import Launch
from qsnapd.model.snapshot import Manifest
from qsnapd.qmp.block import FlushNode
from qsnapd.qmp.commands import Command
from qsnapd.store.snapshots import VmStore
from qsnapd.vm.process import wait_gone
from qsnapd.vm.spawn import Spawn, Spawned
from tests.crashes.content import read_content
from tests.crashes.medium import require_complete
from tests.crashes.promises import Outcome, Promise, usual
from tests.crashes.recorder import Recorder
from tests.crashes.vault import Vault
from tests.hardware import Disk
from tests.harness import Vm, open_vm
from tests.parts import Qemu
from tests.real.cases import LAZY, VM
from tests.real.disk_content import read_disk
from tests.real.disk_contents import BLOCK_BYTES
from tests.real.steering import steered
from tests.rig import Rig, open_rig

DISKS = (Disk("qcow2", "virtio", "-blockdev", 1), Disk("raw", "scsi", "-drive", 1))
MEMORY_MIB = 4
QUIT_LIMIT_S = 20.0
FOREIGN = ("web.after-s.qcow2", "disk0.qcow2.partial", "disk0.after-other.qcow2", ".journal.json")
"""What somebody may have put beside his disks, under names that look like ours."""
_FDSET = re.compile(r"/dev/fdset/(\d+)")


class NoQemu(Spawn):
    """A launcher on a host where no VM starts."""

    async def start(self, launch: Launch, log: Path) -> Spawned:
        """Fail. Raises: VmError."""
        raise VmError("this host starts no QEMU")


@dataclass
class Scene:
    """While `open_scene` holds it."""

    qemu: Qemu
    vm: Vm
    rig: Rig
    folder: Path
    """Holds the state directory, and what jobs are asked to put elsewhere."""
    promise: Promise
    recorder: Recorder | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Of all snapshots that ever were, as they were listed last."""
    shown: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    """What the disks of each show."""
    saved: dict[str, bytes] = field(default_factory=dict)
    """What the memory image of each holds."""
    heads: dict[Outcome, tuple[tuple[Path, ...], ...]] = field(default_factory=dict)
    """The images that the VM's disks are on: of several, the first that is there."""
    shows: dict[Outcome, tuple[bytes, ...]] = field(default_factory=dict)
    """What they show, where that is not what the guest has written."""
    marks: dict[str, Path] = field(default_factory=dict)
    """Files that are part of what has come of it, if they are there."""
    needs: dict[str, list[Path]] = field(default_factory=dict)
    """What must be there together with one of these, by the same names."""
    goes_with: dict[str, list[Path]] = field(default_factory=dict)
    """What may be there together with one of these, or not."""
    tolerated: list[str] = field(default_factory=list)
    """Patterns of what may lie about, below `folder` and the VM's."""
    foreign: dict[Path, bytes] = field(default_factory=dict)
    _host: AsyncExitStack = field(default_factory=AsyncExitStack)

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    @property
    def store(self) -> VmStore:
        return self.rig.supervisors[VM].store

    @property
    def runs(self) -> bool:
        """Whether there is a guest."""
        return self.rig.supervisors[VM].attached is not None

    def outcome(self, store: VmStore | None = None) -> Outcome:
        """Return what is there."""
        store = store or self.store
        marks = frozenset(name for name, path in self.marks.items() if path.exists())
        current = store.current()
        names = frozenset(map(usual, store.snapshots()))
        return Outcome(names, current and usual(current), marks)

    def head_of(self, outcome: Outcome) -> list[Path]:
        """Return the images that the VM's disks are on then."""
        return [
            next((path for path in paths if path.exists()), paths[0])
            for paths in self.heads[outcome]
        ]

    def tolerates(self, path: Path) -> bool:
        return any(path.match(pattern) for pattern in self.tolerated)

    def expect(self, *outcomes: Outcome, words: str) -> None:
        """From now on it is one of *outcomes* after a power failure."""
        self._promise(replace(self.promise, outcomes=frozenset(outcomes)), words)

    def done(self) -> None:
        """Whoever asked for the job has been told that it is done: it stays so."""
        self.expect(self.outcome(), words="it is reported as done")

    def _promise(self, promise: Promise, words: str) -> None:
        self.promise = promise
        if self.recorder is not None:
            self.recorder.say(promise, words)

    # --- the guest -----------------------------------------------------------------------

    async def write(
        self, pattern: int, block: int, *, blocks: int = 1, flush: bool = True
    ) -> None:
        """Have something written to all disks, and flushed, as a guest does."""
        piece = bytes([pattern]) * BLOCK_BYTES * blocks
        start = block * BLOCK_BYTES
        after = tuple(d[:start] + piece + d[start + len(piece) :] for d in self.promise.unsure)
        self._promise(replace(self.promise, unsure=after), "the guest writes")
        await self._guest(f"write -P {pattern} {start} {len(piece)}")
        if flush:
            await self.flush()

    async def flush(self) -> None:
        """Have what was written flushed."""
        await self._guest("flush")
        await self.qemu_synced()
        self._promise(replace(self.promise, guest=self.promise.unsure), "the guest has flushed")

    async def _guest(self, words: str) -> None:
        async with self.vm.monitor() as monitor:
            for device in await monitor.execute("query-block"):
                if not device.get("inserted", {"ro": True})["ro"]:
                    line = f'qemu-io -d {device["qdev"]} "{words}"'
                    said = await monitor.execute("human-monitor-command", command_line=line)
                    assert not said.strip(), said

    async def qemu_synced(self, *nodes: str) -> None:
        """Note that QEMU has synced what these nodes write to, by default all active ones."""
        if self.recorder is None:
            return
        async with self.vm.monitor() as monitor:
            fdsets: dict[int, str] = {
                fdset["fdset-id"]: fdset["fds"][0].get("opaque", "")
                for fdset in await monitor.execute("query-fdsets")
                if fdset["fds"]
            }
            devices = await monitor.execute("query-block")
            media = [device["inserted"] for device in devices if "inserted" in device]
            names = nodes or [medium["node-name"] for medium in media if not medium["ro"]]
            for node in await monitor.execute("query-named-block-nodes"):
                if node["node-name"] in names:
                    number = _FDSET.search(node["file"])
                    file = fdsets[int(number[1])] if number else node["file"]
                    self.recorder.qemu_synced(file)

    # --- the recording -------------------------------------------------------------------

    async def learn(self) -> None:
        """Take what is there now for what it is to be for ever, and where the disks are."""
        for manifest in self.rig.host.snapshots(VM):
            self.manifests[manifest.name] = manifest
            self.shown[manifest.name] = tuple(read_disk(Path(d.frozen)) for d in manifest.disks)
            if manifest.memory is not None:
                self.saved[manifest.name] = key_of(Path(manifest.memory.path))
        if self.runs:
            disks = await self.rig.host.disks(VM)
            heads = tuple((Path(d.path),) for d in disks if d.path and not d.left_out)
            self.heads.setdefault(self.outcome(), heads)

    @asynccontextmanager
    async def recorded(
        self, before: Callable[[Command[Any]], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """Record what is done in the block; *before* hears of commands about to be sent."""
        await self.learn()
        self._plant()
        images = self._images() | set(self.foreign)
        but = {path for path in self.vm.folder.iterdir() if path not in images}
        vault = Vault(self.folder.with_name(f"{self.folder.name}.vault"))
        self.recorder = Recorder(vault, (self.folder, self.vm.folder), but)
        self.expect(self.outcome(), words="nothing has begun")

        async def hear(command: Command[Any], step: int) -> None:
            await trio.lowlevel.checkpoint()
            if before is not None:
                await before(command)

        async def note(command: Command[Any], step: int) -> None:
            await trio.lowlevel.checkpoint()
            if isinstance(command, FlushNode):
                await self.qemu_synced(command.node)

        async with AsyncExitStack() as steering:
            steering.enter_context(self.recorder.recording())
            if self.runs:
                supervisor = self.rig.supervisors[VM]
                steering.enter_context(steered(supervisor, before=hear, after=note))
            yield
            await self.learn()
            require_complete(self.recorder)

    async def shut_off(self) -> None:
        """End the VM, as its user does: its disks are flushed."""
        await self.learn()
        supervisor = self.rig.supervisors[VM]
        running = supervisor.require_attached().identity
        async with self.vm.monitor() as monitor:
            with suppress(EOFError, trio.BrokenResourceError):  # it may end first
                await monitor.execute("quit")
        with trio.fail_after(QUIT_LIMIT_S):
            await supervisor.wait_detached()
            await wait_gone(running)

    async def lose_power(self) -> None:
        """End qsnapd and QEMU."""
        await self._host.aclose()
        await self.vm.kill()

    def _images(self) -> set[Path]:
        chains = [Path(f.path) for m in self.manifests.values() for d in m.disks for f in d.chain]
        heads = [path for disks in self.heads.values() for paths in disks for path in paths]
        return {*self.vm.disks, *chains, *heads}

    def _plant(self) -> None:
        """Put things where they do not belong."""
        places = [self.vm.folder / name for name in FOREIGN]
        places += [self.folder / "mine", self.state_dir / "mine", self.state_dir / VM / "mine.txt"]
        for place in places:
            self.foreign[place] = place.name.encode()
            place.write_bytes(place.name.encode())
            place.chmod(0o640)


def key_of(path: Path) -> bytes:
    """Return the same for what holds the same."""
    with path.open("rb") as file:
        return read_content(file.fileno()).key


@asynccontextmanager
async def open_scene(qemu: Qemu, folder: Path) -> AsyncIterator[Scene]:
    """Hold a VM with two small disks, and a host that looks after it."""
    work = folder / "work"
    work.mkdir(parents=True)
    async with open_vm(qemu, LAZY, disks=DISKS, memory_mib=MEMORY_MIB) as vm:
        blank = tuple(bytes(disk.size_mib << 20) for disk in DISKS)
        promise = Promise(frozenset([Outcome(frozenset(), None)]), blank, blank)
        async with AsyncExitStack() as host:
            rig = await host.enter_async_context(open_rig(qemu, work / "state", **{VM: vm}))
            yield Scene(qemu, vm, rig, work, promise, _host=host)
