"""Loading a snapshot's memory into a QEMU that never runs: would it restore?

That QEMU has everything the VM has, but nothing of the host: no sockets, no networks, and in
place of each disk a file without a name over the frozen image, which it opens for reading
only. Whatever happens, even to this process, neither it nor any file is left.
"""

import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic

import trio

from qsnapd.errors import StoreError, VmBusy, VmError
from qsnapd.model.job import Progress
from qsnapd.model.plan import Loading, OverlayPlan
from qsnapd.model.snapshot import Manifest, Process
from qsnapd.qmp.commands import QueryStatus, QueryVersion
from qsnapd.qmp.session import QmpSession
from qsnapd.snapshot.chains import blank_like
from qsnapd.snapshot.restoring.load import load_memory
from qsnapd.snapshot.restoring.revert_plan import read_manifest_line
from qsnapd.snapshot.taking.overlays import fill_overlay
from qsnapd.vm.argv import Option
from qsnapd.vm.disk_options import DiskOptions
from qsnapd.vm.isolate import isolate
from qsnapd.vm.launch import DELETED, CommandLine, Start
from qsnapd.vm.throwaway import open_throwaway

REHEARSAL_LIMIT_S = 3600.0
_INHERITED = "/proc/self/fd/"
"""A descriptor that QEMU has from us, to be opened anew: reading only at first, writing later."""


async def rehearse(manifest: Manifest, *, directory: Path, qemu_img: str) -> str:
    """Load the memory as a restore would, and say how that went.

    *directory*: whose file system has room for what QEMU may write, next to nothing.
    Raises: Blocked: it cannot be tried apart from the VM, and why. VmError: QEMU does not
      start or does not load it: it would not restore. StoreError.
    """
    assert manifest.memory is not None
    assert manifest.image_format is not None
    loading = Loading(memory_file=manifest.memory.path, image_format=manifest.image_format)
    process = manifest.machine.process
    with ExitStack() as held:
        disks = _Disks(manifest, directory, held, qemu_img)
        line = await disks.replaced()
        isolated = isolate(line.options, _folder(line.options, process, held))
        options = (
            *(option for option in isolated.options if option.name != "qmp"),
            *Start.LOAD.options,
        )
        began_s = monotonic()
        try:
            with trio.fail_after(REHEARSAL_LIMIT_S):
                async with open_throwaway(
                    process,
                    process.exe.removesuffix(DELETED),
                    options,
                    cwd=line.cwd,
                    pass_fds=disks.descriptors,
                    own_network=isolated.needs_own_network,
                ) as qemu:
                    await load_memory(_Waiting(qemu.session), loading, _Silent())
                    version = await qemu.session.execute(QueryVersion())
        except trio.TooSlowError:
            raise VmError(f"it was not loaded within {REHEARSAL_LIMIT_S:g} s") from None
    took_ms = (monotonic() - began_s) * 1000
    return f"QEMU {version.text} has started and loaded it in {took_ms:.0f} ms"


def _folder(options: Sequence[Option], process: Process, held: ExitStack) -> str:
    """A folder for the one socket that cannot be done without; else only a name."""
    if not any(option.name == "spice" for option in options):
        return f"/nowhere/{secrets.token_hex(4)}"
    folder = held.enter_context(tempfile.TemporaryDirectory(prefix="qsnapd-"))
    if os.geteuid() == 0:
        os.chown(folder, process.uid, process.gid)
    return folder


@contextmanager
def only_one(under_way: set[str], vm: str) -> Iterator[None]:
    """For the block, *vm* is in *under_way*: each takes as much memory as the VM.

    Raises: VmBusy: it is in there already.
    """
    if vm in under_way:
        raise VmBusy(
            f"a snapshot of VM {vm} is being loaded to verify it; one at a time: try again later, "
            "or verify without loading"
        )
    under_way.add(vm)
    try:
        yield
    finally:
        under_way.discard(vm)


class _Disks:
    """Files without names in place of all writable disks, handed over as descriptors."""

    def __init__(
        self, manifest: Manifest, directory: Path, held: ExitStack, qemu_img: str
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._held = held
        self._qemu_img = qemu_img
        self.descriptors: list[int] = []

    async def replaced(self) -> CommandLine:
        """The recorded command line on these files."""
        images = []
        for disk in self._manifest.disks:
            plan = OverlayPlan(
                target=disk.target,
                path=disk.frozen,
                partial=disk.frozen,
                backing=disk.frozen,
                backing_format=disk.frozen_format,
                virtual_size_bytes=disk.virtual_size_bytes,
            )
            file = self._new_file()
            await fill_overlay(plan, file, qemu_img=self._qemu_img)
            images.append(self._named(file))
        line = read_manifest_line(self._manifest, images)
        return line.changed(await self._without_others(line))

    async def _without_others(self, line: CommandLine) -> Sequence[Option]:
        """Disks that the snapshot leaves out may be in use: a blank one of the same size."""
        options = DiskOptions(line.options)
        for mention in list(options.mentions()):
            path = image_path(line.cwd, mention.filename)
            if path is not None:
                file = self._new_file()
                process = self._manifest.machine.process
                await blank_like(path, file, process, qemu_img=self._qemu_img)
                options.replace(mention, self._named(file))
        return options.options()

    def _new_file(self) -> int:
        try:
            file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115
        except OSError as exc:
            raise StoreError(f"cannot make a file in {self._directory}: {exc.strerror}") from exc
        self._held.enter_context(file)
        self.descriptors.append(file.fileno())
        return file.fileno()

    def _named(self, file: int) -> str:
        """QEMU's name of it; it is to open it anew, so it must be its user's."""
        if os.geteuid() == 0:
            process = self._manifest.machine.process
            try:
                os.fchown(file, process.uid, process.gid)
            except OSError as exc:
                raise StoreError(
                    f"cannot give a file in {self._directory} to user {process.uid}: {exc.strerror}"
                ) from exc
        return f"{_INHERITED}{file}"


def image_path(cwd: str, name: str) -> str | None:
    """The image that the command line means; None if it is one of ours, or there is none."""
    path = os.path.normpath(os.path.join(cwd, name))
    return None if path.startswith(_INHERITED) or not os.path.exists(path) else path


class _Waiting:
    def __init__(self, session: QmpSession) -> None:
        self.session = session

    async def run_state(self) -> str:
        return (await self.session.execute(QueryStatus())).status


class _Silent:
    def report(self, progress: Progress) -> None:
        """Nobody watches."""
