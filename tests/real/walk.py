"""A random walk through everything that can be done to a VM's snapshots.

After every step the VM, its files and the store are held against a model of plain bytes.
"""

import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import trio
import trio.testing

from qsnapd.errors import QsnapError, RequestError
from qsnapd.model.plan import RevertPlan
from qsnapd.model.request import (
    CreateRequest,
    DeleteRequest,
    Descendants,
    Memory,
    RevertRequest,
)
from qsnapd.model.snapshot import Strategy
from tests.harness import Vm
from tests.real.cases import VM
from tests.real.disk_content import chain_of, read_disk
from tests.real.tree_model import GivenUp, Power, TreeModel
from tests.rig import Rig

DISK_BYTES = 1 << 20
QDEVS = {"vda": "/machine/peripheral/device0/virtio-backend", "sda": "device1"}
"""Of the disks, by target."""
LONGEST_WRITE_BYTES = 200 << 10
FEW = 8
"""With more snapshots than these, they are deleted more often than taken."""
CHECK_STORE_EVERY = 4
SETTLE_LIMIT_S = 10.0

Step = Callable[[], Awaitable[None]]


class Walk:
    """One walk; knows what should be. `rig` is replaced when the daemon is."""

    def __init__(self, vm: Vm, rig: Rig, seed: int) -> None:
        self._vm = vm
        self.rig = rig
        self._random = random.Random(seed)
        self._model = TreeModel({target: bytearray(DISK_BYTES) for target in QDEVS})
        self._names = 0
        self.done: list[str] = []
        """What was done so far, for whoever has to understand a failure."""
        self._foreign = {
            vm.folder / "disk0.after-mine.qcow2": b"not qsnapd's",
            vm.folder / "disk0.qcow2.bak": b"neither",
        }
        for path, content in self._foreign.items():
            path.write_bytes(content)

    async def step(self) -> None:
        """Do something, then look at everything."""
        steps = self._steps()
        [(_, step)] = self._random.choices(steps, [weight for weight, _ in steps])
        await step()
        await self.check()

    def _steps(self) -> list[tuple[int, Step]]:
        model, many = self._model, len(self._model.snapshots) > FEW
        steps: list[tuple[int, Step]] = []
        if model.power == "off":
            steps.append((4, self._start))
        elif model.power == "running":
            steps += [(8, self._write), (1, self._suspend)]
        else:
            steps.append((4, self._resume))
        if model.power != "off":
            steps.append((2 if many else 6, self._create))
        if model.snapshots:
            steps += [(3, self._revert), (8 if many else 3, self._delete), (1, self._rename)]
        return steps

    # --- steps ---------------------------------------------------------------------------

    async def _write(self) -> None:
        target = self._random.choice([*QDEVS])
        length = 512 * self._random.randint(1, LONGEST_WRITE_BYTES // 512)
        offset = 512 * self._random.randint(0, (DISK_BYTES - length) // 512)
        pattern = self._random.randint(0, 255)
        self.done.append(f"write {target} {offset} {length} {pattern}")
        await self._qemu_io(target, f"write -P {pattern} {offset} {length}")
        self._model.write(target, offset, bytes([pattern]) * length)

    async def _create(self) -> None:
        name, disk_only = self._new_name(), self._random.random() < 0.5
        self.done.append(f"create {name} {'disk-only' if disk_only else 'stopped'}")
        strategy = None if disk_only else Strategy.STOPPED
        request = CreateRequest(
            name=name, disk_only=disk_only, strategy=strategy, hash_memory=False
        )
        if await self._refused(self.rig.create(VM, request), maybe=self._model.stiff):
            return
        self._model.take(name, memory=not disk_only)

    async def _revert(self) -> None:
        model = self._model
        name = self._any_name()
        powers: list[Power | None] = [None, "running", "running", "paused"]
        power = self._random.choice(powers)
        discard = self._random.random() < 0.6 or model.stiff
        memory = Memory.EAGER if self._random.random() < 0.7 else None
        self.done.append(f"revert {name} {power} discard={discard} {memory}")
        assert power != "off"
        request = RevertRequest(name=name, state=power, discard=discard, memory=memory)
        left, was_off = await self._active(), model.power == "off"
        job = await self.rig.host.revert(VM, request)
        await job.wait()
        kept = job.info().kept
        assert (kept is not None) == (not was_off and not discard)
        if kept is not None:
            model.take(kept, memory=True)
        else:
            for target, path in left.items():
                if was_off and not path.exists():
                    continue  # nobody had written to it
                model.given_up.append(GivenUp(chain_of(path), bytes(model.present[target])))
        model.revert(name, power)

    async def _delete(self) -> None:
        model = self._model
        name = self._any_name()
        descendants = self._random.choice([Descendants.NONE] * 4 + [*Descendants])
        metadata_only = self._random.random() < 0.15
        meant = model.meant(name, descendants)
        if meant & self.rig.host.users(VM).keys():
            return  # a VM's RAM is a mapping of it: refused, as other tests show
        self.done.append(f"delete {name} {descendants} metadata_only={metadata_only}")
        if metadata_only:
            for n in meant:
                for disk in self.rig.host.snapshot(VM, n).disks:
                    model.forgotten.update(chain_of(Path(disk.frozen)))
        request = DeleteRequest(name=name, descendants=descendants, metadata_only=metadata_only)
        delete = (await self.rig.host.delete(VM, request)).wait()
        if await self._refused(delete, maybe=model.stiff):
            return
        model.delete(name, descendants)

    async def _rename(self) -> None:
        name, new_name = self._any_name(), self._new_name()
        if name in self.rig.host.users(VM) or self._model.power == "off":
            return  # a QEMU needs it under this name, now or when it is started
        self.done.append(f"rename {name} {new_name}")
        await self.rig.host.rename_snapshot(VM, name, new_name)
        self._model.rename(name, new_name)

    async def _suspend(self) -> None:
        self.done.append("suspend")
        await self.rig.host.suspend(VM)
        self._model.power = "paused"

    async def _resume(self) -> None:
        self.done.append("resume")
        await self.rig.host.resume(VM)
        self._model.power, self._model.stiff = "running", False

    async def _start(self) -> None:
        self.done.append("start")
        await (await self.rig.host.start(VM)).wait()
        self._model.power = "running"

    async def _refused(self, attempt: Awaitable[object], *, maybe: bool) -> bool:
        """Make the attempt, which is refused at most *maybe*; nothing may have changed then."""
        try:
            await attempt
        except QsnapError as exc:
            if not maybe or not isinstance(exc, RequestError):
                raise
            self.done[-1] += " (refused)"
            return True
        return False

    def _new_name(self) -> str:
        self._names += 1
        return f"s{self._names}"

    def _any_name(self) -> str:
        return self._random.choice(sorted(self._model.snapshots))

    async def _qemu_io(self, target: str, command: str) -> None:
        line = f'qemu-io -d {QDEVS[target]} "{command}"'
        said = await self._vm.execute("human-monitor-command", command_line=line)
        assert not said, f"{line}: {said}"

    # --- what must be true ---------------------------------------------------------------

    async def check(self) -> None:
        """Hold everything against the model."""
        host, model = self.rig.host, self._model
        shown = {"running": "running", "paused": "paused", "off": "shut off"}
        with trio.fail_after(SETTLE_LIMIT_S):  # a daemon that has just started looks first
            while host.vm(VM).state != shown[model.power]:
                await trio.testing.wait_all_tasks_blocked(cushion=0.01)
        manifests = {m.name: m for m in host.snapshots(VM)}
        assert {n: m.parent for n, m in manifests.items()} == {
            n: taken.parent for n, taken in model.snapshots.items()
        }
        assert host.current(VM) == model.current
        assert model.power == "off" or not host.vm(VM).problem
        needed: set[Path] = set()
        for name, manifest in manifests.items():
            assert {d.target for d in manifest.disks} == set(QDEVS)
            for disk in manifest.disks:
                frozen = Path(disk.frozen)
                chain = chain_of(frozen)
                assert [str(p) for p in chain] == [f.path for f in disk.chain], f"chain of {name}"
                needed.update(chain)
                self._require_equal(frozen, model.snapshots[name].content[disk.target], name)
        for target, path in (await self._active()).items():
            needed.update(chain_of(path))
            self._require_equal(path, bytes(model.present[target]), "now")
        for given_up in model.given_up:
            top = next(path for path in given_up.chain if path.exists())
            given_up.chain = chain_of(top)
            needed.update(given_up.chain)
            self._require_equal(top, given_up.content, "given up")
        await trio.to_thread.run_sync(self._check_files, needed)
        if len(self.done) % CHECK_STORE_EVERY == 0:
            check = await host.fsck(VM, repair=False)
            assert check.clean, check.findings

    def _require_equal(self, image: Path, expected: bytes, what: str) -> None:
        found = read_disk(image)
        if found != expected:
            at = next(n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            wrong = f"{found[at]:#x} instead of {expected[at]:#x}"
            raise AssertionError(f"{what}: {image} has {wrong} at {at}")

    async def _active(self) -> dict[str, Path]:
        """The images that the VM writes to, complete on disk as far as QEMU has told them."""
        if self._model.power == "off":
            planned = self.rig.supervisors[VM].store.next_start.read()
            assert planned is not None
            assert isinstance(planned.plan, RevertPlan)
            return {overlay.target: Path(overlay.path) for overlay in planned.plan.overlays}
        if not self._model.stiff:
            for target in QDEVS:
                await self._qemu_io(target, "flush")
        disks = [disk for disk in await self.rig.host.disks(VM) if disk.left_out is None]
        return {disk.target: Path(disk.path) for disk in disks if disk.path}

    def _check_files(self, needed: set[Path]) -> None:
        for path, content in self._foreign.items():
            assert path.read_bytes() == content
        here = {p for p in self._vm.folder.iterdir() if ".after-" in p.name or "partial" in p.name}
        left_over = here - needed - set(self._foreign) - self._model.forgotten
        assert not left_over, f"nobody needs {sorted(p.name for p in left_over)}"
        assert {*self._in_store()} == set(self._model.snapshots)

    def _in_store(self) -> Iterator[str]:
        for path in self.rig.supervisors[VM].store.directory.iterdir():
            if path.name[0] != ".":
                yield path.name
            journals = (".journal.json", ".restoring.json", ".deleting.json", ".renaming.json")
            assert path.name not in journals, f"{path.name} was left behind"
            assert not path.name.endswith((".partial", ".removed")), f"{path.name} was left behind"
