"""Records that are lost, damaged and brought back, through the daemon and `qsnapctl`."""

import json
from pathlib import Path

import trio

from tests.harness import Disk, Pages, open_vm
from tests.parts import qemu_versions
from tests.system.processes import Daemon, open_daemon

NEWEST = qemu_versions()[-1]
GUEST = Pages(spin=2000)
IN_ORDER = "Domain vm1 is in order\n"


async def bad_news(daemon: Daemon) -> str:
    """What snapshot-fsck says, which is not that all is in order."""
    command = daemon.command("snapshot-fsck vm1")
    done = await trio.run_process(command, capture_stdout=True, check=False)
    assert done.returncode == 1
    return done.stdout.decode()


async def test_forgotten_and_taken_in_again(tmp_path: Path) -> None:
    paper = tmp_path / "s.json"
    async with (
        open_vm(NEWEST, GUEST, memory_mib=32, disks=[Disk(size_mib=1)]) as vm,
        open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon,
    ):
        await daemon.wait_attached("vm1")
        await daemon.ctl("snapshot-create-as vm1 s --live")
        assert await daemon.ctl("snapshot-fsck vm1") == IN_ORDER
        await daemon.ctl(f"snapshot-export vm1 s --metadata {paper}")
        before = json.loads(paper.read_text())
        await daemon.ctl("snapshot-delete vm1 s --metadata")
        assert await daemon.json("snapshot-list vm1") == []
        store = tmp_path / "state" / "vm1"
        result = await daemon.json(f"snapshot-import vm1 --scan {store}")
        assert [found["outcome"] for found in result["found"]] == ["imported"]
        assert result["current"] == "s"
        assert await daemon.ctl("snapshot-fsck vm1") == IN_ORDER
        again = await daemon.json("snapshot-info vm1 s")
        assert (again["disks"], again["created_at"]) == (before["disks"], before["created_at"])
        # A record that was lost from its folder is put back there.
        (store / "s" / "snapshot.json").unlink()
        found = await bad_news(daemon)
        assert "manifest-missing" in found
        await daemon.ctl(f"snapshot-import vm1 --metadata {paper}")
        assert await daemon.ctl("snapshot-fsck vm1") == IN_ORDER
        await daemon.ctl("snapshot-revert vm1 s")
        assert await daemon.ctl("snapshot-fsck vm1") == IN_ORDER


async def test_what_a_crash_has_left_is_removed(tmp_path: Path) -> None:
    async with open_vm(NEWEST, GUEST, memory_mib=32, disks=[Disk(size_mib=1)]) as vm:
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon:
            await daemon.wait_attached("vm1")
            await daemon.ctl("snapshot-create-as vm1 s")
        left = vm.folder / "disk0.after-t.qcow2.0123abcd.partial"
        left.touch()
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon:
            await daemon.wait_attached("vm1")
            assert "file-abandoned" in await bad_news(daemon)
            assert left.exists()
            assert "repaired" in await daemon.ctl("snapshot-fsck vm1 --repair")
            assert not left.exists()
            assert await daemon.ctl("snapshot-fsck vm1") == IN_ORDER
