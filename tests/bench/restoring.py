"""How long a restore takes, from the request until the guest says something, by size of RAM.

The VM is shut off when it is asked for, so that whatever the guest says is said by the restored
one. Eager and lazy are taken in turns, and QEMU's own start with each.
"""

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from qsnapd.control.client import Client
from tests.bench.notebook import Measurement, Notebook
from tests.bench.own_start import read_load_ms, time_own_start
from tests.harness import Disk, Slots, Vm, open_vm
from tests.parts import Qemu
from tests.system.processes import Daemon, open_daemon

NAME = "bench"
SNAPSHOT = "s"
DISKS = (Disk("qcow2"), Disk("raw"))
MODES = ("eager", "lazy")
LITTLE_MIB = 64
SIGN_MS = 5
WORD_LIMIT_S = 120.0
DETACH_LIMIT_S = 20.0


@dataclass(frozen=True)
class RestoreScale:
    """How much is measured."""

    rounds: int
    ram_mib: tuple[int, ...]
    clones: int
    clone_ram_mib: int


def name_of(mode: str, *, half: bool) -> str:
    """Call a subject by how its memory gets into QEMU, and how much of its RAM is in use."""
    return f"{mode}, half in use" if half else f"{mode}, nearly empty"


@asynccontextmanager
async def open_filled(
    qemu: Qemu, notebook: Notebook, *, ram_mib: int, filled_mib: int
) -> AsyncIterator[tuple[Vm, Daemon]]:
    """Hold a VM and a daemon, with one snapshot of a guest that has filled some of its RAM.

    The guest hardly does anything but say, every few milliseconds, that it lives.
    """
    guest = Slots(memory_mib=filled_mib, disk_pause_us=20_000, sign_ms=SIGN_MS)
    async with open_vm(qemu, guest, disks=DISKS, memory_mib=ram_mib, log_monitor=True) as vm:
        folder = vm.folder / "state"
        folder.mkdir()
        async with open_daemon(folder, {NAME: vm}, qemu.img, log=notebook.log) as daemon:
            await daemon.wait_attached(NAME)
            await vm.wait_line(lambda line: line.startswith("OK"), limit_s=WORD_LIMIT_S)
            request = {"name": SNAPSHOT, "strategy": "stopped"}
            await trio.to_thread.run_sync(call, daemon, "CreateSnapshot", request)
            yield vm, daemon


async def measure_restores(qemu: Qemu, scale: RestoreScale, notebook: Notebook) -> None:
    """Restore VMs of all sizes, and note every number.

    Half of RAM is in use; in the smallest and the largest VM once more very little is.
    """
    ends = (min(scale.ram_mib), max(scale.ram_mib))
    cases = [(mib, True) for mib in scale.ram_mib] + [(mib, False) for mib in ends]
    for ram_mib, half in cases:
        filled_mib = ram_mib // 2 if half else LITTLE_MIB
        async with open_filled(qemu, notebook, ram_mib=ram_mib, filled_mib=filled_mib) as (
            vm,
            daemon,
        ):
            for number in range(scale.rounds):
                for mode in MODES[:: -1 if number % 2 else 1]:
                    values = await _restore(vm, daemon, mode)
                    subject = name_of(mode, half=half)
                    notebook.measurements.extend(
                        Measurement(qemu.version, subject, number, measure, value, ram_mib)
                        for measure, value in values.items()
                    )
                    notebook.tell(
                        f"QEMU {qemu}, {ram_mib} MiB, round {number + 1} of {scale.rounds}: "
                        f"{subject}: first word after {values['word_ms']:.0f} ms, of which "
                        f"load {values['load_ms']:.1f} and QEMU's start {values['start_ms']:.0f}"
                    )


async def _restore(vm: Vm, daemon: Daemon, mode: str) -> dict[str, float]:
    """Restore the VM in one way, and return what that took; QEMU's own start is tried after."""
    await vm.kill()
    await trio.to_thread.run_sync(_wait_detached, daemon)
    os.truncate(vm.serial_log, 0)
    request = {"name": SNAPSHOT, "state": "running", "memory": mode, "discard": True}
    begun_s = time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, call, daemon, "RevertSnapshot", request)
        await vm.wait_line(lambda _: True, limit_s=WORD_LIMIT_S)
        word_ms = (time.monotonic() - begun_s) * 1000
    argv = (await trio.Path(f"/proc/{vm.pid}/cmdline").read_text()).split("\0")[:-1]
    load_ms = read_load_ms(vm.monitor_log)
    await vm.kill()
    start_ms = await trio.to_thread.run_sync(time_own_start, argv, vm.folder)
    return {"word_ms": word_ms, "load_ms": load_ms, "start_ms": start_ms}


def call(daemon: Daemon, method: str, request: Mapping[str, object]) -> None:
    """Have the daemon do something with the VM. Blocks."""
    with Client(daemon.control) as client:
        for _ in client.stream(method, vm=NAME, request=request):
            pass


def _wait_detached(daemon: Daemon) -> None:
    """Wait until the daemon has noticed that no QEMU is there. Blocks."""
    limit_s = time.monotonic() + DETACH_LIMIT_S
    with Client(daemon.control) as client:
        while client.call("GetVm", vm=NAME)["vm"]["connected"]:
            if time.monotonic() > limit_s:
                raise TimeoutError("qsnapd holds on to a QEMU that has ended")
