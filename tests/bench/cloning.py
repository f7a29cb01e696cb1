"""How much memory clones of one checkpoint take, as there are more and more of them."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import trio

from tests.bench.notebook import Measurement, Notebook
from tests.bench.restoring import (
    MODES,
    SNAPSHOT,
    WORD_LIMIT_S,
    RestoreScale,
    call,
    name_of,
    open_filled,
)
from tests.harness import FileWatch, Vm
from tests.parts import Qemu

WORDS = 50
"""Signs of life after which a clone's guest has been at work for a while."""
MEASURES = {"Pss": "resident_mib", "Private_Dirty": "own_mib"}
"""Lines of smaps_rollup: what a process has of RAM, shared pages divided; what it has written."""


async def measure_clones(qemu: Qemu, scale: RestoreScale, notebook: Notebook) -> None:
    """Start clones one after the other, all eager and then all lazy, and note their memory.

    The VM itself is shut off. Half of its RAM is in use.
    """
    ram_mib = scale.clone_ram_mib
    async with open_filled(qemu, notebook, ram_mib=ram_mib, filled_mib=ram_mib // 2) as (
        vm,
        daemon,
    ):
        for mode in MODES:
            await vm.kill()
            pids: list[int] = []
            for number in range(1, scale.clones + 1):
                clone = f"{mode}{number}"
                qmp = f"{vm.qmp}.{clone}"  # `vm.kill` finds it by that
                request = {"name": SNAPSHOT, "clone": clone, "qmp": qmp, "memory": mode}
                await trio.to_thread.run_sync(call, daemon, "CloneSnapshot", request)
                pids.append(_pid_of(vm, qmp))
                await _hear(pids[-1])
                _note(qemu, notebook, name_of(mode, half=True), pids)
        await vm.kill()


def _note(qemu: Qemu, notebook: Notebook, subject: str, pids: Sequence[int]) -> None:
    values = {
        measure: sum(_read_mib(pid, line) for pid in pids) for line, measure in MEASURES.items()
    }
    notebook.measurements.extend(
        Measurement(qemu.version, subject, 0, measure, value, clones=len(pids))
        for measure, value in values.items()
    )
    notebook.tell(
        f"QEMU {qemu}: {subject}: {len(pids)} of the clones have "
        f"{values['resident_mib']:.0f} MiB, {values['own_mib']:.0f} of it their own"
    )


def _read_mib(pid: int, name: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(name)


def _pid_of(vm: Vm, qmp: str) -> int:
    [pid] = [pid for pid in vm.pids() if qmp.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


async def _hear(pid: int) -> None:
    """Wait until the guest of this QEMU has said something, many times."""
    [log] = {path for path in _open_files(pid) if "serial" in path.name}
    with trio.fail_after(WORD_LIMIT_S), FileWatch(log) as watch:
        while log.read_bytes().count(b"\n") < WORDS:
            await watch.changed()


def _open_files(pid: int) -> Iterator[Path]:
    for entry in os.scandir(f"/proc/{pid}/fd"):
        yield Path(os.readlink(entry.path))
