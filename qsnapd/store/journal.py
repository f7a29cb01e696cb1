"""Intent on disk: the one job that is changing a VM, so that another process can end it.

The invariant: while a job may have changed anything, its entry is durable.
"""

from pathlib import Path

from qsnapd.errors import StoreError
from qsnapd.model.plan import JournalEntry
from qsnapd.store.record import Record


class Journal:
    """The entry of one VM. Synchronous: callers outside the event loop's thread."""

    def __init__(self, path: Path) -> None:
        about = "the journal of an unfinished job"
        self._record = Record(path, JournalEntry, kind="the journal", about=about)

    def write(self, entry: JournalEntry) -> None:
        """Make *entry* the VM's entry, durable on return; on failure the old one stands.

        Raises: StoreError: it cannot be written, or another job's entry is still there.
        """
        standing = self.read()
        if standing is not None and standing.plan.token != entry.plan.token:
            raise StoreError(
                f"{self._record.path} tells of an unfinished job on {standing.plan.name}: it is "
                "finished or undone as soon as QEMU answers"
            )
        self._record.write(entry)

    def read(self) -> JournalEntry | None:
        """The entry, or None if no job is under way.

        Raises: ManifestInvalid: there is one that this version does not understand. StoreError.
        """
        return self._record.read()

    def clear(self) -> None:
        """The job is over; durable on return. Raises: StoreError."""
        self._record.clear()
