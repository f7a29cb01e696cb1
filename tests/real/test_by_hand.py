"""Restoring without qsnapd: the commands of README.md, read from there and run as they stand.

qsnapd takes the checkpoint. What puts it back is a shell's worth of QEMU and a QMP client of a
few lines; it gets the manifest as JSON and knows nothing of the code that wrote it.
"""

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.harness import Disk, Vm, open_vm
from tests.parts import ROOT, SYSTEM_QEMU, Qemu
from tests.real.cases import BUSY, CASES, VM, Case
from tests.rig import open_rig

DISKS = (Disk("qcow2", "virtio", "-blockdev"), Disk("qcow2", "scsi", "-drive"))
HEADING = "Without qsnapd, with nothing but QEMU"
RECORDED = re.compile(r"\.\.\.the recorded arguments.*?\.\.\. ")
EXEC = re.compile(r"`-incoming '(exec:cat MEMORY)'` reads a stream")


class Recipe:
    """What README.md says to do."""

    def __init__(self) -> None:
        text = (ROOT / "README.md").read_text()
        block = text.split(HEADING, 1)[1].split("```sh\n", 1)[1].split("```", 1)[0]
        self.create, self.start, *rest = (
            line for line in block.splitlines() if not line.startswith("#")
        )
        self.commands: list[dict[str, Any]] = [json.loads(line) for line in rest]
        found = EXEC.search(text)
        assert found is not None, "README.md says how to read a stream before `file:`"
        self.old_incoming = found[1]


async def restore(manifest: str, qemu: Qemu, folder: Path, vm: Vm) -> None:
    """Do what the README says with the snapshot of *manifest*; new overlays go to *folder*."""
    recipe, snapshot = Recipe(), json.loads(manifest)
    argv = list(snapshot["machine"]["process"]["argv"])
    for disk in snapshot["disks"]:
        new = folder / f"{disk['target']}.qcow2"
        values = {"FROZEN": disk["frozen"], "NEW.qcow2": str(new), "FORMAT": disk["frozen_format"]}
        create = filled(recipe.create, values)
        assert create[0] == "qemu-img"
        await trio.run_process([str(qemu.img), *create[1:]], capture_stdout=True)
        argv = [word.replace(disk["frozen"], str(new)) for word in argv]
    values = {"TYPE": snapshot["machine"]["type"]}
    program, *options = filled(RECORDED.sub("RECORDED ", recipe.start), values)
    assert program == "qemu-system-x86_64"
    assert options.pop(0) == "RECORDED"
    memory, old = snapshot["memory"]["path"], qemu.version == SYSTEM_QEMU
    if old:
        options[options.index("defer")] = recipe.old_incoming.replace("MEMORY", memory)
    await trio.run_process([str(qemu.system), *argv[1:], *options])
    async with vm.monitor() as monitor:
        for command in recipe.commands:
            name, arguments = command["execute"], command.get("arguments", {})
            if name == "migrate-set-capabilities" and snapshot["image_format"] != "mapped-ram":
                continue
            if name == "migrate-incoming":
                if old:
                    continue
                arguments = {"uri": f"file:{memory}"}
            if name == "cont":  # sent earlier, it is overruled by what the image says
                while (await monitor.execute("query-migrate")).get("status") != "completed":
                    pass  # each question takes a moment
            await monitor.execute(name, **arguments)


def filled(line: str, values: dict[str, str]) -> Sequence[str]:
    """The words of a line, with its capitals replaced; what is to be replaced has a value."""
    words = shlex.split(line, comments=True)
    return [values.get(word, word) for word in words]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_readme_commands_restore_a_checkpoint(case: Case, tmp_path: Path) -> None:
    async with open_vm(case.qemu, BUSY, disks=DISKS) as vm:
        await vm.wait_line(lambda line: line.startswith("OK"))
        async with open_rig(case.qemu, tmp_path / "state", **{VM: vm}) as rig:
            first = await rig.create(VM, case.request("first"))
            await vm.wait_checked()  # it goes on, so that later is not the same
        await vm.kill()
        since = len(vm.log_lines())
        manifest = tmp_path / "state" / VM / "first" / "snapshot.json"
        await restore(manifest.read_text(), case.qemu, tmp_path, vm)
        await vm.wait_checked(since=since)
        assert vm.slots_report(since).bad_lines == ()
        assert (await vm.execute("query-status"))["status"] == "running"
        overlays = {str(tmp_path / f"{disk.target}.qcow2") for disk in first.disks}
        assert overlays <= opened_files(vm.pid)


def opened_files(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(link.readlink()))
    return found
