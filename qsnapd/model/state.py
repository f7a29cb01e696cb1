"""A VM's state and the reason for it, with libvirt's numbers, names and texts.

The pairs are those of virDomainState and virDomain*Reason; `virsh domstate --reason`
prints the texts.
"""

from enum import Enum, IntEnum


class State(IntEnum):
    """virDomainState."""

    NOSTATE = 0
    RUNNING = 1
    BLOCKED = 2
    PAUSED = 3
    SHUTDOWN = 4
    SHUTOFF = 5
    CRASHED = 6
    PMSUSPENDED = 7

    @property
    def text(self) -> str:
        """What virsh prints: "shut off" where the name is "shutoff"."""
        return _STATE_TEXTS.get(self, self.name.lower())


_STATE_TEXTS = {
    State.NOSTATE: "no state",
    State.BLOCKED: "idle",
    State.SHUTDOWN: "in shutdown",
    State.SHUTOFF: "shut off",
}


class Condition(Enum):
    """A state together with the reason for it: (state, reason number, reason text)."""

    NOSTATE_UNKNOWN = (State.NOSTATE, 0, "unknown")
    RUNNING_UNKNOWN = (State.RUNNING, 0, "unknown")
    RUNNING_BOOTED = (State.RUNNING, 1, "booted")
    RUNNING_MIGRATED = (State.RUNNING, 2, "migrated")
    RUNNING_RESTORED = (State.RUNNING, 3, "restored")
    RUNNING_FROM_SNAPSHOT = (State.RUNNING, 4, "from snapshot")
    RUNNING_UNPAUSED = (State.RUNNING, 5, "unpaused")
    RUNNING_MIGRATION_CANCELED = (State.RUNNING, 6, "migration canceled")
    RUNNING_SAVE_CANCELED = (State.RUNNING, 7, "save canceled")
    RUNNING_WAKEUP = (State.RUNNING, 8, "event wakeup")
    RUNNING_CRASHED = (State.RUNNING, 9, "crashed")
    PAUSED_UNKNOWN = (State.PAUSED, 0, "unknown")
    PAUSED_USER = (State.PAUSED, 1, "user")
    PAUSED_MIGRATION = (State.PAUSED, 2, "migrating")
    PAUSED_SAVE = (State.PAUSED, 3, "saving")
    PAUSED_DUMP = (State.PAUSED, 4, "dumping")
    PAUSED_IOERROR = (State.PAUSED, 5, "I/O error")
    PAUSED_WATCHDOG = (State.PAUSED, 6, "watchdog")
    PAUSED_FROM_SNAPSHOT = (State.PAUSED, 7, "from snapshot")
    PAUSED_SHUTTING_DOWN = (State.PAUSED, 8, "shutting down")
    PAUSED_SNAPSHOT = (State.PAUSED, 9, "creating snapshot")
    PAUSED_CRASHED = (State.PAUSED, 10, "crashed")
    PAUSED_STARTING_UP = (State.PAUSED, 11, "starting up")
    PAUSED_API_ERROR = (State.PAUSED, 14, "api error")
    SHUTDOWN_UNKNOWN = (State.SHUTDOWN, 0, "unknown")
    SHUTDOWN_USER = (State.SHUTDOWN, 1, "user")
    SHUTOFF_UNKNOWN = (State.SHUTOFF, 0, "unknown")
    SHUTOFF_SHUTDOWN = (State.SHUTOFF, 1, "shutdown")
    SHUTOFF_DESTROYED = (State.SHUTOFF, 2, "destroyed")
    SHUTOFF_CRASHED = (State.SHUTOFF, 3, "crashed")
    SHUTOFF_FAILED = (State.SHUTOFF, 6, "failed")
    SHUTOFF_FROM_SNAPSHOT = (State.SHUTOFF, 7, "from snapshot")
    SHUTOFF_DAEMON = (State.SHUTOFF, 8, "daemon")
    CRASHED_UNKNOWN = (State.CRASHED, 0, "unknown")
    CRASHED_PANICKED = (State.CRASHED, 1, "panicked")
    PMSUSPENDED_UNKNOWN = (State.PMSUSPENDED, 0, "unknown")

    @property
    def state(self) -> State:
        return self.value[0]

    @property
    def reason_number(self) -> int:
        """The value of virDomain*Reason, unique within its state only."""
        return self.value[1]

    @property
    def reason_text(self) -> str:
        return self.value[2]

    @property
    def text(self) -> str:
        """As `virsh domstate --reason` prints it, e.g. "paused (creating snapshot)"."""
        return f"{self.state.text} ({self.reason_text})"
