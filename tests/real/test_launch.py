"""What `plan_launch` makes of a command line, a real QEMU accepts and understands."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qsnapd.model.snapshot import FileIdentity, Machine, Process
from qsnapd.vm.argv import WITHOUT_VALUE
from qsnapd.vm.identity import key_of
from qsnapd.vm.launch import MovedDisk, Start, launch_of, read_command_line
from tests.parts import Qemu, qemu_versions

each_qemu = pytest.mark.parametrize("qemu", qemu_versions(), ids=str)

QUIET = ("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-qmp", "stdio")
MACHINE_TYPE = "pc-i440fx-7.2"
LIMIT_S = 30.0

SPELLINGS = {
    "drive": ["-M", "q35", "-drive", "file={qcow2},format=qcow2,if=virtio,cache=none,aio=threads"],
    "drive-raw": ["-drive", "file={raw},format=raw,if=none,id=d", "-device", "virtio-blk,drive=d"],
    "drive-file": ["-drive", "driver=raw,file.filename={raw},file.locking=off,if=virtio"],
    "drive-format-file": ["-drive", "file={raw},format=file,if=virtio,cache=unsafe"],
    "drive-protocol": ["-drive", "driver=file,filename={raw},if=virtio"],
    "hda": ["-m", "32", "-hda", "{qcow2}", "-S"],
    "bare-word": ["{qcow2}", "-machine", "usb=off"],
    "pflash": ["-pflash", "{flash}"],
    "blockdev": [
        *("-blockdev", "qcow2,node-name=d0,file.driver=file,file.filename={qcow2},discard=unmap"),
        *("-device", "virtio-blk-pci,drive=d0"),
    ],
    "blockdev-apart": [
        *("-blockdev", "driver=file,node-name=f0,filename={raw},auto-read-only=on,locking=off"),
        *("-blockdev", "driver=raw,node-name=d0,file=f0,cache.direct=on,read-only=off"),
        *("-device", "virtio-blk-pci,drive=d0"),
    ],
    "blockdev-protocol": [
        *("-blockdev", "driver=file,node-name=d0,filename={raw},aio=threads,detect-zeroes=on"),
        *("-device", "virtio-blk-pci,drive=d0"),
    ],
    "blockdev-json": [
        "-blockdev",
        json.dumps(
            {
                "driver": "raw",
                "node-name": "d0",
                "cache": {"direct": False, "no-flush": True},
                "file": {"driver": "file", "filename": "{raw}", "locking": "auto"},
            }
        ).replace("{", "{{").replace("}", "}}").replace("{{raw}}", "{raw}"),
        *("-device", "virtio-blk-pci,drive=d0"),
    ],
    "backing-apart": [
        *("-blockdev", "driver=file,node-name=b0,filename={raw},read-only=on"),
        *("-blockdev", "driver=qcow2,node-name=d0,file.driver=file,file.filename={qcow2},"
          "backing=b0"),
        *("-device", "virtio-blk-pci,drive=d0"),
    ],
}  # fmt: skip


QUERY_MACHINE = {"execute": "qom-get", "arguments": {"path": "/machine", "property": "type"}}


def ask(
    executable: Path | str, argv: Sequence[str], cwd: Path, *commands: dict[str, Any]
) -> list[Any]:
    """Start QEMU with its monitor on stdin, run *commands* and quit; return their replies."""
    words = [{"execute": "qmp_capabilities"}, *commands, {"execute": "quit"}]
    ended = subprocess.run(
        list(argv),
        executable=executable,
        cwd=cwd,
        input="\n".join(map(json.dumps, words)),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    replies = [json.loads(line) for line in ended.stdout.splitlines()]
    return [reply["return"] for reply in replies if "return" in reply][1:-1]


def file_identity(path: Path) -> FileIdentity:
    status = path.stat()
    return FileIdentity(path=str(path), device=status.st_dev, inode=status.st_ino)


def create(qemu: Qemu, *arguments: str | Path) -> None:
    subprocess.run([qemu.img, "create", "-q", *arguments], check=True)


@each_qemu
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_qemu_starts_on_the_overlay(qemu: Qemu, spelling: str, tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "base, one.raw", tmp_path / "disk,1.qcow2"
    overlay = tmp_path / "new,1.qcow2"
    create(qemu, "-f", "raw", raw, "4M")
    create(qemu, "-f", "qcow2", "-b", raw, "-F", "raw", qcow2)
    names = {"raw": raw, "qcow2": qcow2, "flash": raw}
    is_json = spelling.endswith("json")
    plain = {key: str(path).replace(",", "," if is_json else ",,") for key, path in names.items()}
    if spelling in ("hda", "bare-word", "pflash"):
        plain = {key: path.name for key, path in names.items()}
    words = [word.format(**plain) for word in SPELLINGS[spelling]]
    used = [qcow2, raw] if any("{qcow2}" in word for word in SPELLINGS[spelling]) else [raw]
    create(qemu, "-f", "qcow2", "-b", used[0], "-F", used[0].suffix[1:], overlay)

    argv = ("qemu", *QUIET, *words)
    [before] = ask(qemu.system, argv, tmp_path, {"execute": "query-block"})
    process = Process(exe=str(qemu.system), argv=argv, cwd=str(tmp_path), uid=0, gid=0)
    line = read_command_line(
        process,
        Machine(type=MACHINE_TYPE, ram_bytes=1 << 25, process=process),
        [MovedDisk("vda", tuple(map(file_identity, used)), str(overlay))],
        identify=key_of,
    )
    plan = launch_of(process, line, start=Start.LOAD, token="0", identify=key_of)
    after, status, machine = ask(
        *(plan.executable, plan.argv, Path(plan.cwd)),
        *({"execute": "query-block"}, {"execute": "query-status"}, QUERY_MACHINE),
    )

    assert status["status"] == "inmigrate"
    assert machine == f"{MACHINE_TYPE}-machine"
    [old] = [device for device in before if "inserted" in device]
    [new] = [device for device in after if "inserted" in device]
    assert (new["device"], new.get("qdev")) == (old["device"], old.get("qdev"))
    assert new["inserted"]["drv"] == "qcow2"
    assert new["inserted"]["ro"] is False
    assert new["inserted"]["cache"] == old["inserted"]["cache"]
    assert new["inserted"]["detect_zeroes"] == old["inserted"]["detect_zeroes"]
    if not old["inserted"]["node-name"].startswith("#"):
        assert new["inserted"]["node-name"] == old["inserted"]["node-name"]
    image = new["inserted"]["image"]
    assert image["filename"] == str(overlay)
    assert image["backing-image"]["filename"] == str(used[0])


@each_qemu
def test_all_options_without_a_value_are_known(qemu: Qemu) -> None:
    """`-help` names the options; QEMU itself then says which of them want a value."""
    text = subprocess.run([qemu.system, "-help"], capture_output=True, text=True, check=True)
    first_words = (line.split()[0] for line in text.stdout.splitlines() if line.startswith("-"))
    names = {name.lstrip("-") for word in first_words for name in word.split("/")}
    assert {"S", "m", "hda", "hdb", "blockdev", "preconfig"} <= names
    assert {name for name in names if not wants_value(qemu, name)} == names & WITHOUT_VALUE


def wants_value(qemu: Qemu, name: str) -> bool:
    # All options are looked up before any is obeyed, and -version ends QEMU when it is.
    ended = subprocess.run(
        [qemu.system, "-version", f"-{name}"], capture_output=True, text=True, check=False
    )
    return "requires an argument" in ended.stderr
