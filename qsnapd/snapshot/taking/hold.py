"""Holding the guest while its storage takes a snapshot of disks that are left to it.

Two can say that it has: the hook of the configuration, by ending well, or a person, by
resuming the VM. If nobody does in time, the guest goes on and there is no snapshot.
"""

import os
import shlex
import signal
import subprocess
from contextlib import suppress

import trio

from qsnapd.errors import HoldFailed
from qsnapd.model.job import Phase
from qsnapd.model.plan import CheckpointPlan
from qsnapd.snapshot.taking.capture import Capture

WORDS_LIMIT_BYTES = 4096
"""Of what a hook complains of, the end is shown."""
WORDS_LIMIT_S = 1.0
"""After the end of a hook, for what it has said to be read."""
USUAL_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
END_LIMIT_S = 5.0


async def hold_for_storage(capture: Capture) -> None:
    """Return once the storage has taken its snapshot; at once if no disk is left to it.

    Preconditions: the guest stands still and QEMU has flushed its disks; the others moved.
    Cancellation: a hook is killed, with all that it has started in its session.
    Raises: HoldFailed: the hook failed, or nobody said in time that it was done. CaptureFailed:
      the guest was resumed meanwhile.
    """
    plan, job = capture.plan, capture.job
    if not plan.manual:
        return
    job.enter(Phase.HOLDING)
    try:
        with trio.fail_after(plan.hold_limit_s), job.patience.suspended():
            if plan.hook:
                await _run_hook(plan)
            else:
                job.instruction = f"qsnapctl resume {plan.vm}"
                await job.wait_told()
    except trio.TooSlowError:
        what = (
            f"the hook {plan.hook[0]} did not end"
            if plan.hook
            else f"nobody resumed the VM (qsnapctl resume {plan.vm}) to say that it was done"
        )
        raise HoldFailed(
            f"VM {plan.vm} was held for {plan.hold_limit_s:g} s for its storage to take a snapshot "
            f"of {_targets(plan)}, and {what} in that time"
        ) from None
    capture.require_held()
    job.enter(Phase.SAVING)


def _targets(plan: CheckpointPlan) -> str:
    return ", ".join(plan.manual)


async def _run_hook(plan: CheckpointPlan) -> None:
    disks = [f"{disk.target}={disk.frozen}" for disk in plan.left_out if disk.target in plan.manual]
    environment = {
        "PATH": os.environ.get("PATH", USUAL_PATH),
        "LANG": "C.UTF-8",
        "QSNAPD_VM": plan.vm,
        "QSNAPD_SNAPSHOT": plan.name,
        "QSNAPD_DISKS": shlex.join(disks),
    }
    try:
        process = await trio.lowlevel.open_process(
            list(plan.hook),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as exc:
        raise HoldFailed(f"the hook {plan.hook[0]} cannot be run: {exc.strerror}") from exc
    words = _Words()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(words.read, process)
            await process.wait()
            with trio.move_on_after(WORDS_LIMIT_S):
                await words.read_all.wait()
            # What it has started may keep the pipe open for ever.
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(END_LIMIT_S, shield=True):
            await _end(process)
    if process.returncode != 0:
        raise HoldFailed(
            f"the hook {plan.hook[0]} ended with status {process.returncode}, so the storage may "
            f"not have taken its snapshot of {_targets(plan)}. {words.text}".rstrip(" .")
        )


async def _end(process: trio.Process) -> None:
    """Kill a hook that still runs, and what it has started; nothing if it has ended."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    if process.stderr is not None:
        await process.stderr.aclose()


class _Words:
    """The end of what a hook says on stderr."""

    def __init__(self) -> None:
        self._end = b""
        self.read_all = trio.Event()

    async def read(self, process: trio.Process) -> None:
        assert process.stderr is not None
        async for chunk in process.stderr:
            self._end = (self._end + chunk)[-WORDS_LIMIT_BYTES:]
        self.read_all.set()

    @property
    def text(self) -> str:
        words = self._end.decode(errors="replace").strip()
        return f"It says: {words}" if words else "It says nothing"
