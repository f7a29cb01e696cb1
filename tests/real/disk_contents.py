"""What is on disks, past qsnapd: written through the guest's devices, read from the files."""

import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from qsnapd.model.snapshot import DiskLayer, Manifest
from tests.harness import Vm
from tests.monitor import Monitor
from tests.parts import Qemu

BLOCK_BYTES = 64 << 10


async def write(vm: Vm, pattern: int, block: int, *, blocks: int = 1) -> None:
    """Write a pattern to all disks of a VM, where its guest leaves them alone."""
    async with vm.monitor() as monitor:
        await write_by(monitor, pattern, block, blocks=blocks)


async def write_by(monitor: Monitor, pattern: int, block: int, *, blocks: int = 1) -> None:
    """Do the same with a monitor that is already open."""
    for device in await monitor.execute("query-block"):
        if device.get("inserted", {"ro": True})["ro"]:
            continue
        for words in (
            f"write -P {pattern} {block * BLOCK_BYTES} {blocks * BLOCK_BYTES}",
            "flush",
        ):
            line = f'qemu-io -d {device["qdev"]} "{words}"'
            said = await monitor.execute("human-monitor-command", command_line=line)
            assert not said.strip(), said


def content(qemu: Qemu, path: Path | str, image_format: str) -> str:
    """Return the SHA-256 of what a disk on this image would show."""
    with tempfile.NamedTemporaryFile(suffix=".raw") as raw:
        subprocess.run(
            [qemu.img, "convert", "-U", "-f", image_format, "-O", "raw", path, raw.name],
            check=True,
        )
        return hashlib.sha256(Path(raw.name).read_bytes()).hexdigest()


def content_of(qemu: Qemu, disks: Sequence[DiskLayer]) -> tuple[str, ...]:
    return tuple(content(qemu, disk.frozen, disk.frozen_format) for disk in disks)


async def contents(qemu: Qemu, manifests: Sequence[Manifest]) -> dict[str, tuple[str, ...]]:
    """Return what the disks of snapshots show, by name."""
    return {
        manifest.name: await trio.to_thread.run_sync(content_of, qemu, manifest.disks)
        for manifest in manifests
    }
