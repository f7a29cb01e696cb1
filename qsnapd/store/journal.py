"""Intent on disk: the one job that is changing a VM, so that another process can end it.

The invariant: while a job may have changed anything, its entry is durable.
"""

from pathlib import Path

from pydantic import ValidationError

from qsnapd.errors import ManifestInvalid, StoreError
from qsnapd.image.files import replace_file, sync_directory
from qsnapd.model.plan import JournalEntry


class Journal:
    """The entry of one VM. Synchronous: callers outside the event loop's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, entry: JournalEntry) -> None:
        """Make *entry* the VM's entry, durable on return; on failure the old one stands.

        Raises: StoreError: it cannot be written, or another job's entry is still there.
        """
        standing = self.read()
        if standing is not None and standing.plan.token != entry.plan.token:
            raise StoreError(
                f"{self._path} tells of an unfinished job on {standing.plan.name}: it is finished "
                "or undone as soon as QEMU answers"
            )
        try:
            replace_file(self._path, entry.model_dump_json(indent=1))
        except OSError as exc:
            raise StoreError(f"cannot write the journal {self._path}: {exc.strerror}") from exc

    def read(self) -> JournalEntry | None:
        """The entry, or None if no job is under way.

        Raises: ManifestInvalid: there is one that this version does not understand.
        """
        try:
            return JournalEntry.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StoreError(f"cannot read the journal {self._path}: {exc.strerror}") from exc
        except ValidationError as exc:
            raise ManifestInvalid(
                f"{self._path}: the journal of an unfinished job is not understood "
                f"({exc.errors()[0]['msg']}); it was written by another version of qsnapd"
            ) from exc

    def clear(self) -> None:
        """The job is over; durable on return."""
        try:
            self._path.unlink(missing_ok=True)
            sync_directory(self._path.parent)
        except OSError as exc:
            raise StoreError(f"cannot clear the journal {self._path}: {exc.strerror}") from exc
