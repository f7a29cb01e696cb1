"""A VM started again with its RAM as a private mapping of a memory image, by plain QMP.

Of qsnapd only what is under test is used: the options and the view.
"""

import hashlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import trio

from qsnapd.image.mapped_ram import read_layout
from qsnapd.image.view import make_view
from qsnapd.model.snapshot import Machine
from qsnapd.vm.argv import parse_options, words_of
from qsnapd.vm.ram_options import map_ram
from tests.harness import Vm

START_LIMIT_S = 30.0
LOAD_LIMIT_S = 30.0


@dataclass(frozen=True)
class Mapped:
    """What it was like to start."""

    blocks: tuple[str, ...]
    view_ms: float
    load_ms: float
    view_allocated_bytes: int


async def start_mapped(vm: Vm, image: Path, machine: Machine) -> Mapped:
    """Start the VM, which is dead, on the disks it began with, and load *image*; it stands still.

    Preconditions: its disks are as they were at the instant of the image.
    """
    view = image.with_name("view")
    fd = os.open(image, os.O_RDONLY)
    try:
        began_s = time.perf_counter()
        layout = read_layout(fd)
        mapped = map_ram(parse_options(vm.argv[1:]), str(image), layout, machine)
        make_view(fd, layout, mapped.blocks, view)
        view_ms = (time.perf_counter() - began_s) * 1e3
    finally:
        os.close(fd)
    argv = [vm.argv[0], *words_of(mapped.options), "-incoming", "defer", "-S"]
    with trio.fail_after(START_LIMIT_S):
        await trio.run_process(argv, stdin=subprocess.DEVNULL)
    load_ms = await load(vm, view)
    allocated_bytes = view.stat().st_blocks * 512
    view.unlink()
    return Mapped(mapped.blocks, view_ms, load_ms, allocated_bytes)


async def load(vm: Vm, image: Path) -> float:
    """Load a mapped-ram *image* or a view of one; return how long that took, in ms."""
    async with vm.monitor() as monitor:
        capabilities = [{"capability": c, "state": True} for c in ("events", "mapped-ram")]
        await monitor.execute("migrate-set-capabilities", capabilities=capabilities)
        began_s = time.perf_counter()
        await monitor.execute("migrate-incoming", uri=f"file:{image}")
        status = ""
        with trio.fail_after(LOAD_LIMIT_S):
            while status != "completed":
                status = (await monitor.wait_event("MIGRATION"))["data"]["status"]
                assert status != "failed"
        return (time.perf_counter() - began_s) * 1e3


def resident_bytes(pid: int) -> int:
    """Return what of a process's memory is in RAM, page cache that it maps included."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
