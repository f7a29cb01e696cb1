"""190 snapshots one upon the other: as quick as the first ones, but for what QEMU takes."""

import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import trio

from qsnapd.control.authorization import Access
from qsnapd.control.server import Server
from qsnapd.control.view import placed
from qsnapd.errors import Blocked
from qsnapd.model.request import CreateRequest, DeleteRequest, Memory, RevertRequest
from qsnapd.model.snapshot import Strategy
from qsnapd.snapshot.taking import overlay_node
from qsnapd.snapshot.taking.plan_disks import CHAIN_LIMIT
from tests.harness import Disk, Vm
from tests.parts import Qemu
from tests.real.cases import NEWEST, VM, each_qemu, open_lazy
from tests.real.disk_content import chain_of
from tests.rig import Rig

DEPTH = 190
QUERY_LIMIT_S = 0.1
CREATE_MORE_S = 0.5
"""How much more the last may cost than the first, of processor time; about 0.1 s. QEMU tells of
each image, at a price that rises with the depth, and takes all of them into the pivot."""
STORE_LIMIT_BYTES = 64 << 20
DISKS = (Disk("qcow2", size_mib=4), Disk("raw", "scsi", "-drive", size_mib=4))
DISK_ONLY = CreateRequest(disk_only=True)


async def quickest(work: Callable[[], Awaitable[object]], times: int = 8) -> float:
    """How long *work* takes when nobody else is in the way."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        await work()
        taken.append(time.perf_counter() - began)
    return min(taken)


async def grow(rig: Rig, vm: Vm, count: int) -> list[float]:
    """Take so many snapshots; what each cost in seconds of processor time, here and in QEMU."""
    costs = []
    for _ in range(count):
        before_s = spent_s(vm.pid)
        manifest = await rig.create(VM, DISK_ONLY)
        costs.append(spent_s(vm.pid) - before_s)
        assert manifest.paused_ms == 0
    return costs


def spent_s(pid: int) -> float:
    """By this process, its children, and the thread of QEMU in which commands are carried out."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + sum(os.times()[:4])


def resident_bytes() -> int:
    status = Path("/proc/self/statm").read_text()
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


@each_qemu
async def test_190_snapshots_in_one_chain(qemu: Qemu, tmp_path: Path) -> None:
    async with open_lazy(qemu, tmp_path, disks=DISKS) as (vm, rig):
        first = await rig.create(VM, CreateRequest(name="first", strategy=Strategy.STOPPED))
        before_bytes = resident_bytes()
        costs = await grow(rig, vm, DEPTH - 2)
        last = await rig.create(VM, CreateRequest(name="last", strategy=Strategy.STOPPED))
        assert len(last.disks[0].chain) == DEPTH
        assert median(costs[-9:]) - median(costs[:9]) < CREATE_MORE_S
        assert resident_bytes() - before_bytes < STORE_LIMIT_BYTES
        assert len(os.listdir(f"/proc/{vm.pid}/fd")) < 2 * DEPTH + 60, "one for each image"
        await look_at_it(rig, tmp_path)
        # two of them merged away, the oldest of the layers and one in the middle
        middle = rig.host.snapshot(VM, last.name).parent
        assert middle is not None
        for name in (first.name, middle):
            await (await rig.host.delete(VM, DeleteRequest(name=name))).wait()
        depths = {disk.target: disk.chain_depth for disk in await rig.host.disks(VM)}
        assert depths["vda"] == depths["sda"] == DEPTH - 1
        await rig.revert(VM, RevertRequest(name="last", memory=Memory.EAGER, discard=True))
        assert rig.host.vm(VM).state == "running"
        await grow(rig, vm, 1)


async def look_at_it(rig: Rig, folder: Path) -> None:
    """Ask the daemon what its clients ask it."""
    host = rig.host

    async def list_all() -> None:
        await trio.lowlevel.checkpoint()
        found = placed(host.snapshots(VM), host.current(VM), host.users(VM))
        assert len(found) == DEPTH

    assert await quickest(list_all) < QUERY_LIMIT_S
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(folder / "socket"))
    listener.listen()
    async with trio.open_nursery() as nursery:
        server = Server(host, Access())
        await nursery.start(
            trio.serve_listeners, server.handle, [trio.SocketListener(listener)]
        )
        async with await trio.open_unix_socket(folder / "socket") as stream:
            for method, parameters in (
                ("ListSnapshots", {}),
                ("GetSnapshot", {"name": "last"}),
                ("GetCurrentSnapshot", {}),
                ("GetVm", {}),
            ):
                call = {"method": f"io.qsnapd.{method}", "parameters": {"vm": VM, **parameters}}
                assert await quickest(partial(ask, stream, call)) < QUERY_LIMIT_S, method
        nursery.cancel_scope.cancel()


async def ask(stream: trio.SocketStream, call: Mapping[str, object]) -> None:
    """Make a call and take its reply, without a look at what it is."""
    await stream.send_all(json.dumps(call).encode() + b"\0")
    reply = await stream.receive_some()
    assert not reply.startswith(b'{"error'), reply
    while not reply.endswith(b"\0"):
        reply = await stream.receive_some()
        assert reply, "the server closed the connection instead of answering"


@each_qemu
async def test_where_files_have_to_be_handed_over(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU then names an image by the JSON of all that it consists of, and cuts that off."""
    monkeypatch.setattr(overlay_node, "_sees", lambda pid, path, overlay: False)
    async with open_lazy(qemu, tmp_path, disks=DISKS) as (vm, rig):
        await grow(rig, vm, 60)
        nodes = await vm.execute("query-named-block-nodes", flat=True)
        cut_off = [node["file"] for node in nodes if node["file"].endswith("...")]
        assert cut_off, "the chain is not deep enough"
        await rig.create(VM, CreateRequest(name="last", strategy=Strategy.STOPPED))
        last = rig.host.snapshot(VM, "last")
        for disk in last.disks:
            assert [file.path for file in disk.chain] == [
                str(path) for path in await trio.to_thread.run_sync(chain_of, Path(disk.frozen))
            ]
            assert len(disk.chain) == 61
        await rig.revert(VM, RevertRequest(name="last", memory=Memory.EAGER, discard=True))


async def test_there_is_an_end_to_it(tmp_path: Path) -> None:
    """Beyond the limit a snapshot is refused, with what to do; so is one of a deeper chain."""
    async with open_lazy(NEWEST, tmp_path, disks=DISKS[:1]) as (vm, rig):
        await grow(rig, vm, CHAIN_LIMIT - 1)
        [disk] = [disk for disk in await rig.host.disks(VM) if disk.left_out is None]
        assert disk.chain_depth == CHAIN_LIMIT
        files = {*vm.folder.iterdir()}
        with pytest.raises(Blocked, match=r"backing chains more than 200 layers deep.*delete"):
            await rig.create(VM, DISK_ONLY)
        assert {*vm.folder.iterdir()} == files
        current = rig.host.current(VM)
        assert current is not None
        with pytest.raises(Blocked, match=r"cannot be kept.*more than 200 layers.*--discard"):
            await rig.revert(VM, RevertRequest(name=current, state="running"))
        await (await rig.host.delete(VM, DeleteRequest(name=current))).wait()
        await grow(rig, vm, 1)
