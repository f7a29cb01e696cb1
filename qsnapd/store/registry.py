"""VMs that are not in the configuration: clones, in their own folders of the store.

STATE_DIR/VM/.vm.json           a `Registration`; its presence is the clone's existence
STATE_DIR/VM/.last-seen.json    how it last ran, so that it can be started again
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from qsnapd.errors import ManifestInvalid, StoreError
from qsnapd.image.files import remove_if_ours, replace_file
from qsnapd.model.base import Frozen
from qsnapd.model.registration import LastSeen, Registration
from qsnapd.model.snapshot import FileIdentity
from qsnapd.store.snapshots import VmStore

REGISTRATION_NAME = ".vm.json"
LAST_SEEN_NAME = ".last-seen.json"

ModelT = TypeVar("ModelT", bound=Frozen)


def read_registration(store: VmStore) -> Registration | None:
    """What is registered there, if anything is.

    Raises: ManifestInvalid: another version of qsnapd wrote it. StoreError.
    """
    return _read(store.directory / REGISTRATION_NAME, Registration)


def register(store: VmStore, registration: Registration) -> None:
    """From now on the VM exists, for the next daemon too; durable on return.

    On failure: it does not. Raises: StoreError.
    """
    _write(store.directory / REGISTRATION_NAME, registration)


def read_last_seen(store: VmStore) -> LastSeen | None:
    """How the clone last ran, as far as it was noted. Raises: as `read_registration`."""
    return _read(store.directory / LAST_SEEN_NAME, LastSeen)


def note_last_seen(store: VmStore, seen: LastSeen) -> None:
    """Note how the clone runs now, in place of what was noted before. Raises: StoreError."""
    if _read(store.directory / LAST_SEEN_NAME, LastSeen) != seen:
        _write(store.directory / LAST_SEEN_NAME, seen)


def _read(path: Path, model: type[ModelT]) -> ModelT | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StoreError(f"cannot read {path}: {exc.strerror}") from exc
    except ValidationError as exc:
        raise ManifestInvalid(
            f"{path} is not understood ({exc.errors()[0]['msg']}); it was written by another "
            "version of qsnapd"
        ) from exc


def _write(path: Path, content: Frozen) -> None:
    try:
        replace_file(path, content.model_dump_json(indent=1))
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc


def remove_made(
    registration: Registration, *, storage: bool, images: Iterable[FileIdentity] = ()
) -> tuple[str, ...]:
    """Remove the sockets and pipes that a clone has left, and all else only if *storage*.

    *images*: of its disks, those that qsnapd has made since.
    Idempotent. Returns the paths of what was removed; what was put in place of one stays.
    Raises: StoreError: something of it cannot be removed.
    """
    made = [file for file in registration.files if storage or _holds_nothing(file.path)]
    made += (*registration.overlays, *images) if storage else ()
    return tuple(
        file.path for file in made if remove_if_ours(Path(file.path), file.device, file.inode)
    )


def _holds_nothing(path: str) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return True
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)
