"""A QEMU that went into the background is recognised, and can be started again."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.model.snapshot import Machine, Process
from qsnapd.vm.identity import (
    ProcessIdentity,
    key_of,
    open_pidfd,
    peer_of,
    read_process,
    resolve_image_path,
    wait_exit,
)
from qsnapd.vm.launch import MovedDisk, plan_launch
from tests.parts import Qemu, qemu_versions

each_qemu = pytest.mark.parametrize("qemu", qemu_versions(), ids=str)

LIMIT_S = 30.0


def start(executable: Path | str, argv: tuple[str, ...], cwd: Path | str) -> None:
    """Return once QEMU has gone into the background: its monitor listens then."""
    subprocess.run(
        argv, executable=executable, cwd=cwd, stdin=subprocess.DEVNULL, timeout=LIMIT_S, check=True
    )


@contextmanager
def connected(address: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(str(address))
        assert b"QMP" in sock.recv(4096)
        yield sock


async def end(identity: ProcessIdentity) -> None:
    pidfd = open_pidfd(identity)
    try:
        os.kill(identity.pid, signal.SIGKILL)
        with trio.fail_after(LIMIT_S):
            await wait_exit(pidfd)
    finally:
        os.close(pidfd)


@each_qemu
async def test_a_daemonized_qemu_with_relative_names_starts_again(
    qemu: Qemu, tmp_path: Path
) -> None:
    image, overlay, address = (tmp_path / name for name in ("d.raw", "new.qcow2", "qmp"))
    create = [qemu.img, "create", "-q"]
    await trio.run_process([*create, "-f", "raw", image, "4M"])
    await trio.run_process([*create, "-f", "qcow2", "-b", image, "-F", "raw", overlay])
    words = "-nodefaults -display none -accel tcg -daemonize -pidfile pid -qmp unix:qmp,server=on"
    argv = (str(qemu.system), *words.split(), "-drive", "file=d.raw,format=raw,if=virtio")
    start(qemu.system, argv, tmp_path)
    with connected(address) as sock:
        old = peer_of(sock)
    try:
        assert old.pid == int((tmp_path / "pid").read_text())
        process = read_process(old)
        found = resolve_image_path(old.pid, "d.raw")
    finally:
        await end(old)
    assert found is not None
    assert (process.argv, process.cwd) == (argv, "/")
    assert found.path == str(image)

    machine = Machine(type="pc-i440fx-7.2", ram_bytes=1 << 27, process=process)
    disk = MovedDisk("vda", (found,), str(overlay))
    plan = plan_launch(process, machine, [disk], identify=key_of)
    start(plan.executable, plan.argv, plan.cwd)
    with connected(address) as sock:
        new = peer_of(sock)
    try:
        again: Process = read_process(new)
        assert (new.pid, again.argv) == (int((tmp_path / "pid").read_text()), plan.argv)
        assert resolve_image_path(new.pid, str(overlay)) is not None
        # And once more, from a command line that is our own already.
        twice = plan_launch(again, machine, [disk], identify=key_of)
        assert twice.argv == plan.argv
    finally:
        await end(new)
