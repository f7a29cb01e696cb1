"""One model in one file of the store, or none: replaced whole, and refused if not understood."""

from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from qsnapd.errors import Effect, ManifestInvalid, StoreError
from qsnapd.image.files import NotLasting, replace_file, sync_directory
from qsnapd.model.base import Frozen

ModelT = TypeVar("ModelT", bound=Frozen)


class Record(Generic[ModelT]):
    """Synchronous: callers outside the event loop's thread."""

    def __init__(
        self,
        path: Path,
        model: type[ModelT],
        *,
        kind: str = "",
        about: str = "",
        remedy: str = "; it was written by another version of qsnapd",
    ) -> None:
        """*kind*, *about*: how errors call it, before and behind its path; *remedy*: what to do."""
        self.path = path
        self._model = model
        self._called = f"{kind} {path}".strip()
        self._about = about and f": {about}"
        self._remedy = remedy

    def read(self) -> ModelT | None:
        """What stands there, or None.

        Raises: ManifestInvalid: another version of qsnapd wrote it. StoreError.
        """
        try:
            return self._model.model_validate_json(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise StoreError(f"cannot read {self._called}: {exc.strerror}") from exc
        except ValidationError as exc:
            raise ManifestInvalid(
                f"{self.path}{self._about} is not understood ({exc.errors()[0]['msg']})"
                f"{self._remedy}"
            ) from exc

    def write(self, content: ModelT) -> None:
        """Make *content* what stands there, durable on return; on failure the old one stands.

        Raises: StoreError: with effect UNKNOWN, the new one stands, if no power failure comes.
        """
        try:
            replace_file(self.path, content.model_dump_json(indent=1))
        except NotLasting as exc:
            raise StoreError(
                f"cannot write {self._called} for good: {exc.strerror}", effect=Effect.UNKNOWN
            ) from exc
        except OSError as exc:
            raise StoreError(f"cannot write {self._called}: {exc.strerror}") from exc

    def clear(self) -> None:
        """Nothing stands there any more; durable on return, idempotent. Raises: StoreError."""
        try:
            self.path.unlink(missing_ok=True)
            sync_directory(self.path.parent)
        except OSError as exc:
            raise StoreError(f"cannot clear {self._called}: {exc.strerror}") from exc
