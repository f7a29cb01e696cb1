"""The next boot after a power failure, and what must be true then."""

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import trio
import trio.testing

from qsnapd.daemon.supervisor import Supervisor
from qsnapd.model.findings import Severity
from qsnapd.model.snapshot import Manifest
from qsnapd.store.snapshots import VmStore
from tests.crashes.content import BLOCK_BYTES
from tests.crashes.promises import Outcome, Promise
from tests.crashes.scene import NoQemu, Scene, key_of
from tests.real.cases import VM
from tests.real.disk_content import chain_of, read_disk
from tests.rig import Rig, open_rig

MEND_LIMIT_S = 2.0
UNFINISHED = (".journal.json", ".restoring.json", ".deleting.json", ".renaming.json")
RECORDS = frozenset(
    {".lock", ".current", ".made.json", ".leases.json", ".state.json", ".next-start.json"}
    | {".vm.json", ".last-seen.json", ".qemu.log"}
)
"""What may lie in the store beside snapshots once nothing is unfinished; and drafts of that."""

Tree = dict[str, tuple[int, int, int]]


@dataclass
class Judge:
    """Judges the states of one recording."""

    scene: Scene
    looks: int = 0
    """How often qemu-img was asked: once for each image that differs from all before."""
    _sound: set[bytes] = field(default_factory=set)

    async def boot(self, promise: Promise) -> list[str]:
        """Start qsnapd twice, and return all that is wrong then."""
        wrong = await self._boot(promise)
        if not wrong:
            before = self._tree()
            wrong = [f"after another start: {words}" for words in await self._boot(promise)]
            if not wrong and (after := self._tree()) != before:
                changed = sorted(k for k in before.keys() | after.keys() if
                                 before.get(k) != after.get(k))
                wrong = [f"another start changes {', '.join(changed)}"]
        return wrong

    async def _boot(self, promise: Promise) -> list[str]:
        scene = self.scene
        rig_of_vm = open_rig(scene.qemu, scene.state_dir, **{VM: scene.vm})
        async with AsyncExitStack() as host:
            host.enter_context(mock.patch("tests.rig.Spawn", NoQemu))
            rig = await host.enter_async_context(rig_of_vm)
            for supervisor in list(rig.supervisors.values()):
                if words := await mended(supervisor):
                    return [words]
            supervisor = rig.supervisors[VM]
            wrong = [
                finding.what
                for finding in (await rig.host.fsck(VM, repair=False)).findings
                if finding.severity is not Severity.NOTE
            ]
            return [*wrong, *await trio.to_thread.run_sync(
                lambda: list(self._judge(rig, supervisor.store, promise))
            )]

    def _judge(self, rig: Rig, store: VmStore, promise: Promise) -> Iterator[str]:
        found, outcome = store.snapshots(), self.scene.outcome(store)
        yield from map(str, store.problems().values())
        if outcome not in promise.outcomes:
            yield f"there is {outcome}, not {' or '.join(map(str, promise.outcomes))}"
            return
        for name, manifest in found.items():
            yield from self._judge_snapshot(name, manifest)
        yield from self._judge_guest(outcome, promise)
        yield from self._judge_files(found, outcome)

    def _judge_snapshot(self, name: str, manifest: Manifest) -> Iterator[str]:
        if manifest.memory is not None:
            path = Path(manifest.memory.path)
            if not path.exists():
                yield f"snapshot {name}: {path} is missing"
            elif key_of(path) != self.scene.saved[name]:
                yield f"snapshot {name}: {path} is not what was saved"
        for disk, shown in zip(manifest.disks, self.scene.shown[name], strict=True):
            chain = [Path(file.path) for file in disk.chain]
            try:
                if chain_of(chain[0]) != chain:
                    yield f"snapshot {name}: {chain[0]} lies over {chain_of(chain[0])[1:]}"
                elif read_disk(chain[0]) != shown:
                    yield f"snapshot {name}: disk {disk.target} shows something else"
                else:
                    yield from self._ask_qemu_img(chain)
            except FileNotFoundError as exc:
                yield f"snapshot {name}: {exc.filename} is missing"

    def _judge_guest(self, outcome: Outcome, promise: Promise) -> Iterator[str]:
        heads, shows = self.scene.head_of(outcome), self.scene.shows.get(outcome)
        may = (shows, shows) if shows is not None else (promise.guest, promise.unsure)
        for head, sure, unsure in zip(heads, *may, strict=True):
            try:
                shown = read_disk(head)
                yield from self._ask_qemu_img(chain_of(head))
            except FileNotFoundError as exc:
                yield f"{exc.filename}, which the VM's disk needs, is missing"
                continue
            for start in range(0, len(sure), BLOCK_BYTES):
                block = shown[start : start + BLOCK_BYTES]
                if block not in (sure[start:][:BLOCK_BYTES], unsure[start:][:BLOCK_BYTES]):
                    yield (
                        f"{head} has lost what the guest had flushed: at {start} is "
                        f"{block[:1].hex()}, not {sure[start : start + 1].hex()}"
                    )
                    break

    def _ask_qemu_img(self, chain: list[Path]) -> Iterator[str]:
        """Whether QEMU can read it, too; what was read before is not read again."""
        digest = hashlib.sha256()
        for path in chain:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        if digest.digest() in self._sound:
            return
        self._sound.add(digest.digest())
        self.looks += 1
        image = chain[0]
        if image.suffix != ".raw":
            check = [str(self.scene.qemu.img), "check", "-q", "-f", "qcow2", str(image)]
            done = subprocess.run(check, capture_output=True, check=False, text=True)
            if done.returncode not in (0, 3):  # 3: it is larger than it needs to be
                yield f"{image} is damaged: {done.stdout} {done.stderr}"

    def _judge_files(self, found: dict[str, Manifest], outcome: Outcome) -> Iterator[str]:
        scene = self.scene
        needed = {Path(file.path) for m in found.values() for d in m.disks for file in d.chain}
        needed |= {Path(m.memory.path) for m in found.values() if m.memory is not None}
        needed |= {*scene.vm.disks, *scene.head_of(outcome), *scene.foreign}
        for mark in outcome.marks:
            needed |= {scene.marks[mark], *scene.needs.get(mark, ())}
        yield from (f"{path} is missing" for path in needed if not path.exists())
        for mark in outcome.marks:
            needed |= set(scene.goes_with.get(mark, ()))
        needed |= {scene.state_dir / VM / name / "snapshot.json" for name in found}
        assert scene.recorder is not None
        for path in self._files():
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            if path in scene.foreign:
                if path.read_bytes() != scene.foreign[path] or mode != 0o640:
                    yield f"{path}, which is somebody else's, was changed"
            elif scene.tolerates(path):
                continue
            elif path in needed or _is_record(path, scene.state_dir):
                if path not in scene.vm.disks and mode != 0o600:
                    yield f"{path} has mode {mode:o}"
            else:
                yield f"{path} was left behind"
        for path in scene.foreign:
            if not path.exists():
                yield f"{path}, which is somebody else's, is gone"
        for folder in (p for p in scene.folder.rglob("*") if p.is_dir()):
            known = (scene.state_dir, scene.state_dir / VM)
            if scene.tolerates(folder):
                continue
            if folder not in known and folder not in {p.parent for p in needed}:
                yield f"the folder {folder} was left behind"
            elif stat.S_IMODE(folder.stat().st_mode) != 0o700:
                yield f"the folder {folder} has mode {stat.S_IMODE(folder.stat().st_mode):o}"

    def _files(self) -> Iterator[Path]:
        scene = self.scene
        assert scene.recorder is not None
        for root in scene.recorder.roots:
            for folder, _, names in os.walk(root):
                for path in (Path(folder, name) for name in names):
                    if path not in scene.recorder.but:
                        yield path

    def _tree(self) -> Tree:
        found: Tree = {}
        for path in self._files():
            if path.name not in (".lock", ".state.json"):
                status = path.lstat()
                found[str(path)] = status.st_ino, status.st_size, status.st_mtime_ns
        return found


def _is_record(path: Path, state_dir: Path) -> bool:
    """Whether it is one of a VM that there is, or the draft of one, which is in nobody's way."""
    place = path.parent
    is_of_vm = place in (state_dir, state_dir / VM) or (place / ".vm.json").exists()
    is_own = (is_of_vm and path.name in RECORDS) or path.suffix == ".new"
    return is_own and path.is_relative_to(state_dir)


async def mended(supervisor: Supervisor) -> str | None:
    """Wait until nothing is left to be mended; return what is in the way, if it stays."""
    try:
        with trio.fail_after(MEND_LIMIT_S):
            await supervisor.wait_settled()
            while not await _is_mended(supervisor):
                await trio.testing.wait_all_tasks_blocked()
    except trio.TooSlowError:
        return f"it is not mended: {supervisor.problem}"
    return None


async def _is_mended(supervisor: Supervisor) -> bool:
    mender, folder = supervisor.mender, supervisor.store.directory
    async with mender._mending:  # not in the middle of it
        await trio.testing.wait_all_tasks_blocked()
        channels = [each.statistics() for each in (mender._deletions, mender._reverts)]
        is_at_rest = all(c.tasks_waiting_receive and not c.current_buffer_used for c in channels)
        stands = await trio.to_thread.run_sync(_any_of, folder, UNFINISHED)
        return is_at_rest and supervisor.job is None and not stands


def _any_of(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)
