"""A snapshot on its way from one daemon to another, through a pipe between two commands."""

import os
import signal
from functools import partial
from pathlib import Path

import trio

from tests.harness import Disk, Pages, open_vm
from tests.parts import qemu_versions
from tests.system.processes import Daemon, open_daemon

NEWEST = qemu_versions()[-1]


async def piped(source: Daemon, line: str, target: Daemon, other: str) -> None:
    """Run `qsnapctl LINE | qsnapctl OTHER`."""
    reader, writer = os.pipe()
    async with trio.open_nursery() as nursery:
        for command, streams in (
            (source.command(line), {"stdout": writer}),
            (target.command(other), {"stdin": reader, "capture_stdout": True}),
        ):
            await nursery.start(partial(trio.run_process, command, **streams))
        os.close(writer)
        os.close(reader)


async def test_from_daemon_to_daemon(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    async with (
        open_vm(NEWEST, Pages(spin=2000), memory_mib=32, disks=[Disk(size_mib=1)]) as vm,
        open_vm(NEWEST, Pages(spin=2000), memory_mib=32, disks=[Disk(size_mib=1)]) as other,
        open_daemon(here, {"vm1": vm}, NEWEST.img) as source,
        open_daemon(there, {"vm2": other}, NEWEST.img) as target,
    ):
        await source.wait_attached("vm1")
        await target.wait_attached("vm2")
        await source.ctl("snapshot-create-as vm1 s --live")
        await piped(source, "snapshot-export vm1 s --tar", target, "snapshot-import vm2 --tar")
        sent = await source.json("snapshot-info vm1 s")
        arrived = await target.json("snapshot-info vm2 s")
        assert arrived["vm"] == "vm2"
        assert arrived["created_at"] == sent["created_at"]
        assert arrived["memory"]["sha256"] == sent["memory"]["sha256"]
        await target.ctl("snapshot-verify vm2 s")


async def test_daemon_killed_in_the_middle(tmp_path: Path) -> None:
    """What a transfer had begun in the store is gone as soon as the next daemon runs."""
    reader, writer = os.pipe()
    async with open_vm(NEWEST, Pages(spin=2000), memory_mib=32, disks=[Disk(size_mib=1)]) as vm:
        store = tmp_path / "state" / "vm1"
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon:
            await daemon.wait_attached("vm1")
            await daemon.ctl("snapshot-create-as vm1 s")
            before = entries(store)
            archive = tmp_path / "s.tar"
            await daemon.ctl(f"snapshot-export vm1 s --tar {archive}")
            async with trio.open_nursery() as nursery:
                stuck = daemon.command("snapshot-export vm1 s --tar")  # nobody reads
                run = partial(trio.run_process, stuck, stdout=writer, check=False)
                await nursery.start(run)
                incoming, feed = os.pipe()
                half = daemon.command("snapshot-import vm1 --name t --tar")
                run = partial(trio.run_process, half, stdin=incoming, check=False)
                await nursery.start(run)
                await trio.to_thread.run_sync(os.write, feed, archive.read_bytes()[:60000])
                with trio.fail_after(30):
                    while not {".export", ".t.part"} <= {name[:7] for name in entries(store)}:
                        await daemon.ctl("domstate vm1")  # it takes a moment
                daemon.process.send_signal(signal.SIGKILL)
                await daemon.process.wait()
        assert entries(store) != before
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon:
            await daemon.wait_attached("vm1")
            assert entries(store) == before
            assert list((store / ".disks").iterdir()) == []
        for fd in (reader, writer, incoming, feed):
            os.close(fd)


def entries(store: Path) -> set[str]:
    """Folders in the VM's part of the store, but for the one that imported disks get theirs in."""
    return {path.name for path in store.iterdir() if path.is_dir()} - {".disks"}
