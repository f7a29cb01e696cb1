"""What the daemon tells those who watch: libvirt's lifecycle events and qsnapd's own."""

from enum import StrEnum

from pydantic import AwareDatetime

from qsnapd.model.base import Frozen
from qsnapd.model.job import JobInfo
from qsnapd.model.names import SnapshotName, VmName


class EventKind(StrEnum):
    LIFECYCLE = "lifecycle"
    SNAPSHOT = "snapshot"
    JOB = "job"


class Event(Frozen):
    """One thing that happened to a VM.

    `event` and `detail` of kind lifecycle are virsh's texts, e.g. "Suspended" and
    "Paused"; of kind snapshot the event is "created", "failed", "reverted", "cloned", "imported",
    "recovered", "deleted" or "redefined" and the detail a sentence; of kind job the event is
    the job's phase.
    """

    kind: EventKind
    vm: VmName
    at: AwareDatetime
    event: str
    detail: str = ""
    snapshot: SnapshotName | None = None
    job: JobInfo | None = None
    lost: int = 0
    """How many events this subscriber lost before this one, because it read too slowly."""
