"""The deletion that is under way, on disk: whoever finds it finishes it."""

from pathlib import Path

from qsnapd.errors import StoreError
from qsnapd.model.deletion import DeletePlan
from qsnapd.store.record import Record

DELETION_NAME = ".deleting.json"


class DeletionJournal:
    """Of one VM. Synchronous: callers outside the event loop's thread."""

    def __init__(self, path: Path) -> None:
        about = "the journal of an unfinished deletion"
        self._record = Record(path, DeletePlan, kind="the journal", about=about)

    def write(self, plan: DeletePlan) -> None:
        """Make *plan* what stands there, durable on return; on failure the old one stands.

        Raises: StoreError: it cannot be written, or tells of another deletion.
        """
        standing = self.read()
        if standing is not None and standing.token != plan.token:
            raise StoreError(
                f"{self._record.path} tells of an unfinished deletion of {standing.name}: it is "
                "finished first"
            )
        self._record.write(plan)

    def read(self) -> DeletePlan | None:
        """The plan, or None if nothing is being deleted.

        Raises: ManifestInvalid: there is one that this version does not understand. StoreError.
        """
        return self._record.read()

    def clear(self) -> None:
        """The deletion is over; durable on return. Raises: StoreError."""
        self._record.clear()

    def written_ns(self) -> int:
        """When it was last written; 0 if it is not there."""
        try:
            return self._record.path.stat().st_mtime_ns
        except OSError:
            return 0
