"""Starting a QEMU that outlives the daemon, and ending one."""

import logging
import os
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import trio

from qsnapd.errors import Effect, SessionLost, VmError
from qsnapd.model.snapshot import Process
from qsnapd.vm.identity import ProcessIdentity, identify, open_pidfd, wait_exit

QUIT_LIMIT_S = 10.0
KILL_LIMIT_S = 10.0
LOG_TAIL_BYTES = 2000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """A process on its way; with `-daemonize` it ends as soon as QEMU is up."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def kill(self) -> None:
        """End it, unless it has ended or has gone on as another process (`-daemonize`)."""
        if self.process.poll() is None:
            self.process.kill()

    def failed(self) -> str | None:
        """Why it ended badly, in QEMU's words; None while it runs or if it ended well."""
        if self.process.poll() in (None, 0):
            return None
        try:
            words = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            words = ""
        return words or f"exit status {self.process.returncode}"


def start(
    process: Process, executable: str, argv: tuple[str, ...], cwd: str, log: Path
) -> Started:
    """Start QEMU as who it ran as, detached: own session, no descriptor of ours. Blocks.

    What it complains of goes to *log*, the end of which `Started.failed` quotes.
    Raises: VmError: the program cannot be started.
    """
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise VmError(f"cannot write {log}: {exc.strerror}") from exc
    privileged = os.geteuid() == 0
    try:
        child = subprocess.Popen(
            argv,
            executable=executable,
            cwd=cwd,
            # PWD: `-daemonize` leaves "/" as the only trace of where it was started
            env={**dict(process.environment), "PWD": cwd},
            user=process.uid if privileged else None,
            group=process.gid if privileged else None,
            extra_groups=process.groups if privileged else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # with -nographic the guest's console: without end
            stderr=descriptor,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise VmError(f"cannot start {executable}: {exc}") from exc
    finally:
        os.close(descriptor)
    # Somebody must reap it; a daemon thread does not keep the interpreter from ending.
    threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
    return Started(child, log)


async def wait_gone(identity: ProcessIdentity) -> None:
    """Wait until that very process has ended; at once if it has."""
    try:
        descriptor = open_pidfd(identity)
    except SessionLost:
        return
    try:
        await wait_exit(descriptor)
    finally:
        os.close(descriptor)


def still_runs(pid: int, start_time_ticks: int) -> bool:
    """Whether the process that had *pid* then still has it."""
    try:
        return identify(pid).start_time_ticks == start_time_ticks
    except SessionLost:
        return False


async def wait_ended(identity: ProcessIdentity) -> None:
    """Wait until a QEMU that was told to quit has ended; kill it if it does not.

    Raises: VmError: it survives even that.
    """
    with trio.move_on_after(QUIT_LIMIT_S):
        await wait_gone(identity)
        return
    _log.warning("QEMU %d did not quit in %g s: killing it", identity.pid, QUIT_LIMIT_S)
    kill(identity)
    with trio.move_on_after(KILL_LIMIT_S):
        await wait_gone(identity)
        return
    raise VmError(f"QEMU, pid {identity.pid}, does not end", effect=Effect.UNKNOWN)


def kill(identity: ProcessIdentity) -> None:
    """SIGKILL to that very process; nothing if it has ended already."""
    try:
        descriptor = open_pidfd(identity)
    except VmError:
        return
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)
