"""Fifty VMs under one daemon: it keeps to its limits, and one that hangs delays no other."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import monotonic

import pytest
import trio

from qsnapd.errors import QsnapError
from tests.harness import Guest, Idle, Pages, Vm
from tests.real.cases import NEWEST
from tests.soak.calling import Call, caller
from tests.soak.crowd import Answers, Phases, open_crowd
from tests.soak.samples import Process
from tests.system.processes import Daemon, open_daemon
from tests.tallies import Record, count

WATCHED = 50
SAVED = tuple(f"vm{number}" for number in range(10))
HUNG, KILLED = "vm10", "vm11"
BUSY = SAVED[0]
"""Its guest writes to its memory, and shows after a revert that it is as it was."""
SAVES_AT_ONCE = 3
BANDWIDTH_BYTES_PER_S = 12 << 20
STALL_LIMIT_S = 3.0
NOISE_MIB = 12

ATTACH_LIMIT_S = 60.0
CASE_LIMIT_S = 120.0
ANSWER_WITHIN_S = 2.0
"""However many there are, and whatever they do."""
ANSWERS_ARE_LATER_BY_S = 0.25
"""Of the median, when one hangs."""
SAVES_ARE_LATER_BY_S = 2 * STALL_LIMIT_S + 5.0
"""A QEMU that hangs has one of the places until its save is given up, and undone."""
DESCRIPTORS_PER_VM = 10
RESIDENT_MIB_PER_VM = 2.0


@pytest.mark.alone
async def test_fifty(tmp_path: Path, record_property: Record) -> None:
    guests: dict[str, Guest] = {
        **{f"vm{number}": Idle(is_held=True) for number in range(WATCHED)},
        **dict.fromkeys((*SAVED, HUNG, KILLED), Idle(NOISE_MIB)),
    }
    guests[BUSY] = Pages(spin=20000)
    limits = (
        f"saves_at_once = {SAVES_AT_ONCE}",
        f"bandwidth_bytes_per_s = {BANDWIDTH_BYTES_PER_S}",
        f"stall_limit_s = {STALL_LIMIT_S}",
        'log_level = "error"',
    )
    async with open_crowd(NEWEST, guests) as vms:
        async with open_daemon(tmp_path, {}, NEWEST.img, settings=limits) as daemon:
            alone = Process.of(daemon.process.pid)
        async with open_daemon(tmp_path, vms, NEWEST.img, settings=limits) as daemon:
            call = caller(daemon.control)
            attached_s = await all_attached(call)
            watching = Process.of(daemon.process.pid)
            undisturbed = await Round("a", daemon, call).run()
            disturbed = await Round("b", daemon, call, vms).run()
            await hung_one_recovers(call)
            assert (await call("GetVm", vm=KILLED))["vm"]["state"] == "shut off"
            await restores(call, vms[BUSY])
            afterwards = Process.of(daemon.process.pid)
    per_vm_kib = (watching.resident_kib - alone.resident_kib) / WATCHED
    row = f"{WATCHED} VMs, {len(SAVED)} saved, {SAVES_AT_ONCE} at once"
    count(
        record_property,
        "many VMs: the daemon",
        row,
        {
            "MiB": watching.resident_kib / 1024,
            "KiB per VM": per_vm_kib,
            "descriptors": watching.descriptors,
            "threads": afterwards.threads,
            "all attached s": attached_s,
        },
    )
    for case, it in (("none hangs", undisturbed), ("one hangs, one is killed", disturbed)):
        numbers = {
            "saves s": it.took_s,
            "MiB/s": it.saved_bytes / it.took_s / (1 << 20),
            "answers": len(it.answers.after_s),
            "median ms": median(it.answers.after_s) * 1000,
            "longest ms": max(it.answers.after_s) * 1000,
        }
        count(record_property, "many VMs: ten saves", case, numbers)
    for it in (undisturbed, disturbed):
        assert it.phases.most_saving == SAVES_AT_ONCE
        assert it.saved_bytes / it.took_s <= BANDWIDTH_BYTES_PER_S
        assert max(it.answers.after_s) <= ANSWER_WITHIN_S
    later_s = median(disturbed.answers.after_s) - median(undisturbed.answers.after_s)
    assert later_s <= ANSWERS_ARE_LATER_BY_S
    assert disturbed.took_s <= undisturbed.took_s + SAVES_ARE_LATER_BY_S
    assert per_vm_kib <= RESIDENT_MIB_PER_VM * 1024
    assert watching.descriptors - alone.descriptors <= DESCRIPTORS_PER_VM * WATCHED
    assert afterwards.descriptors <= watching.descriptors + len(SAVED)


class Round:
    """Ten checkpoints at once; with *vms*, two other VMs are in trouble meanwhile."""

    def __init__(
        self, name: str, daemon: Daemon, call: Call, vms: dict[str, Vm] | None = None
    ) -> None:
        self._name = name
        self._daemon = daemon
        self._call = call
        self._vms = vms
        self.phases = Phases()
        self.answers = Answers()
        self.took_s = 0.0
        self.saved_bytes = 0

    async def run(self) -> "Round":
        with trio.fail_after(CASE_LIMIT_S):
            async with trio.open_nursery() as watching:
                watching.start_soon(self.phases.follow, self._daemon.control)
                await self.phases.follows.wait()
                async with trio.open_nursery() as troubled:
                    if self._vms is not None:
                        await self._make_trouble(troubled, self._vms)
                    watching.start_soon(self.answers.ask, self._call, SAVED[-1])
                    begin_s = monotonic()
                    async with trio.open_nursery() as saving:
                        for name in SAVED:
                            saving.start_soon(self._save, name)
                    self.took_s = monotonic() - begin_s
                watching.cancel_scope.cancel()
        return self

    async def _save(self, vm: str) -> None:
        request = {"name": self._name, "strategy": "precopy", "hash_memory": False}
        reply = await self._call("CreateSnapshot", vm=vm, request=request)
        self.saved_bytes += reply["snapshot"]["memory"]["allocated_bytes"]

    async def _make_trouble(self, nursery: trio.Nursery, vms: dict[str, Vm]) -> None:
        """Both in the middle of their saves."""
        for vm, number in ((HUNG, signal.SIGSTOP), (KILLED, signal.SIGKILL)):
            nursery.start_soon(self._fail_to_save, vm)
            await self.phases.until(vm, "saving")
            os.kill(vms[vm].pid, number)

    async def _fail_to_save(self, vm: str) -> None:
        with pytest.raises(QsnapError):
            await self._save(vm)
        if vm == HUNG:
            assert self._vms is not None
            os.kill(self._vms[HUNG].pid, signal.SIGCONT)


async def all_attached(call: Call) -> float:
    """Wait until the daemon has found all VMs; returns how long that took after it was ready."""
    begin_s = monotonic()
    with trio.fail_after(ATTACH_LIMIT_S):
        while not all(vm["connected"] for vm in (await call("ListVms"))["vms"]):
            pass  # each question takes a moment
    return monotonic() - begin_s


async def hung_one_recovers(call: Call) -> None:
    """It runs, nothing is left to be done, and the next checkpoint of it succeeds."""
    with trio.fail_after(ATTACH_LIMIT_S):
        while not await is_well(call, HUNG):
            pass
    await call("CreateSnapshot", vm=HUNG, request={"name": "afterwards", "live": True})


async def is_well(call: Call, name: str) -> bool:
    vm = (await call("GetVm", vm=name))["vm"]
    return vm["connected"] and vm["state"] == "running" and not (await busy(call, [name]))


async def busy(call: Call, names: Sequence[str]) -> list[str]:
    return [name for name in names if (await call("GetJob", vm=name))["job"]]


async def restores(call: Call, vm: Vm) -> None:
    mark = len(vm.log_lines())
    request = {"name": "b", "memory": "eager", "discard": True}
    await call("RevertSnapshot", vm=BUSY, request=request)
    await vm.wait_line(lambda line: "PASS" in line, since=mark)
    assert vm.pages_report(mark).fine
