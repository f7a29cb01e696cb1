"""Every failure a user can meet: the class says why, `effect` says what is true now.

```
QsnapError
├── RequestError             the caller asked for something that cannot be
│   ├── BadRequest           the request itself is malformed
│   ├── ConfigError          the configuration file cannot be used
│   ├── UnknownVm  UnknownSnapshot  SnapshotExists  VmExists
│   ├── VmBusy               another job changes this VM
│   ├── WrongState           the VM's state forbids it
│   ├── Blocked              QEMU or a device refuses to be checkpointed
│   ├── TargetRefused        a file named in the request cannot be used
│   ├── SnapshotDiffers      what a snapshot needs is not what there is now
│   └── AccessDenied         the client's role does not allow it
├── VmError                  the VM's QEMU
│   ├── MonitorBusy          somebody else holds the QMP socket
│   ├── SessionLost  (NobodyListens)  ReplyTimeout  CommandRefused  UnexpectedReply
│   ├── CapabilityMissing    this QEMU or host cannot do it
│   ├── CaptureFailed        QEMU reported that saving memory failed
│   ├── HoldFailed           the storage's own snapshot was not taken while the guest was held
│   ├── AgentError           the agent in the guest
│   │   ├── AgentAbsent          none is configured, or none has opened its port
│   │   ├── AgentUnresponsive    it does not answer; nothing was asked of it
│   │   ├── AgentRefused         it said no
│   │   ├── AgentSilent          asked, and no answer in time
│   │   ├── FreezeFailed         the file systems could not be frozen, or not for that long
│   │   └── FreezeOutcomeUnknown asked to freeze, and no answer in time
│   ├── RescueFailed         QEMU has frozen its guest, and it could not be freed from outside
│   │   ├── RescueDenied         we may not trace that process
│   │   └── NothingToRescue      none of its memory is held
│   └── GuestLeftPaused      we paused the guest and could not resume it
├── JobCancelled             the operation was cancelled, and undone
├── JobStalled               it came no further, and was undone
├── StoreError               qsnapd's own files
│   ├── ManifestInvalid  ManifestTooNew  ImageInvalid
│   ├── DiskStalled          a file system does not answer
│   └── StoreFull  QuotaUsedUp
└── ControlError             the control socket: nobody answers, or nonsense
```

Anything else that is raised is a bug: it is not caught, and the daemon restarts.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import trio


class Effect(StrEnum):
    """What is now true of guest and store, whatever the cause of a failure was."""

    NONE = "none"
    """As if the request had not been made."""
    ROLLED_BACK = "rolled-back"
    """It began and was undone: guest, disks and files are as before."""
    PARTIAL = "partial"
    """Some of it stands; the message says which."""
    UNKNOWN = "unknown"
    """Sent to QEMU without an answer: query before doing anything else."""
    GUEST_PAUSED = "guest-paused"
    """The guest stands still and could not be resumed: somebody must act."""


class QsnapError(Exception):
    """Root of all foreseeable failures."""

    code: ClassVar[str] = "internal"
    """Stable identifier, sent over the control socket."""
    effect: Effect

    def __init__(self, message: str, *, effect: Effect = Effect.NONE) -> None:
        super().__init__(message)
        self.effect = effect

    def add(self, words: str) -> None:
        """Let it say *words* too, after what it says already."""
        self.args = (f"{self}. {words}",)


class RequestError(QsnapError):
    """The request cannot be fulfilled; nothing was touched."""

    code = "request"


class BadRequest(RequestError):
    code = "bad-request"


class ConfigError(RequestError):
    code = "config"


class UnknownVm(RequestError):
    code = "unknown-vm"


class UnknownSnapshot(RequestError):
    code = "unknown-snapshot"


class SnapshotExists(RequestError):
    code = "snapshot-exists"


class VmExists(RequestError):
    code = "vm-exists"


class VmBusy(RequestError):
    code = "vm-busy"


class WrongState(RequestError):
    code = "wrong-state"


class Blocked(RequestError):
    code = "blocked"


class TargetRefused(RequestError):
    code = "target-refused"


class SnapshotDiffers(RequestError):
    """Host, QEMU or files differ from when the snapshot was taken: it might not restore."""

    code = "snapshot-differs"
    differences: tuple[str, ...]
    """One sentence each."""
    can_be_forced: bool
    """Whether `force` goes on in spite of all of them."""

    def __init__(
        self, snapshot: str, differences: tuple[str, ...], *, can_be_forced: bool
    ) -> None:
        advice = (
            "--force goes on in spite of this; the restore may fail then"
            if can_be_forced
            else "--force cannot help, this must be put right first; nothing was touched"
        )
        lines = (f"snapshot {snapshot} was taken under other conditions:", *differences, advice)
        super().__init__("\n".join(lines))
        self.differences = differences
        self.can_be_forced = can_be_forced


class AccessDenied(RequestError):
    code = "access-denied"


class VmError(QsnapError):
    """The VM's QEMU failed, refused or vanished."""

    code = "vm"


class MonitorBusy(VmError):
    code = "monitor-busy"


class SessionLost(VmError):
    code = "session-lost"


class NobodyListens(SessionLost):
    """The QMP socket is not there, or no process serves it: this VM does not run."""

    code = "nobody-listens"


class ReplyTimeout(VmError):
    code = "reply-timeout"


class CommandRefused(VmError):
    """QEMU understood a command and said no (QMP specification, "Error" response)."""

    code = "command-refused"
    command: str
    error_class: str
    desc: str

    def __init__(
        self, command: str, error_class: str, desc: str, *, effect: Effect = Effect.NONE
    ) -> None:
        super().__init__(f"QEMU refused {command}: {desc}", effect=effect)
        self.command = command
        self.error_class = error_class
        self.desc = desc


class UnexpectedReply(VmError):
    code = "unexpected-reply"


class CapabilityMissing(VmError):
    code = "capability-missing"


class CaptureFailed(VmError):
    code = "capture-failed"


class HoldFailed(VmError):
    code = "hold-failed"


class AgentError(VmError):
    """The agent in the guest did not do what it was asked to."""

    code = "agent"


class AgentAbsent(AgentError):
    """No agent is configured, nobody serves its socket, or none has opened its port."""

    code = "agent-absent"


class AgentUnresponsive(AgentError):
    """The agent does not answer at all: nothing was asked of it."""

    code = "agent-unresponsive"


class AgentRefused(AgentError):
    """The agent understood a command and said no."""

    code = "agent-refused"


class AgentSilent(AgentError):
    """The agent was asked and did not answer in time: it may yet do it."""

    code = "agent-silent"


class FreezeFailed(AgentError):
    """The file systems of the guest could not be frozen, or would have been for too long."""

    code = "freeze-failed"


class FreezeOutcomeUnknown(AgentError):
    """The agent was asked to freeze and did not answer in time; it was told to thaw since."""

    code = "freeze-outcome-unknown"


class RescueFailed(VmError):
    """QEMU has left its guest's memory write-protected, and nobody else could free it."""

    code = "rescue-failed"


class RescueDenied(RescueFailed):
    """We have no right to trace that process."""

    code = "rescue-denied"


class NothingToRescue(RescueFailed):
    """None of its memory is write-protected: if it stands still, then for another reason."""

    code = "nothing-to-rescue"


class GuestLeftPaused(VmError):
    code = "guest-left-paused"


class JobCancelled(QsnapError):
    code = "job-cancelled"


class JobStalled(QsnapError):
    """The job came no further for so long that it was given up."""

    code = "job-stalled"


class StoreError(QsnapError):
    """qsnapd's own files cannot be read or written."""

    code = "store"


class ManifestInvalid(StoreError):
    code = "manifest-invalid"


class ManifestTooNew(StoreError):
    code = "manifest-too-new"


class ImageInvalid(StoreError):
    code = "image-invalid"


class DiskStalled(StoreError):
    """A file system does not answer: what was asked of it may yet be done."""

    code = "disk-stalled"

    def __init__(self, limit_s: float, over: "trio.Event") -> None:
        """*over* is set when it was done after all, or has failed."""
        super().__init__(
            f"a file system has not answered for {limit_s:g} s: qsnapd's own, or that of a disk or "
            "of a memory image. What was being done is finished or undone when it does",
            effect=Effect.UNKNOWN,
        )
        self.over = over


class StoreFull(StoreError):
    code = "store-full"
    needed_bytes: int
    free_bytes: int

    def __init__(self, where: str, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{where} has {free_bytes} bytes free, the snapshot needs {needed_bytes}: "
            "free some space or choose another target"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class QuotaUsedUp(StoreError):
    """The snapshots would occupy more than the configuration allows."""

    code = "quota-used-up"
    needed_bytes: int
    used_bytes: int
    quota_bytes: int

    def __init__(
        self, whose: str, *, needed_bytes: int, used_bytes: int, quota_bytes: int
    ) -> None:
        super().__init__(
            f"{whose} occupy {used_bytes} bytes, another one may need {needed_bytes}, and the "
            f"quota is {quota_bytes}: delete some, or allow more"
        )
        self.needed_bytes = needed_bytes
        self.used_bytes = used_bytes
        self.quota_bytes = quota_bytes


class ControlError(QsnapError):
    code = "control"
