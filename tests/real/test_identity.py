"""A QEMU that went into the background is recognised, and can be started again."""

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qsnapd.model.snapshot import Machine
from qsnapd.vm.identity import (
    ProcessIdentity,
    key_of,
    open_pidfd,
    peer_of,
    read_process,
    resolve_image_path,
    wait_exit,
)
from qsnapd.vm.launch import MovedDisk, Start, launch_of, read_command_line
from tests.parts import Qemu, qemu_versions

each_qemu = pytest.mark.parametrize("qemu", qemu_versions(), ids=str)

LIMIT_S = 30.0


@asynccontextmanager
async def running(
    executable: Path | str, argv: tuple[str, ...], cwd: Path, *, pwd: str
) -> AsyncIterator[ProcessIdentity]:
    """Start a QEMU that goes into the background; when the block ends it has been killed.

    Yields who answers at its monitor, which is the socket "qmp" in *cwd*.
    """
    with trio.fail_after(LIMIT_S):
        await trio.run_process(argv, executable=executable, cwd=cwd, env={**os.environ, "PWD": pwd})
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(str(cwd / "qmp"))
        assert b"QMP" in sock.recv(4096)
        identity = peer_of(sock)
    assert identity.pid == int((cwd / "pid").read_text())
    pidfd = open_pidfd(identity)
    try:
        yield identity
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with trio.fail_after(LIMIT_S, shield=True):
            await wait_exit(pidfd)
        os.close(pidfd)


@each_qemu
async def test_a_daemonized_qemu_with_relative_names_starts_again(
    qemu: Qemu, tmp_path: Path
) -> None:
    image, overlay = tmp_path / "d.raw", tmp_path / "new.qcow2"
    create: list[str | Path] = [qemu.img, "create", "-q"]
    await trio.run_process([*create, "-f", "raw", image, "4M"])
    await trio.run_process([*create, "-f", "qcow2", "-b", image, "-F", "raw", overlay])
    words = "-nodefaults -display none -accel tcg -daemonize -pidfile pid"
    monitor = ("-qmp", "unix:qmp,server=on,wait=off")
    argv = (str(qemu.system), *words.split(), *monitor, "-drive", "file=d.raw,format=raw,if=virtio")
    async with running(qemu.system, argv, tmp_path, pwd="/nowhere") as identity:
        process = read_process(identity)
        found = resolve_image_path(identity.pid, "d.raw")
    assert found is not None
    assert (process.argv, process.cwd) == (argv, "/")
    assert found.path == str(image)

    machine = Machine(type="pc-i440fx-7.2", ram_bytes=1 << 27, process=process)
    disk = MovedDisk("vda", (found,), str(overlay))
    line = read_command_line(process, machine, [disk], identify=key_of)
    plan = launch_of(process, line, start=Start.LOAD, token="0", identify=key_of)
    assert plan.cwd == str(tmp_path)
    async with running(plan.executable, plan.argv, tmp_path, pwd=plan.cwd) as identity:
        again = read_process(identity)
        assert (again.argv, again.cwd) == (plan.argv, str(tmp_path))
        now = resolve_image_path(identity.pid, str(overlay))
    assert now is not None
    # And once more, from a command line that is our own already.
    disk = MovedDisk("vda", (now, found), str(overlay))
    assert read_command_line(again, machine, [disk], identify=key_of) == line
