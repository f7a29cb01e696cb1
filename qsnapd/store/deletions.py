"""The deletion that is under way, on disk: whoever finds it finishes it."""

from pathlib import Path

from pydantic import ValidationError

from qsnapd.errors import ManifestInvalid, StoreError
from qsnapd.image.files import replace_file, sync_directory
from qsnapd.model.deletion import DeletePlan

DELETION_NAME = ".deleting.json"


class DeletionJournal:
    """Of one VM. Synchronous: callers outside the event loop's thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, plan: DeletePlan) -> None:
        """Make *plan* what stands there, durable on return; on failure the old one stands.

        Raises: StoreError: it cannot be written, or tells of another deletion.
        """
        standing = self.read()
        if standing is not None and standing.token != plan.token:
            raise StoreError(
                f"{self._path} tells of an unfinished deletion of {standing.name}: it is finished "
                "first"
            )
        try:
            replace_file(self._path, plan.model_dump_json(indent=1))
        except OSError as exc:
            raise StoreError(f"cannot write the journal {self._path}: {exc.strerror}") from exc

    def read(self) -> DeletePlan | None:
        """The plan, or None if nothing is being deleted.

        Raises: ManifestInvalid: there is one that this version does not understand. StoreError.
        """
        try:
            return DeletePlan.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StoreError(f"cannot read the journal {self._path}: {exc.strerror}") from exc
        except ValidationError as exc:
            raise ManifestInvalid(
                f"{self._path}: the journal of an unfinished deletion is not understood "
                f"({exc.errors()[0]['msg']}); it was written by another version of qsnapd"
            ) from exc

    def clear(self) -> None:
        """The deletion is over; durable on return. Raises: StoreError."""
        try:
            self._path.unlink(missing_ok=True)
            sync_directory(self._path.parent)
        except OSError as exc:
            raise StoreError(f"cannot clear the journal {self._path}: {exc.strerror}") from exc

    def written_ns(self) -> int:
        """When it was last written; 0 if it is not there."""
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return 0
