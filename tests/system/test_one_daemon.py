"""One daemon per store, by whatever path; and what it makes is its owner's, whatever the umask."""

import stat
import subprocess
from pathlib import Path

import pytest
import trio

from tests.harness import Disk, Pages, Vm, open_vm
from tests.parts import qemu_versions
from tests.system.processes import ANSWER_LIMIT_S, COMMANDS, open_daemon

NEWEST = qemu_versions()[-1]
QUIET = Pages(spin=20000)


async def run(command: str, config: Path) -> subprocess.CompletedProcess[bytes]:
    """Run `qsnapd COMMAND`, which is to end by itself."""
    argv = [str(COMMANDS / "qsnapd"), *command.split(), "--config", str(config)]
    with trio.fail_after(ANSWER_LIMIT_S):
        return await trio.run_process(argv, capture_stderr=True, check=False)


def config_of_another(folder: Path, state_dir: Path, vm: Vm) -> Path:
    """One that differs in all but the store, and in how that is called."""
    path = folder / "another.toml"
    path.write_text(
        f'[daemon]\nsocket = "{folder}/another.socket"\nstate_dir = "{state_dir}"\n'
        f'runtime_dir = "{folder}"\n[vm.vm1]\nqmp = "{vm.qmp}"\n'
    )
    return path


@pytest.mark.parametrize("command", ["serve", "reconcile --resume-only"])
async def test_nobody_else_gets_at_the_store(command: str, tmp_path: Path) -> None:
    async with (
        open_vm(NEWEST, QUIET, disks=[Disk(size_mib=1)], memory_mib=4) as vm,
        open_daemon(tmp_path, {"vm1": vm}, NEWEST.img) as daemon,
    ):
        await daemon.wait_attached("vm1")
        await daemon.ctl("snapshot-create-as vm1 s1 --disk-only")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "state")
        before = contents(tmp_path / "state")
        for state_dir in (tmp_path / "state", link, link / "vm1" / ".."):
            done = await run(command, config_of_another(tmp_path, state_dir, vm))
            assert done.returncode != 0
            words = f"is in use by another qsnapd (pid {daemon.process.pid})"
            assert words in done.stderr.decode()
        assert contents(tmp_path / "state") == before
        assert not (tmp_path / "another.socket").exists()
        assert await daemon.ctl("domstate vm1") == "running\n"
        await daemon.ctl("snapshot-create-as vm1 s2 --disk-only")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".state.json")
    return {str(path): path.read_bytes() for path in files}


LINES = (
    "snapshot-create-as vm1 s1",
    "snapshot-create-as vm1 s2 --memspec {folder}/memory",
    "snapshot-create-as vm1 s3 --disk-only",
    "snapshot-export vm1 s1 {folder}/export",
    "snapshot-import vm1 {folder}/export --name i1",
    "snapshot-current vm1 s1",
    "snapshot-delete vm1 s2 --metadata",
    "snapshot-revert vm1 s3",
)
"""Of all kinds of files that qsnapd makes, one at least."""


@pytest.mark.parametrize("umask", [0, 0o777], ids=["denies nothing", "denies all"])
async def test_files_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    async with open_vm(NEWEST, QUIET, disks=[Disk(size_mib=1)], memory_mib=4) as vm:
        there = set(vm.folder.iterdir())
        async with open_daemon(tmp_path, {"vm1": vm}, NEWEST.img, umask=umask) as daemon:
            await daemon.wait_attached("vm1")
            for line in LINES:
                await daemon.ctl(line.format(folder=tmp_path))
            made = {path for path in vm.folder.glob("*.qcow2") if path not in there}
            made.add(tmp_path / "memory")
            for folder in (tmp_path / "state", tmp_path / "export"):
                made |= {folder, *folder.rglob("*")}
            assert len(made) > 20
            for path in made:
                mode = path.stat().st_mode
                wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
                assert stat.S_IMODE(mode) == wanted, f"{path}: {mode:o}"
