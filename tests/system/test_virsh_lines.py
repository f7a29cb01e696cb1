"""Scripts written for virsh run with the name replaced."""

import re
import signal
import subprocess
from pathlib import Path

from tests.harness import Disk, Vm, open_vm
from tests.parts import Qemu
from tests.real.cases import LAZY, each_qemu
from tests.system.processes import Daemon, open_daemon
from tests.system.virsh_lines import HEARD, LINES, NOT_HEARD
from tests.system.virsh_session import Session

DISKS = (Disk("qcow2", "virtio", "-blockdev"), Disk("raw", "virtio", "-drive"))
UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
END_LIMIT_S = 20.0


def test_there_are_enough_lines() -> None:
    assert len({line.words for line in LINES}) >= 120


@each_qemu
async def test_every_line(qemu: Qemu, tmp_path: Path) -> None:
    never_started = Vm(tmp_path / "vm2", LAZY, (), ())
    async with (
        open_vm(
            qemu, LAZY, disks=DISKS, memory_mib=64, extra=["-uuid", UUID], log_monitor=True
        ) as vm,
        open_daemon(tmp_path, {"vm1": vm, "vm2": never_started}, qemu.img) as daemon,
    ):
        await daemon.wait_attached("vm1")
        targets = tmp_path / "targets"
        targets.mkdir()
        places = {
            "pid": str(vm.pid),
            "uuid": UUID,
            "dir": str(targets),
            "file": str(targets / "file.xml"),
            "base": str(vm.disks[0]),
            "qemu_img": str(qemu.img),
        }
        session = Session(daemon.control, vm.monitor_log, places)
        heard = run_and_listen(daemon, session, tmp_path / "heard")
    assert not session.wrong, "\n".join(["", *session.wrong])
    for wanted in HEARD:
        assert any(re.fullmatch(wanted, line) for line in heard), f"not heard: {wanted}"
    unwanted = [line for line in heard if any(re.fullmatch(words, line) for words in NOT_HEARD)]
    assert unwanted == []
    assert heard[-2:] == ["event loop interrupted", f"events received: {len(heard) - 2}"]


def run_and_listen(daemon: Daemon, session: Session, heard: Path) -> list[str]:
    """Run all lines; returns what `event` has printed meanwhile.

    Not async, as verbs want the main thread: Ctrl-C aborts their jobs.
    """
    with heard.open("wb") as file:
        listener = subprocess.Popen(daemon.command("event --all --loop"), stdout=file)
    try:
        while not heard.stat().st_size:  # it takes a moment until it listens
            assert listener.poll() is None
            session.call("suspend vm1")
            session.call("resume vm1")
        session.run(LINES)
        listener.send_signal(signal.SIGINT)
        listener.wait(END_LIMIT_S)
    finally:
        listener.kill()
        listener.wait()
    return heard.read_text().splitlines()
