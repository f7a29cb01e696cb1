"""A guest with the real agent in it, and what its file system looks like from outside."""

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from qsnapd.model.request import CreateRequest
from tests.harness import Agent, Disk, Vm, open_vm
from tests.monitor import Monitor
from tests.parts import Qemu
from tests.parts.tools import command
from tests.real.cases import VM
from tests.rig import Rig, open_rig

QUIESCED = CreateRequest(name="q", disk_only=True, quiesce=True)
UNQUIESCED = CreateRequest(name="c", disk_only=True)

_SUPERBLOCK_AT = 1024
_INCOMPATIBLE_AT = _SUPERBLOCK_AT + 0x60
_NEEDS_RECOVERY = 0x4


@asynccontextmanager
async def open_agent_vm(qemu: Qemu, disks: Sequence[Disk] = ()) -> AsyncIterator[Vm]:
    """Hold a VM whose guest writes to its ext4 on the first disk, and whose agent is up."""
    async with open_vm(qemu, Agent(), disks=(Disk("raw"), *disks)) as vm:
        await vm.wait_line(lambda line: line.startswith("WROTE"))
        await wait_agent(vm)
        yield vm


@asynccontextmanager
async def open_quiet(qemu: Qemu, state_dir: Path) -> AsyncIterator[tuple[Vm, Rig]]:
    async with open_agent_vm(qemu) as vm, open_rig(qemu, state_dir, **{VM: vm}) as rig:
        yield vm, rig


async def wait_agent(vm: Vm) -> None:
    """Wait until an agent has opened its port."""
    try:
        with trio.fail_after(60):
            async with vm.monitor() as monitor:
                while not await _is_open(monitor):
                    await monitor.wait_event("VSERPORT_CHANGE")
    except trio.TooSlowError as late:
        said = [line for line in vm.log_lines() if not line.startswith("WROTE")]
        late.add_note("the guest has said:\n" + "\n".join(said))
        raise


async def _is_open(monitor: Monitor) -> bool:
    [is_open] = [
        chardev["frontend-open"]
        for chardev in await monitor.execute("query-chardev")
        if chardev["label"] == "agent"
    ]
    return bool(is_open)


async def wait_writing(vm: Vm) -> None:
    """Wait until the guest has changed its file system from now on: it is thawed."""
    for _ in range(2):  # the first one may have been written before, and only be said now
        since = len(vm.log_lines())
        await vm.wait_line(lambda line: line.startswith("WROTE"), since=since, limit_s=30)


async def fsck(image: Path, qemu: Qemu, folder: Path) -> tuple[bool, str]:
    """Look at the file system in *image*, which may be in use: is its journal empty, and e2fsck.

    Returns also what e2fsck has said, "" if it has nothing to complain of.
    """
    copy = folder / "copy.raw"
    await trio.run_process(
        [str(word) for word in (qemu.img, "convert", "-U", "-O", "raw", image, copy)]
    )
    [features] = struct.unpack_from("<I", copy.read_bytes(), _INCOMPATIBLE_AT)
    done = await trio.run_process(
        [*command("e2fsck"), "-f", "-n", str(copy)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    said = (done.stdout + done.stderr).decode()
    copy.unlink()
    return not features & _NEEDS_RECOVERY, said if done.returncode else ""
