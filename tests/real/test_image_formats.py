"""Memory images of real QEMUs: verified, sealed, and loaded to prove that this means something.

The guest dirties all of its RAM without a pause, and its pages show whether what was loaded
is of one instant.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import trio

from qsnapd.errors import ImageInvalid
from qsnapd.image import mapped_ram, stream
from qsnapd.image.mapped_ram import Writes
from qsnapd.model.snapshot import RamBlock
from tests.guests.pages import BASE, LEFT_AT_THE_TOP_BYTES, PAGE_BYTES, check_ram
from tests.harness import Pages, Vm, open_vm
from tests.monitor import Monitor
from tests.parts import BACKPORTS_QEMU, SYSTEM_QEMU, Qemu, find_qemu

RAM_MIB = 64
RAM_BYTES = RAM_MIB << 20
DIRTIED_PAGES = (RAM_BYTES - BASE - LEFT_AT_THE_TOP_BYTES) // PAGE_BYTES
EXPECTED = (RamBlock(id="pc.ram", size_bytes=RAM_BYTES),)

Strategy = Literal["stopped", "multifd", "precopy", "background"]


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


async def migrated(monitor: Monitor) -> None:
    while True:
        event = await monitor.wait_event("MIGRATION")
        assert event["data"]["status"] != "failed"
        if event["data"]["status"] == "completed":
            return


async def set_capabilities(monitor: Monitor, *names: str) -> None:
    capabilities = [{"capability": name, "state": True} for name in ("events", *names)]
    await monitor.execute("migrate-set-capabilities", capabilities=capabilities)


def uri(vm_qemu: Qemu, path: Path, *, load: bool = False) -> str:
    """How to reach *path*; plain files came with QEMU 8.2."""
    if vm_qemu.version == BACKPORTS_QEMU:
        return f"file:{path}"
    return f"exec:cat {path}" if load else f"exec:cat > {path}"


async def save(vm: Vm, qemu: Qemu, path: Path, strategy: Strategy, *capabilities: str) -> None:
    """Save the memory of the guest in the middle of its work."""
    await vm.wait_line(lambda line: line.startswith("PASS"))
    async with vm.monitor() as monitor:
        if strategy == "background":
            capabilities += ("background-snapshot",)
        if strategy == "multifd":
            capabilities += ("multifd",)
        await set_capabilities(monitor, *capabilities)
        await monitor.execute("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=5_000)
        if strategy != "precopy":
            await monitor.execute("stop")
        await monitor.execute("migrate", uri=uri(qemu, path))
        if strategy == "background":
            await pages_are_saved(monitor)
            await monitor.execute("cont")
        await migrated(monitor)


async def pages_are_saved(monitor: Monitor) -> None:
    with trio.fail_after(20):
        while True:  # no event tells this
            ram = (await monitor.execute("query-migrate")).get("ram", {})
            if ram.get("normal", 0) + ram.get("duplicate", 0) > 0:
                return
            await trio.sleep(0.001)


async def require_one_instant(qemu: Qemu, path: Path, dump: Path, *capabilities: str) -> None:
    """Load the image in another QEMU and look at every page of RAM."""
    incoming = ("-incoming", "defer", "-S")
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB, extra=incoming) as vm:
        async with vm.monitor() as monitor:
            await set_capabilities(monitor, *capabilities)
            await monitor.execute("migrate-incoming", uri=uri(qemu, path, load=True))
            await migrated(monitor)
            await monitor.execute("pmemsave", val=0, size=RAM_BYTES, filename=str(dump))
            report = check_ram(await trio.Path(dump).read_bytes())
            assert report.one_instant, report
            assert report.counters[0] > 0
            await monitor.execute("cont")
        await vm.wait_line(lambda line: line.startswith("PASS"))  # it goes on
        assert vm.pages_report().fine


@pytest.mark.parametrize("version", [SYSTEM_QEMU, BACKPORTS_QEMU])
@pytest.mark.parametrize("strategy", ["stopped", "precopy", "background"])
async def test_stream(version: str, strategy: Strategy, tmp_path: Path) -> None:
    qemu, path = find_qemu(version), tmp_path / "memory.img"
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB) as vm:
        await save(vm, qemu, path, strategy)
    with opened(path) as fd:
        verified = stream.verify(fd, EXPECTED)
        with pytest.raises(ImageInvalid, match="not saved with mapped-ram"):
            mapped_ram.verify(fd, EXPECTED, Writes.ONCE)
    assert verified.unchecked is None
    total = sum(block.size_bytes for block in verified.ram_blocks) // PAGE_BYTES
    if strategy == "background":
        assert verified.pages == total
    else:
        assert verified.pages >= total
    await require_one_instant(qemu, path, tmp_path / "dump")
    require_cuts_are_found(path)


def require_cuts_are_found(path: Path) -> None:
    size = path.stat().st_size
    for lost in (1, 4096, 1 << 20):
        os.truncate(path, size - lost)
        with opened(path) as fd, pytest.raises(ImageInvalid):
            stream.verify(fd, EXPECTED)
        size -= lost


@pytest.mark.parametrize("strategy", ["stopped", "multifd", "precopy"])
async def test_mapped_ram(strategy: Strategy, tmp_path: Path) -> None:
    qemu, path = find_qemu(BACKPORTS_QEMU), tmp_path / "memory.img"
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB) as vm:
        await save(vm, qemu, path, strategy, "mapped-ram")
    with opened(path, os.O_RDWR) as fd:
        os.fsync(fd)
        assert not mapped_ram.seal(fd), "QEMU wrote these bitmaps"
        writes = Writes.REPEATED if strategy == "precopy" else Writes.ONCE
        verified = mapped_ram.verify(fd, EXPECTED, writes)
    assert verified.pages >= DIRTIED_PAGES
    await require_one_instant(qemu, path, tmp_path / "dump", "mapped-ram")


async def test_mapped_ram_of_a_background_snapshot_is_sealed(tmp_path: Path) -> None:
    qemu, path = find_qemu(BACKPORTS_QEMU), tmp_path / "memory.img"
    async with open_vm(qemu, Pages(), memory_mib=RAM_MIB) as vm:
        await save(vm, qemu, path, "background", "mapped-ram")
    with opened(path, os.O_RDWR) as fd:
        with pytest.raises(ImageInvalid, match="it was not sealed"):
            mapped_ram.verify(fd, EXPECTED, Writes.ONCE)
        assert mapped_ram.seal(fd)
        assert not mapped_ram.seal(fd)
        verified = mapped_ram.verify(fd, EXPECTED, Writes.ONCE)
    assert verified.pages >= DIRTIED_PAGES
    await require_one_instant(qemu, path, tmp_path / "dump", "mapped-ram")
