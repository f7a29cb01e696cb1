"""Whether a QEMU process still runs, and ending it."""

import logging
import os
import signal

import trio

from qsnapd.errors import Effect, SessionLost, VmError
from qsnapd.threads import in_thread
from qsnapd.vm.identity import ProcessIdentity, identify, open_pidfd, wait_exit
from qsnapd.vm.proc import find_launched

QUIT_LIMIT_S = 10.0
KILL_LIMIT_S = 10.0

_log = logging.getLogger(__name__)


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


async def end_launched(token: str) -> None:
    """Kill every process that was started by the plan with this *token*, be it a moment ago.

    For a plan whose guest has not run: nothing is lost with it.
    """
    while (pid := await in_thread(find_launched, token)) is not None:
        try:
            identity = identify(pid)
        except SessionLost:
            continue
        kill(identity)
        await wait_gone(identity)
