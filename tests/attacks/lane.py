"""One VM under attack, with the daemons that come and go on it, and what must be true of both.

Its guest checks itself: it tells if its disks and its memory were ever of two instants.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from qsnapd.errors import QsnapError
from qsnapd.faults import Action
from qsnapd.model.findings import Severity
from qsnapd.model.snapshot import Strategy
from qsnapd.threads import FILE_LIMIT_S
from tests.attacks.forge import Forge, Forged
from tests.attacks.media import Medium
from tests.guests.slots import least_writes
from tests.harness import Agent, Slots, Vm, open_vm
from tests.parts import Qemu
from tests.real.cases import TWO_DISKS, VM
from tests.real.disk_content import chain_of, read_disk
from tests.real.footprint import Footprint, look
from tests.real.quiescing import open_agent_vm

GUEST = Slots(memory_mib=2, dirty_mib_s=8, disk_pause_us=1500, sign_ms=50, flushes=True)
STALL_LIMIT_S = 2.0
FREEZE_LIMIT_S = 5.0
SETTLE_LIMIT_S = 60.0
RUN_LIMIT_S = 20.0
LOOK_AGAIN_S = 0.02
JOURNALS = (".journal.json", ".restoring.json", ".deleting.json", ".renaming.json")
FOREIGN = b"not qsnapd's\n"


class Lane:
    """While `open_lane` holds it."""

    def __init__(
        self, forge: Forge, vm: Vm, folder: Path, qemu: Qemu, settings: str, medium: Medium | None
    ) -> None:
        self._forge = forge
        self.vm = vm
        self.qemu = qemu
        self.folder = folder
        self.medium = medium
        """Its store is there, if it has one of its own."""
        self.overlays: Medium | None = None
        """Overlays may lie there, if there is one."""
        self.state_dir = (medium.path if medium is not None else folder) / "state"
        self.log = folder / "log"
        self.config, self._impatient = folder / "qsnapd.toml", folder / "impatient.toml"
        config = (
            f'[daemon]\nsocket = "{folder}/io.qsnapd"\nstate_dir = "{self.state_dir}"\n'
            f'runtime_dir = "{folder}"\nqemu_img = "{qemu.img}"\n%s\n{settings}\n'
            f'[vm.{VM}]\nqmp = "{vm.qmp}"\n'
        )
        if isinstance(vm.guest, Agent):
            config += f'agent = "{vm.agent}"\nfreeze_limit_s = {FREEZE_LIMIT_S}\n'
        self.config.write_text(config % "")
        self._impatient.write_text(config % f"stall_limit_s = {STALL_LIMIT_S}")
        self._said = 0
        self._names = 0
        store = self.state_dir / VM
        store.mkdir(mode=0o700, parents=True)
        self.foreign = (
            vm.folder / "disk0.after-mine.qcow2",
            vm.folder / "disk0.qcow2.partial",
            store / ".mine.partial",
            store / "notes.txt",
        )
        for path in self.foreign:
            path.write_bytes(FOREIGN)

    def new_name(self, what: str) -> str:
        self._names += 1
        return f"{what}{self._names}"

    @asynccontextmanager
    async def daemon(
        self,
        faults: str = "",
        *,
        reply_limit_s: float | None = None,
        garbling: Mapping[str, object] | None = None,
    ) -> AsyncIterator[Forged]:
        """Run a daemon that has *faults* planted; one that is to hang is soon fed up with that.

        *reply_limit_s*, *garbling*: see `Forge.daemon`.
        """
        environment = {"QSNAPD_FAULT": faults}
        hangs = Action.HANG in faults
        async with self._forge.daemon(
            self._impatient if hangs else self.config,
            self.folder / "io.qsnapd",
            self.log,
            environment,
            file_limit_s=STALL_LIMIT_S if hangs else FILE_LIMIT_S,
            reply_limit_s=reply_limit_s,
            garbling=garbling,
        ) as daemon:
            yield daemon

    def struck(self) -> list[str]:
        """What the daemons have said of planted faults since the last call."""
        new = self._unread()
        self._said += len(new)
        return _strikes(new)

    def has_struck(self, how_often: int) -> bool:
        """Whether they have said so *how_often* since `struck`, or more often."""
        return len(_strikes(self._unread())) >= how_often

    def _unread(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()[self._said :]

    async def settled(self, daemon: Forged, *, state: str = "running") -> None:
        """Wait until the daemon is done with what it found, and the VM is in that state.

        Raises: AssertionError: it does not come to that; says how it is instead.
        """
        how: object = None
        with trio.move_on_after(SETTLE_LIMIT_S):
            while True:
                vm = (await daemon.call("GetVm", vm=VM))["vm"]
                job = (await daemon.call("GetJob", vm=VM))["job"]
                left = self.journals()
                how = (vm["state"], vm["reason"], vm["problem"], job and job["phase"], left)
                if vm["state"] == state and not (vm["problem"] or job or left):
                    return
                await trio.sleep(LOOK_AGAIN_S)  # many things, of which no single event tells
        raise AssertionError(f"not settled: {how}")

    def journals(self) -> list[str]:
        return [name for name in JOURNALS if (self.state_dir / VM / name).exists()]

    async def listed(self, daemon: Forged) -> list[str]:
        snapshots = (await daemon.call("ListSnapshots", vm=VM))["snapshots"]
        return [snapshot["name"] for snapshot in snapshots]

    async def create(self, daemon: Forged, name: str, **request: object) -> dict[str, Any]:
        words = {"name": name, "hash_memory": False, **request}
        return await daemon.call("CreateSnapshot", vm=VM, request=words)

    async def revert(self, daemon: Forged, name: str, **request: object) -> dict[str, Any]:
        words = {"name": name, "discard": True, "memory": "eager", **request}
        return await daemon.call("RevertSnapshot", vm=VM, request=words)

    async def restores(self, daemon: Forged, name: str) -> None:
        """Revert to *name*, and wait until its guest has looked at all it has."""
        mark = len(self.vm.log_lines())
        await self.revert(daemon, name)
        await self.guest_is_well(since=mark)

    async def guest_is_well(self, *, since: int) -> None:
        """Wait until the guest has looked at all its disks and memory from line *since* on."""
        await self.vm.wait_checked(since=since)
        self.no_complaints()

    async def guest_runs(self) -> None:
        """Wait until the guest has shown twice that it lives."""
        with trio.fail_after(RUN_LIMIT_S):
            for _ in range(2):
                since = len(self.vm.log_lines())
                await self.vm.wait_line(lambda line: line.startswith("OK"), since=since)

    def no_complaints(self) -> None:
        """The guest has never seen its disks and memory of two instants, nor lost a disk."""
        bad = self.vm.slots_report().bad_lines
        assert not bad, bad

    async def tidy(self, daemon: Forged) -> None:
        """Nothing is left over, nothing foreign was touched, and store, files and QEMU agree."""
        for path in self.foreign:
            assert path.read_bytes() == FOREIGN, f"{path} was changed"
        partial = [
            path
            for folder in (self.vm.folder, self.state_dir)
            for path in folder.rglob("*.partial")
            if path not in self.foreign
        ]
        assert not partial, f"left over: {partial}"
        check = (await daemon.call("CheckStore", vm=VM))["check"]
        wrong = [f for f in check["findings"] if f["severity"] != Severity.NOTE]
        findings = [f for f in wrong if not _is_about(f, self.foreign)]
        assert not findings, findings

    async def goes_on(self, daemon: Forged, strategy: Strategy) -> None:
        """The next checkpoint succeeds, and restores; and all is in order."""
        name = self.new_name("n")
        await self.create(daemon, name, strategy=strategy)
        await self.restores(daemon, name)
        await self.tidy(daemon)

    async def delete_all(self, daemon: Forged) -> None:
        """Delete every snapshot, the oldest first."""
        for name in await self.listed(daemon):
            await daemon.call("DeleteSnapshot", vm=VM, request={"name": name})

    async def start_if_off(self, daemon: Forged) -> None:
        """Once the daemon is done with a QEMU that has ended: start another, as its user would.

        Nothing may be lost that the guest had on its disks.
        """
        if await self.ended(daemon) == "running":
            return  # a revert has gone on
        images = await trio.to_thread.run_sync(self.newest_images)
        rounds = self.vm.slots_report().ok_lines[-1].rounds
        for image in images:
            least = await trio.to_thread.run_sync(_least_writes, image)
            assert least >= rounds, f"{image}: {least} rounds are there of {rounds}"
        mark = len(self.vm.log_lines())
        await self.start(images)
        await self.settled(daemon)
        await self.vm.wait_line(lambda line: line.startswith("OK"), since=mark)

    async def ended(self, daemon: Forged) -> str:
        """Wait until the daemon is done with a QEMU that has ended; returns the VM's state."""
        with trio.fail_after(SETTLE_LIMIT_S):
            while True:
                vm = (await daemon.call("GetVm", vm=VM))["vm"]
                job = (await daemon.call("GetJob", vm=VM))["job"]
                if not job and not self.journals() and vm["connected"] is bool(self.vm.pids()):
                    return str(vm["state"])
                await trio.sleep(LOOK_AGAIN_S)

    async def start(self, images: Sequence[Path]) -> None:
        """Start the VM's QEMU, with its own command line but these images; it listens."""
        await trio.run_process(_on(self.vm.argv, self.vm.disks, images))

    def newest_images(self) -> list[Path]:
        """What nothing lies over, of each disk; of several the one that was written to last."""
        images = [p for p in self.vm.folder.glob("disk[01].*") if p not in self.foreign]
        covered = {below for image in images for below in chain_of(image)[1:]}
        newest = []
        for disk in self.vm.disks:
            own = [p for p in images if p.name.startswith(f"{disk.stem}.") and p not in covered]
            newest.append(max(own, key=lambda path: path.stat().st_mtime_ns))
        return newest

    async def look(self) -> Footprint:
        assert len(self.vm.pids()) == 1, f"{len(self.vm.pids())} QEMUs run"
        return await look(self.vm, self.state_dir)


def _strikes(lines: list[str]) -> list[str]:
    return [line for line in lines if "a planted fault strikes" in line]


def _is_about(finding: dict[str, Any], paths: tuple[Path, ...]) -> bool:
    return any(path.name in str(finding) for path in paths)


def require_as_before(before: Footprint, now: Footprint, error: QsnapError | None) -> None:
    """Nothing of a job is left that has failed with *error*."""
    assert now == before, f"left over: {difference(before, now)}; {error}"


def difference(before: Footprint, now: Footprint) -> str:
    """What is not as before, in words."""
    found = []
    for name in Footprint.__dataclass_fields__:
        was, is_now = getattr(before, name), getattr(now, name)
        if isinstance(was, frozenset):
            is_now, was = is_now - was, was - is_now
        if was != is_now:
            found.append(f"{name}: was {was}, is {is_now}")
    return "; ".join(found)


def _least_writes(image: Path) -> int:
    return least_writes(read_disk(image))


def _on(argv: Sequence[str], disks: Sequence[Path], images: Sequence[Path]) -> list[str]:
    """The command line, with other images of its disks."""
    words = list(argv)
    for disk, image in zip(disks, images, strict=True):
        changed = [word.replace(str(disk), str(image)) for word in words]
        if image != disk:
            pairs = zip(words, changed, strict=True)
            changed = [_as_qcow2(now) if was != now else now for was, now in pairs]
        words = changed
    return words


def _as_qcow2(word: str) -> str:
    return word.replace("format=raw", "format=qcow2").replace("driver=raw", "driver=qcow2")


async def outcome(attempt: Callable[[], Any]) -> QsnapError | None:
    """Make the attempt; return what it failed with, if it did."""
    try:
        await attempt()
    except QsnapError as exc:
        return exc
    return None


@asynccontextmanager
async def open_lane(
    forge: Forge,
    qemu: Qemu,
    folder: Path,
    *,
    settings: str = "",
    medium: Medium | None = None,
    guest: Slots = GUEST,
    extra: Sequence[str] = (),
) -> AsyncIterator[Lane]:
    """Have a VM under attack for the block; its guest is at work, and checks itself."""
    await trio.Path(folder).mkdir(parents=True, exist_ok=True)
    async with open_vm(qemu, guest, disks=TWO_DISKS, memory_mib=96, extra=extra) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        yield Lane(forge, vm, folder, qemu, settings, medium)


@asynccontextmanager
async def open_agent_lane(forge: Forge, qemu: Qemu, folder: Path) -> AsyncIterator[Lane]:
    """The same, with a guest that has an agent, and a file system to be frozen."""
    await trio.Path(folder).mkdir(parents=True)
    async with open_agent_vm(qemu) as vm:
        yield Lane(forge, vm, folder, qemu, "", None)
