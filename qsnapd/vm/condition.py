"""How a VM's state and reason follow QEMU's events: a table, without I/O.

libvirt's rule: state changes on the *event*, never on the reply to a command. Whoever is
about to stop the guest leaves a pending condition, and the STOP event takes it up.
"""

from qsnapd.model.state import Condition, State
from qsnapd.qmp.transport import QmpEvent

_BY_STATUS = {
    "running": Condition.RUNNING_UNKNOWN,
    "paused": Condition.PAUSED_UNKNOWN,
    "prelaunch": Condition.PAUSED_STARTING_UP,
    "inmigrate": Condition.PAUSED_MIGRATION,
    "finish-migrate": Condition.PAUSED_MIGRATION,
    "postmigrate": Condition.PAUSED_MIGRATION,
    "io-error": Condition.PAUSED_IOERROR,
    "watchdog": Condition.PAUSED_WATCHDOG,
    "save-vm": Condition.PAUSED_SAVE,
    "restore-vm": Condition.PAUSED_FROM_SNAPSHOT,
    "guest-panicked": Condition.CRASHED_PANICKED,
    "shutdown": Condition.SHUTDOWN_UNKNOWN,
    "suspended": Condition.PMSUSPENDED_UNKNOWN,
}

# Events that say why QEMU is about to stop the guest; the STOP event follows them.
_STOP_REASONS = {
    ("BLOCK_IO_ERROR", "stop"): Condition.PAUSED_IOERROR,
    ("WATCHDOG", "pause"): Condition.PAUSED_WATCHDOG,
}


def from_status(status: str, remembered: Condition | None) -> Condition:
    """What QEMU's run state means; a remembered condition of the same state knows more."""
    asked = _BY_STATUS.get(status, Condition.PAUSED_UNKNOWN)
    if remembered is not None and remembered.state is asked.state:
        return remembered
    return asked


def pending_after(pending: Condition | None, event: QmpEvent) -> Condition | None:
    """The reason that the next STOP will take up, given what QEMU just announced."""
    return _STOP_REASONS.get((event.name, str(event.data.get("action"))), pending)


def after_event(
    now: Condition, event: QmpEvent, *, pausing: Condition | None, running: Condition | None
) -> Condition:
    """The condition after *event*; `pausing` and `running` are the pending reasons."""
    match event.name:
        case "STOP" if now.state in (State.RUNNING, State.NOSTATE):
            return pausing or Condition.PAUSED_UNKNOWN
        case "RESUME" if now.state is not State.RUNNING:
            return running or Condition.RUNNING_UNPAUSED
        case "GUEST_PANICKED" if event.data.get("action") == "pause":
            return Condition.CRASHED_PANICKED
        case "SHUTDOWN":
            return Condition.SHUTDOWN_USER
        case "SUSPEND" | "SUSPEND_DISK":
            return Condition.PMSUSPENDED_UNKNOWN
        case "WAKEUP":
            return Condition.RUNNING_WAKEUP
        case "RESET" if now.state is State.CRASHED:
            return Condition.PAUSED_UNKNOWN
    return now


def after_exit(now: Condition) -> Condition:
    """The condition once the QEMU process has ended."""
    match now.state:
        case State.SHUTOFF:
            return now
        case State.SHUTDOWN:
            return Condition.SHUTOFF_SHUTDOWN
    return Condition.SHUTOFF_CRASHED


_SUSPENDED_DETAILS = {
    Condition.PAUSED_MIGRATION: "Migrated",
    Condition.PAUSED_IOERROR: "I/O Error",
    Condition.PAUSED_WATCHDOG: "Watchdog",
    Condition.PAUSED_FROM_SNAPSHOT: "Snapshot",
    Condition.PAUSED_API_ERROR: "API error",
}
_STOPPED_DETAILS = {
    Condition.SHUTOFF_SHUTDOWN: "Shutdown",
    Condition.SHUTOFF_DESTROYED: "Destroyed",
    Condition.SHUTOFF_FAILED: "Failed",
    Condition.SHUTOFF_FROM_SNAPSHOT: "Snapshot",
}


def lifecycle_event(old: Condition, new: Condition) -> tuple[str, str] | None:
    """virsh's texts for the lifecycle event of this change; None if it has none."""
    if old.state in (new.state, State.NOSTATE):
        return None  # nothing changed, or we only now learn what is
    match new.state:
        case State.RUNNING if old.state in (State.PAUSED, State.PMSUSPENDED, State.CRASHED):
            from_snapshot = new is Condition.RUNNING_FROM_SNAPSHOT
            return "Resumed", "Snapshot" if from_snapshot else "Unpaused"
        case State.RUNNING:
            from_snapshot = new is Condition.RUNNING_FROM_SNAPSHOT
            return "Started", "Snapshot" if from_snapshot else "Booted"
        case State.PAUSED if old.state is State.RUNNING:
            return "Suspended", _SUSPENDED_DETAILS.get(new, "Paused")
        case State.PAUSED:
            return "Started", "Snapshot" if new is Condition.PAUSED_FROM_SNAPSHOT else "Booted"
        case State.SHUTDOWN:
            return "Shutdown", "Finished"
        case State.SHUTOFF:
            return "Stopped", _STOPPED_DETAILS.get(new, "Crashed")
        case State.CRASHED:
            return "Crashed", "Panicked"
        case State.PMSUSPENDED:
            return "PMSuspended", "Memory"
    return None
