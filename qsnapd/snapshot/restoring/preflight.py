"""Would this snapshot restore, here and now? Asked in full before anything is touched.

Reads, and starts a QEMU of its own for a moment (`vm.probe`); the VM that may be running is
left alone.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from qsnapd.errors import ImageInvalid, SnapshotDiffers, StoreError, VmError
from qsnapd.model.snapshot import Manifest
from qsnapd.snapshot.chains import read_chain, wrong_with_chain
from qsnapd.snapshot.intact import check_snapshot, require_usable
from qsnapd.snapshot.restoring.differences import Difference, compare_cpu, compare_qemu, compare_ram
from qsnapd.snapshot.restoring.left_out import compare_left_out
from qsnapd.snapshot.restoring.reach import KVM, check_access
from qsnapd.threads import SLOW, in_thread
from qsnapd.vm.argv import parse_options
from qsnapd.vm.disks import Disk
from qsnapd.vm.launch import DELETED
from qsnapd.vm.probe import Probe, UnknownMachine, probe


@dataclass(frozen=True)
class Preflight:
    """A snapshot that may be restored."""

    differences: tuple[Difference, ...]
    """Those that are gone on in spite of, because that was forced."""
    notes: tuple[str, ...]
    probe: Probe | None
    """What its QEMU can do; None if that could not be asked, and it is forced."""

    @property
    def loads_lazily(self) -> bool:
        """Whether its QEMU pages in a mapped-ram image by itself."""
        return self.probe is not None and self.probe.loads_lazily


async def preflight(
    manifest: Manifest,
    *,
    qemu_img: str,
    force: bool,
    memory: bool = True,
    frees_bytes: int = 0,
    others: Iterable[Manifest] = (),
    present: Sequence[Disk] = (),
) -> Preflight:
    """Return if the snapshot may be restored.

    *memory*: whether its memory is to be loaded, if it has any. *frees_bytes*: memory of the
    host that the restore gives back first, by ending the VM's present QEMU.
    *others*: the VM's snapshots, *present*: the disks that it has right now; both matter
    where disks are left out.
    Raises:
      WrongState: it is being deleted.
      ImageInvalid: a file is missing, was replaced or is damaged.
      SnapshotDiffers: QEMU, machine, CPU, RAM, disks or access differ, and this is not
        *force*d or cannot be; lists everything that does.
      StoreError: something could not be looked at.
    """
    require_usable(manifest)
    loads = memory and manifest.memory is not None
    check = partial(check_snapshot, manifest, memory=loads)
    await trio.to_thread.run_sync(check, limiter=SLOW)
    found: list[Difference | str] = []
    options = parse_options(manifest.machine.process.argv[1:])
    if loads:
        found += compare_ram(manifest.machine, options)
        found += check_host_memory(manifest, free_memory_bytes() + frees_bytes)
    left_out = partial(compare_left_out, manifest, others, present, loads=loads)
    found += await in_thread(lambda: list(left_out()))
    blocking = await in_thread(check_access, manifest, options)
    found += blocking
    asked: list[Probe] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_check_chains, manifest, qemu_img, found)
        if not any(difference.what in ("QEMU", KVM) for difference in blocking):
            nursery.start_soon(partial(_check_qemu, manifest, found, asked, loads=loads))
    differences = tuple(d for d in found if isinstance(d, Difference))
    can_be_forced = all(difference.can_be_forced for difference in differences)
    if differences and not (force and can_be_forced):
        raise SnapshotDiffers(
            manifest.name, tuple(map(str, differences)), can_be_forced=can_be_forced
        )
    notes = tuple(note for note in found if isinstance(note, str))
    return Preflight(differences, notes, asked[0] if asked else None)


async def _check_qemu(
    manifest: Manifest, found: list[Difference | str], asked: list[Probe], *, loads: bool
) -> None:
    machine = manifest.machine
    executable = machine.process.exe.removesuffix(DELETED)
    try:
        answer = await probe(executable, machine)
    except UnknownMachine:
        found.append(Difference("machine", machine.type, "this QEMU has no such type", False))
    except VmError as exc:
        found.append(Difference("QEMU", "", f"{executable} does not start: {exc}", True))
    else:
        asked.append(answer)
        if loads:
            found += compare_qemu(manifest, answer)
            found += compare_cpu(machine, answer)


async def _check_chains(manifest: Manifest, qemu_img: str, found: list[Difference | str]) -> None:
    for disk in manifest.disks:
        try:
            links = await read_chain(disk, manifest.machine.process, qemu_img=qemu_img)
        except (ImageInvalid, StoreError) as exc:
            found.append(Difference("disks", "", str(exc), False))
        else:
            wrong = await trio.to_thread.run_sync(wrong_with_chain, disk, links)
            found += (Difference("disks", "", words, False) for words in wrong)


def check_host_memory(manifest: Manifest, free_bytes: int) -> Iterator[Difference | str]:
    """Whether the host has room for what will be loaded; RAM that is mapped needs none at once."""
    assert manifest.memory is not None
    needed_bytes = min(manifest.machine.ram_bytes, manifest.memory.allocated_bytes)
    if needed_bytes > free_bytes:
        words = f"loading takes {needed_bytes} bytes, the host has {free_bytes} bytes available"
        yield words if manifest.is_mappable else Difference("memory", "", words, True)


def free_memory_bytes() -> int:
    """What programs can still get, swap included (proc(5), meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, _, rest in (s.partition(":") for s in lines)}
    return (kilobytes["MemAvailable"] + kilobytes["SwapFree"]) * 1024
