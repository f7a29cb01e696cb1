"""Starting a QEMU as a process of its own, which outlives the daemon."""

import os
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import trio

from qsnapd.errors import VmError
from qsnapd.image.files import allow_owner
from qsnapd.model.plan import Launch
from qsnapd.vm.attached import AttachedVm

LOG_TAIL_BYTES = 2000
PATIENCE_S = 60.0


class Spawn:
    """The launcher for a host where nobody else looks after QEMUs.

    The process is the daemon's child in a session of its own. Under systemd it stays in the
    cgroup of the daemon's service, which must therefore have `KillMode=process`.
    """

    inherits_descriptors = False

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s

    async def prepare(self, launch: Launch, *, lasting: bool = False) -> None:
        """Nobody but us starts this VM: there is nothing to arrange."""

    async def abandon(self) -> None:
        """Nothing was arranged."""

    async def keep_off(self) -> None:
        """Nobody starts it unasked."""

    async def start(self, launch: Launch, log: Path) -> "Spawned":
        """Start QEMU with what it complains of in *log*.

        Cancellation: the process may have been started; it is left alone.
        Raises: VmError: the program cannot be started.
        """
        process = await trio.to_thread.run_sync(spawn, launch, log)
        return Spawned(process, log, self._patience_s)

    async def follow(self, vm: AttachedVm) -> None:
        """Nobody but us starts this VM."""

    def instruction(self, launch: Launch) -> str | None:
        """Nobody has to do anything."""
        return None


@dataclass(frozen=True)
class Spawned:
    """A process on its way; with `-daemonize` it ends as soon as QEMU is up."""

    process: "subprocess.Popen[bytes]"
    log: Path
    patience_s: float

    def failed(self) -> str | None:
        """Why it ended badly, in QEMU's words; None while it runs or if it ended well."""
        if self.process.poll() in (None, 0):
            return None
        try:
            words = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            words = ""
        return words or f"exit status {self.process.returncode}"

    def kill(self) -> None:
        """End it, unless it has ended or has gone on as another process (`-daemonize`)."""
        if self.process.poll() is None:
            self.process.kill()


def spawn(launch: Launch, log: Path) -> "subprocess.Popen[bytes]":
    """Start QEMU as who it ran as, detached: own session, no descriptor of ours. Blocks.

    What it complains of goes to *log*, the end of which `Spawned.failed` quotes.
    Raises: VmError: the program cannot be started.
    """
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        allow_owner(descriptor)
    except OSError as exc:
        raise VmError(f"cannot write {log}: {exc.strerror}") from exc
    privileged = os.geteuid() == 0
    try:
        child = subprocess.Popen(
            launch.argv,
            executable=launch.executable,
            cwd=launch.cwd,
            # PWD: `-daemonize` leaves "/" as the only trace of where it was started
            env={**dict(launch.environment), "PWD": launch.cwd},
            user=launch.uid if privileged else None,
            group=launch.gid if privileged else None,
            extra_groups=launch.groups if privileged else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # with -nographic the guest's console: without end
            stderr=descriptor,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise VmError(f"cannot start {launch.executable}: {exc}") from exc
    finally:
        os.close(descriptor)
    # Somebody must reap it; a daemon thread does not keep the interpreter from ending.
    threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
    return child
