"""A day of a checkpoint every minute, and retention after each: nothing grows.

The minutes are short. What must be the same every time is the same; what the kernel and the
allocators have a part in stays within bounds. All is told at the end of the run, in a table.
"""

from pathlib import Path

from qsnapd.model.snapshot import Strategy
from tests.harness import Disk, Slots, Vm, open_vm
from tests.long import LONG
from tests.real.cases import NEWEST, VM
from tests.soak.calling import Call, caller
from tests.soak.samples import Sample, growth, take_sample
from tests.system.processes import open_daemon
from tests.tallies import Number, Record, count

MINUTES = 1440 if LONG else 32
WARM_UP_MINUTES = 8
KEPT = 4
GUEST = Slots(memory_mib=8, dirty_mib_s=4, disk_pause_us=2000, sign_ms=200)
DISKS = (Disk("qcow2", "virtio", "-blockdev", 8), Disk("raw", "scsi", "-drive", 8))
DAEMON_MAY_GROW_BY_KIB = 4096
QEMU_MAY_GROW_BY_KIB = 8192
RECORDS_MAY_GROW_BY_BYTES = 1024
"""Numbers in them get longer."""
STRAY_DESCRIPTORS = 2
"""A connection that is being closed."""
STRAY_THREADS = 4
"""Idle ones end after a while."""


async def test_a_checkpoint_each_minute(tmp_path: Path, record_property: Record) -> None:
    async with (
        open_vm(NEWEST, GUEST, disks=DISKS, memory_mib=96) as vm,
        open_daemon(tmp_path, {VM: vm}, NEWEST.img, settings=['log_level = "warning"']) as daemon,
    ):
        await vm.wait_line(lambda line: line.startswith("OK"))
        await daemon.wait_attached(VM)
        samples: list[Sample] = []
        call = caller(daemon.control)
        async with vm.monitor() as monitor:
            for minute in range(WARM_UP_MINUTES + MINUTES):
                await one_minute(call, minute)
                monitor.events.clear()
                state_dir = tmp_path / "state"
                sample = await take_sample(monitor, vm, daemon.process.pid, state_dir)
                if minute >= WARM_UP_MINUTES:
                    samples.append(sample)
        assert (await call("CheckStore", vm=VM))["check"]["clean"]
        assert vm.slots_report().fine
        await restores(call, vm)
    tell(record_property, samples)
    nothing_grows(samples)


async def one_minute(call: Call, minute: int) -> None:
    """Take a checkpoint, then delete what need not be kept."""
    strategy = list(Strategy)[minute % len(Strategy)]
    request = {"name": f"minute-{minute:04}", "strategy": strategy, "hash_memory": False}
    await call("CreateSnapshot", vm=VM, request=request)
    pruned = (await call("PruneSnapshots", vm=VM, request={"keep_last": KEPT}))["pruned"]
    too_old = [f"minute-{minute - KEPT:04}"] if minute >= KEPT else []
    assert pruned == {"deleted": too_old, "refused": []}


async def restores(call: Call, vm: Vm) -> None:
    """The oldest that was kept does, and its guest finds all that it has written."""
    kept = [snapshot["name"] for snapshot in (await call("ListSnapshots", vm=VM))["snapshots"]]
    assert len(kept) == KEPT
    mark = len(vm.log_lines())
    request = {"name": min(kept), "memory": "eager", "discard": True}
    await call("RevertSnapshot", vm=VM, request=request)
    await vm.wait_checked(since=mark)
    assert vm.slots_report(mark).bad_lines == ()


def nothing_grows(samples: list[Sample]) -> None:
    first = samples[0]
    for number, sample in enumerate(samples):
        assert sample.kept == first.kept, f"after {number} minutes"
    descriptors = [sample.daemon.descriptors for sample in samples]
    threads = [sample.daemon.threads for sample in samples]
    half = len(samples) // 2
    assert max(descriptors[half:]) <= max(descriptors[:half]) + STRAY_DESCRIPTORS, descriptors
    assert max(threads[half:]) <= max(threads[:half]) + STRAY_THREADS, threads
    assert growth([s.daemon.resident_kib for s in samples]) <= DAEMON_MAY_GROW_BY_KIB
    assert growth([s.qemu.resident_kib for s in samples]) <= QEMU_MAY_GROW_BY_KIB
    assert growth([s.record_bytes for s in samples]) <= RECORDS_MAY_GROW_BY_BYTES
    disk_bytes = [sample.disk_bytes for sample in samples]
    assert growth(disk_bytes) <= min(disk_bytes) / 4


def tell(record: Record, samples: list[Sample]) -> None:
    last = samples[-1]
    daemons = [sample.daemon for sample in samples]
    qemus = [sample.qemu for sample in samples]
    table = f"a checkpoint each minute, {KEPT} kept"
    for row, processes in (("the daemon", daemons), (f"QEMU {NEWEST}", qemus)):
        numbers: dict[str, Number] = {
            "minutes": len(samples),
            "MiB": processes[-1].resident_kib / 1024,
            "grown KiB": growth([process.resident_kib for process in processes]),
            "descriptors": max(process.descriptors for process in processes),
            "threads": max(process.threads for process in processes),
        }
        count(record, table, row, numbers)
    kept = last.kept
    numbers = {"nodes": kept.nodes, "fdsets": kept.fdsets, "layers": max(kept.layers)}
    count(record, table, f"QEMU {NEWEST}", numbers)
    disks: dict[str, Number] = {
        "MiB": last.disk_bytes / (1 << 20),
        "grown KiB": growth([sample.disk_bytes / 1024 for sample in samples]),
    }
    count(record, table, "the disks", disks)
