"""Snapshots that older versions took: read, verified and put back for ever.

tests/formats holds one pair of files for each: the manifest, with paths below /fixture, and
the memory image (xz). They were taken by the version of qsnapd that wrote that format first,
of the pages guest with 24 MiB and one empty disk; the file names say by which QEMU and how.
"""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from qsnapd.model.request import RevertRequest
from qsnapd.store.manifests import read_manifest
from tests.harness import Disk, Pages, Vm, open_vm
from tests.parts import BACKPORTS_QEMU, ROOT, SYSTEM_QEMU, Qemu, find_qemu
from tests.rig import open_rig

FORMATS = ROOT / "tests" / "formats"
NAMES = sorted(path.name.removesuffix(".json") for path in FORMATS.glob("*.json"))
VM = "vm1"
SNAPSHOT = "kept"
GUEST = Pages(spin=2000)


def put_in_place(name: str, state_dir: Path, vm: Vm, qemu: Qemu) -> Path:
    """Unpack a fixture as if it had been taken here, of *vm* on *qemu*; returns its folder."""
    folder = state_dir / VM / SNAPSHOT
    folder.mkdir(parents=True, mode=0o700)
    (folder / "memory.img").write_bytes(lzma.decompress((FORMATS / f"{name}.img.xz").read_bytes()))
    text = (FORMATS / f"{name}.json").read_text()
    for there, here in (
        ("/fixture/vm", vm.folder),
        ("/fixture/state", state_dir),
        ("/fixture", vm.folder),
        ("/usr/bin/qemu-system-x86_64", qemu.system),
    ):
        text = text.replace(str(there), str(here))
    manifest: dict[str, Any] = json.loads(text)
    [disk] = manifest["disks"]
    status = vm.disks[0].stat()
    disk["chain"][0].update(device=status.st_dev, inode=status.st_ino)
    (folder / "snapshot.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_manifest_is_read(name: str) -> None:
    manifest = read_manifest(FORMATS / f"{name}.json")
    assert manifest.format == int(name.split("-")[0])
    assert manifest.qemu_version.startswith(name.split("-")[1])
    assert manifest.memory is not None
    assert manifest.is_mappable == name.endswith("mapped-ram")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        *((name, name.split("-")[1]) for name in NAMES),
        # by an older QEMU, of a machine type that both know
        *((name, BACKPORTS_QEMU) for name in NAMES if name.split("-")[1] == SYSTEM_QEMU),
    ],
)
async def test_guest_goes_on(name: str, version: str, tmp_path: Path) -> None:
    qemu = find_qemu(version)
    async with open_vm(qemu, GUEST, memory_mib=24, disks=(Disk(size_mib=1),)) as vm:
        put_in_place(name, tmp_path, vm, qemu)
        async with open_rig(qemu, tmp_path, **{VM: vm}) as rig:
            await vm.kill()
            await rig.supervisors[VM].wait_detached()
            mark = len(vm.log_lines())
            await rig.revert(VM, RevertRequest(name=SNAPSHOT, state="running", discard=True))
            await vm.wait_line(lambda line: "PASS" in line, since=mark)
            report = vm.pages_report(mark)
            assert report.fine
            assert report.passes[0] > 1, "it went on, it did not begin anew"
            machine = rig.host.vm(VM).machine
            assert machine is not None
            assert machine.endswith(name.split("-")[1])
