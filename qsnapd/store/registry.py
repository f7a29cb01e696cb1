"""VMs that are not in the configuration: clones, in their own folders of the store.

STATE_DIR/VM/.vm.json           a `Registration`; its presence is the clone's existence
STATE_DIR/VM/.last-seen.json    how it last ran, so that it can be started again
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from qsnapd.image.files import remove_if_ours, sync_removals
from qsnapd.model.registration import LastSeen, Registration
from qsnapd.model.snapshot import FileIdentity
from qsnapd.store.record import Record
from qsnapd.store.snapshots import VmStore

REGISTRATION_NAME = ".vm.json"
LAST_SEEN_NAME = ".last-seen.json"


def read_registration(store: VmStore) -> Registration | None:
    """What is registered there, if anything is.

    Raises: ManifestInvalid: another version of qsnapd wrote it. StoreError.
    """
    return Record(store.directory / REGISTRATION_NAME, Registration).read()


def register(store: VmStore, registration: Registration) -> None:
    """From now on the VM exists, for the next daemon too; durable on return.

    On failure: it does not. Raises: StoreError.
    """
    Record(store.directory / REGISTRATION_NAME, Registration).write(registration)


def read_last_seen(store: VmStore) -> LastSeen | None:
    """How the clone last ran, as far as it was noted. Raises: as `read_registration`."""
    return Record(store.directory / LAST_SEEN_NAME, LastSeen).read()


def note_last_seen(store: VmStore, seen: LastSeen) -> None:
    """Note how the clone runs now, in place of what was noted before. Raises: StoreError."""
    record = Record(store.directory / LAST_SEEN_NAME, LastSeen)
    if record.read() != seen:
        record.write(seen)


def remove_made(
    registration: Registration, *, storage: bool, images: Iterable[FileIdentity] = ()
) -> tuple[str, ...]:
    """Remove the sockets and pipes that a clone has left, and all else only if *storage*.

    *images*: of its disks, those that qsnapd has made since.
    Idempotent, durable. Returns the paths of what was removed; what was put in place of one stays.
    Raises: StoreError: something of it cannot be removed.
    """
    made = [file for file in registration.files if storage or _holds_nothing(file.path)]
    made += (*registration.overlays, *images) if storage else ()
    removed = [file.path for file in made if remove_if_ours(Path(file.path), file.inode)]
    sync_removals(Path(file.path).parent for file in made)
    return tuple(removed)


def _holds_nothing(path: str) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return True
    return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)
